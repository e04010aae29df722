"""Write a trained adapter in the forms that others read.

    python launch/export.py RUN                        a plain LoRA per task, with the rank that it uses in each map
    python launch/export.py RUN --form padded          the same with one rank, for vLLM and SGLang
    python launch/export.py RUN --form merged          a whole model per task
    python launch/export.py RUN --form adapter         all tasks in one adapter without gates

RUN is a run's folder or an adapter's. Every export is compared with the adapter before it is put in place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.export.job import Form, Request, export
from more_ds.export.push import push
from more_ds.loading import find_subject
from more_ds.model import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    subject = find_subject(arguments.run, arguments.base_model)
    request = Request(
        subject=subject,
        form=arguments.form,
        tasks=tuple(name for name in arguments.tasks.split(",") if name),
        output=Path(arguments.output_dir or subject.folder.parent / "export" / arguments.form),
        rank=arguments.rank,
        dtype=arguments.dtype,
        check=not arguments.no_check,
        quantized=arguments.quantized,
    )
    rows = export(request)
    header = ["task", "rank", "mean", "highest", "parameters", "difference"]
    keys = ["task", "rank_least", "rank_mean", "rank_highest", "parameters"]
    cells = [[*(row[key] for key in keys), _difference(row["difference"])] for row in rows]
    log.say(log.table(header, cells))
    log.say(f"written to {request.output}")
    if arguments.push_to_hub:
        log.say(f"pushed to {push(request.output, arguments.push_to_hub)}")


def _difference(value: float | None) -> str:
    return "not compared" if value is None else f"{value:.0e}"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="launch/export.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory or adapter folder, of any ZeRO stage")
    add("--form", choices=get_args(Form), default="lora", help="default: lora")
    add("--tasks", default="", help="which of its tasks, e.g. cola,rte; default: all")
    add("--output_dir", help="a folder that is not there yet; default: <RUN>/export/<form>")
    add("--rank", type=cli.positive, help="of --form padded; default: the highest rank in use")
    add("--dtype", choices=list(DTYPES), help="default: fp32 for LoRAs, the base's own for merged models")
    add("--base_model", help="the base model, where the recorded one has moved")
    quantized = "merging after a 4-bit or 8-bit run: into the weights as it saw them, or into the original ones"
    add("--quantized", choices=["refuse", "dequantize", "original"], default="refuse", help=quantized)
    add("--no_check", action="store_true", help="do not load the model to compare logits")
    add("--push_to_hub", metavar="REPO", help="upload the folder to this repository of the Hugging Face hub")
    return parser


if __name__ == "__main__":
    sys.exit(main())
