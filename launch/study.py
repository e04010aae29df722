"""Repeat one of the paper's tables or figures, at any scale.

    python launch/study.py list
    python launch/study.py table5 --scale demo
    python launch/study.py table2 --scale small --seeds 3 --jobs 2 -- --model FOLDER --data_dir FOLDER
    python launch/study.py table2 --scale small --systems "LoRA r = 16,MoRE" --rates 3e-4,1e-3,3e-3 -- --model FOLDER
    python launch/study.py table2 --scale paper --slurm table2.sbatch -- --data_dir /data

What follows `--` are flags of launch/train.py for every run. Studies of one output folder share their runs. The same
command goes on after any interruption, and leaves out what is done. A study is a file in launch/studies.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.compare.tables import as_text
from more_ds.errors import UserError
from more_ds.study.definition import only_systems, read_scale, read_study, study_names
from more_ds.study.jobs import Job, make_jobs
from more_ds.study.outcome import tables_of, write_outcome
from more_ds.study.queue import Start, launcher, run_all
from more_ds.study.rates import best_rates, rates_table, search_jobs

LIST = "list"
# The scripts of clusters lie in a folder of the same name, which a plain import would find.
slurm: Any = importlib.import_module("launch.slurm")


def main(argv: Sequence[str] | None = None, start: Start | None = None) -> int:
    """Run the command line; returns the exit code. `start` starts the jobs; default: as processes."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    return cli.run(lambda: _main(_parser().parse_args(own), flags, start))


def _main(arguments: argparse.Namespace, given: Sequence[str], start: Start | None) -> None:
    log.quiet_libraries()
    scale = read_scale(arguments.scale)
    if arguments.name == LIST:
        studies = [read_study(name, scale) for name in study_names()]
        return log.say(log.table(["study", "kind", "systems", "what it is"],
                                 [[s.name, s.kind, len(s.arms), s.about] for s in studies]))  # fmt: skip
    study = read_study(arguments.name, scale)
    if arguments.systems:
        study = only_systems(study, [name.strip() for name in arguments.systems.split(",")])
    _, flags = cli.parse(cli.config_parser(""), given)
    output = Path(arguments.output or Path("studies") / arguments.scale)
    where = (flags, output, arguments.ds_config)
    search = search_jobs(study, scale, arguments.rates, *where) if arguments.rates else []
    queue = partial(_run, start or launcher(arguments.jobs, arguments.gpus), arguments.jobs, output / "logs")
    if search and not (arguments.list or arguments.slurm):
        queue(search)
        log.say(as_text(rates_table(study, search), 2) + "\n")
    is_searched = all(job.is_done for job in search)
    # Until the rates are known, there is nothing but their search to list or to submit.
    jobs = make_jobs(study, scale, arguments.seeds, *where, best_rates(search)) if is_searched else search
    if arguments.list:
        return log.say(_listing(jobs))
    if arguments.slurm:
        return _write_slurm(arguments, study.name, jobs, "for the tables" if is_searched else "or with it, to go on")
    queue(jobs)
    tables = tables_of(study, jobs, scale, flags)
    write_outcome(output / study.name, study, jobs, [*tables, *([rates_table(study, search)] if search else [])])
    log.say("\n\n".join(as_text(table, 2) for table in tables))
    log.say(f"\nwritten to {output / study.name}: index.html, table.md, table.tex, table.json")


def _run(start: Start, slots: int, logs: Path, jobs: Sequence[Job]) -> None:
    """Run jobs, one of every system first: a deadline cuts off seeds."""
    run_all(sorted(jobs, key=lambda job: job.seed), start, slots=slots, logs=logs)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help="table1 to table7, figure2 to figure5; `list` describes them")
    add(
        "--scale",
        default="demo",
        help="demo, generated, small or paper: a file in launch/studies/scales; default: demo",
    )
    add("--seeds", type=cli.positive, default=3, help="runs of each system, or draws of a transfer; default: 3")
    add("--systems", metavar="A,B", help="some of the study's, by name; default: all")
    add(
        "--rates",
        type=_rates,
        metavar="A,B",
        help="learning rates: every system trains seed 0 at each, and its other seeds at the one with the best "
        "validation score; default: the scale's, for all",
    )
    add("--output", help="folder of all studies of this scale; default: studies/<scale>")
    add("--jobs", type=cli.positive, default=1, help="how many run at once on this machine; default: 1")
    add("--gpus", type=int, default=0, help="GPUs of each job; default: what it sees, by one process")
    add("--ds_config", help="DeepSpeed configuration of every run; default: ZeRO-0")
    add("--list", action="store_true", help="show what would run, and stop")
    add("--slurm", metavar="FILE", help="write a SLURM script that trains the runs as an array, and stop")
    return parser


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"'{text}': a learning rate is a finite number above zero")
    return rates


def _listing(jobs: Sequence[Job]) -> str:
    rows: list[list[Any]] = [
        [job.arm, job.backbone, job.seed, job.script, "done" if job.is_done else "to do", job.id] for job in jobs
    ]
    return log.table(["system", "backbone", "seed", "command", "state", "job"], rows)


def _write_slurm(arguments: argparse.Namespace, name: str, jobs: Sequence[Job], then: str) -> None:
    """Write an array of the runs that are not done; what starts from a run, and the table, are left to this command.

    Raises:
        UserError: a path that the script cannot hold.
    """
    runs = [job for job in jobs if job.source is None and not job.is_done]
    if not runs:
        return log.say("all runs are done; give the command without --slurm for the tables")
    for job in runs:
        if shlex.join(_absolute(job)) != " ".join(_absolute(job)):
            raise UserError(f"--slurm: {job.folder.resolve()} is more than one word of a script; name another --output")
        job.prepare()
    text = (slurm.TEMPLATES / "sweep.sbatch").read_text(encoding="utf-8")
    tasks = max(arguments.gpus, 1)
    options = {"job_name": name, "array": f"0-{len(runs) - 1}%{arguments.jobs}", "gpus_per_node": str(arguments.gpus),
               "ntasks_per_node": str(tasks)}  # fmt: skip
    text = slurm.set_options(text, options)
    entries = " ".join(shlex.quote(" ".join(_absolute(job))) for job in runs)
    settings = {"PYTHON": sys.executable} | ({"DS_CONFIG": arguments.ds_config} if arguments.ds_config else {})
    for key, value in settings.items():
        text, _ = slurm.replace_lines(rf"{key}=.*", f"{key}={shlex.quote(value)}", text)
    text, _ = slurm.replace_lines(r"SWEEP=.*", f"SWEEP=({entries})", text)
    text, _ = slurm.replace_lines(r'  --output_dir "runs/.*', "  ${SWEEP[$SLURM_ARRAY_TASK_ID]}", text)
    text = text.replace('cd "${SLURM_SUBMIT_DIR}"', f"cd {shlex.quote(str(slurm.ROOT))}")
    Path(arguments.slurm).write_text(text, encoding="utf-8")
    log.say(f"wrote {arguments.slurm}: {len(runs)} runs; submit it: sbatch {arguments.slurm}; then give this command "
            f"without --slurm {then}")  # fmt: skip


def _absolute(job: Job) -> list[str]:
    """The run's recipe and folder, which the script names itself where they are not."""
    recipe, folder = Path(job.arguments[1]), job.folder
    return ["--recipe", str(recipe.resolve()), "--output_dir", str(folder.resolve())]


if __name__ == "__main__":
    sys.exit(main())
