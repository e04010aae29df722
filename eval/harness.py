"""Score a run, an adapter or a model in lm-evaluation-harness: `python eval/harness.py RUN --tasks a,b`.

An optional extra (`pip install -r requirements-extra.txt`). Every request goes to the adapter's task of the same name,
or to the one that `--task_map` names for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from more_ds import cli, log
from more_ds.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print the harness's table, write its results: exit code 0, or 2 after a mistake in the input."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    try:
        from lm_eval import simple_evaluate  # an extra, which may be absent
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from more_ds.lm_eval_bridge import MoreDsLM
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; lm-evaluation-harness is an extra: pip install -r requirements-extra.txt") from error
    manager = TaskManager(include_path=arguments.include_path, include_defaults=not arguments.only_included)
    names = [name for name in arguments.tasks.split(",") if name]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise UserError(f"--tasks: the harness knows no task {', '.join(map(repr, unknown))}; see --include_path")
    model = MoreDsLM(
        arguments.run, arguments.task_map, arguments.as_task, arguments.base_model, arguments.dtype, arguments.device,
        arguments.batch_size, arguments.max_source_length, arguments.max_target_length,
        end_of_answer=not arguments.no_end_of_answer,
    )  # fmt: skip
    results: Any = simple_evaluate(
        model, tasks=names, task_manager=manager, num_fewshot=arguments.num_fewshot, limit=arguments.limit,
        bootstrap_iters=1000,
    )  # fmt: skip
    log.say(make_table(results))
    encoder = model.text_model.encoder
    if encoder.num_cut:
        log.say(f"{encoder.num_cut} of {encoder.num_prompts} prompts were longer than {encoder.max_source_length}: cut")
    if arguments.output:
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
        output.write_text(text + "\n", encoding="utf-8")
        log.say(f"written to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="eval/harness.py", description="Score in lm-evaluation-harness.", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, adapter folder, model folder or hub id")
    add("--tasks", required=True, help="tasks of the harness, e.g. sst2,my_rte")
    add("--include_path", help="folder with task files of your own")
    add("--only_included", action="store_true", help="leave the harness's own tasks out, which take a while to index")
    add("--task_map", default="", help="the adapter's task for theirs: theirs:ours+theirs:ours")
    add("--as_task", help="the adapter's task for all others")
    add("--num_fewshot", type=int, help="worked examples in the prompt; default: the task's")
    add("--limit", type=cli.positive, help="at most this many rows of each task")
    add("--batch_size", type=cli.positive, default=32, help="requests per batch")
    add("--max_source_length", type=cli.positive, help="most tokens of a prompt; default: the run's, else up to 384")
    add("--max_target_length", type=cli.positive, help="most tokens of an answer; default: the run's, else 128")
    add("--no_end_of_answer", action="store_true", help="score answers without EOS, as the harness's own models do")
    add("--base_model", help="base model of an adapter, where the recorded one has moved")
    add("--dtype", default="auto", help="fp32, bf16, fp16; default: the run's, else bf16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--output", help="a JSON file for the harness's results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
