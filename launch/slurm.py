"""Write a SLURM script that trains a recipe, from a template in launch/slurm.

    python launch/slurm.py llama2_7b_glue --nodes 2 --time 12:00:00 --partition gpu --to job.sbatch -- \\
        --model /models/Llama-2-7b-hf --data_dir /data --output_dir runs/glue
    sbatch job.sbatch

What follows `--` are flags of launch/train.py; a mistake in them, or in the recipe, is found here and not in the queue.
"""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.config import read_recipe
from more_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "launch" / "slurm"
OPTIONS = {
    "job_name": "name in the queue and of the log; default: the recipe's",
    "nodes": "number of nodes; default: 1",
    "gpus_per_node": "GPUs of a node; 0: train on CPUs; default: 4",
    "ntasks_per_node": "ranks of a node; default: one per GPU",
    "cpus_per_task": "cores of a rank; default: 8",
    "mem": "memory of a node; default: 0, all of it",
    "time": "most time until the job is stopped, saved and requeued, as SLURM writes it; default: 24:00:00",
    "partition": "where to run",
    "account": "who pays",
    "qos": "quality of service",
    "constraint": "features of the nodes",
    "exclude": "nodes to leave out",
    "signal": "how the job is asked to stop; default: B:USR1@300, 300 s before the end of its time",
}
"""Options that sbatch has under the same name, with dashes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or a name in launch/recipes")
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--ds_config", help="DeepSpeed configuration; default: ZeRO-2 on one node, ZeRO-3 on several")
    parser.add_argument("--python", default=sys.executable, help="the Python of the job; default: this one")
    parser.add_argument("--to", help="file to write; default: print the script")
    given = list(sys.argv[1:] if argv is None else argv)
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    return cli.run(lambda: write(parser.parse_args(own), flags))


def write(arguments: Namespace, flags: Sequence[str]) -> None:
    """Check the run, and print its script or write it."""
    check(arguments.recipe, flags)
    template = "one_node" if (arguments.nodes or "1") == "1" else "nodes"
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    options.setdefault("job_name", Path(arguments.recipe).stem)
    if "gpus_per_node" in options:
        options.setdefault("ntasks_per_node", options["gpus_per_node"] if options["gpus_per_node"] != "0" else "1")
    text = set_options((TEMPLATES / f"{template}.sbatch").read_text(encoding="utf-8"), options)
    settings = {"PYTHON": arguments.python} | ({"DS_CONFIG": arguments.ds_config} if arguments.ds_config else {})
    for name, value in settings.items():
        text, _ = replace_lines(rf"{name}=.*", f"{name}={shlex.quote(value)}", text)
    text = text.replace('cd "${SLURM_SUBMIT_DIR}"', f"cd {shlex.quote(str(ROOT))}")
    text = text.replace('"$@"', shlex.join(["--recipe", arguments.recipe, *flags]))
    if arguments.to is None:
        log.say(text)
    else:
        Path(arguments.to).write_text(text, encoding="utf-8")
        log.say(f"wrote {arguments.to}; submit it: sbatch {arguments.to}")


def check(recipe: str, flags: Sequence[str]) -> None:
    """Refuse a recipe or flags that launch/train.py would refuse.

    Raises:
        UserError: unknown or wrong ones, or no folder to resume from.
    """
    parser = cli.config_parser("")
    for name in ("recipe", "ds_config", "resume"):
        parser.add_argument(f"--{name}")
    arguments, values = cli.parse(parser, flags)
    twice = [f"--{name}" for name in ("recipe", "ds_config", "resume") if getattr(arguments, name) is not None]
    if twice:
        raise UserError(f"{', '.join(twice)} after --: the script sets it; give --ds_config before --")
    config = cli.merged(read_recipe(recipe), values, f"recipe '{recipe}'")
    if config.output_dir is None:
        raise UserError("a job that is requeued goes on from its output_dir; give --output_dir after --")


def set_options(text: str, options: Mapping[str, str]) -> str:
    """A script with `#SBATCH` lines set: a value replaced, a line that is commented out made to count, or one added.

    Raises:
        UserError: a value that would be more than a value.
    """
    for name, value in options.items():
        if not re.fullmatch(r"[\w.,:@%&|*+()\[\]/-]+", value):
            raise UserError(f"--{name} is {value!r}; it must be one word")
        key = f"--{name.replace('_', '-')}"
        if name == "gpus_per_node" and value == "0":
            text, _ = replace_lines(r"#SBATCH --gpus-per-node=.*\n", "", text)
            continue
        line = f"#SBATCH {key}={value}"
        text, count = replace_lines(rf"##?SBATCH {key}=.*", line, text)
        if not count:
            text = text.replace("#SBATCH --requeue", f"{line}\n#SBATCH --requeue", 1)
    return text


def replace_lines(pattern: str, line: str, text: str) -> tuple[str, int]:
    """Put a line, as it is, in the place of those that begin with a pattern; returns the text and their number."""
    return re.subn(rf"^{pattern}", lambda _: line, text, flags=re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main())
