"""Every method by its demo recipe: does it beat the backbone that was not tuned?

make test-recipes                              prints a line for each; about forty minutes on two cores
MORE_DS_RECIPES=DIR make test-recipes          the same in a place of yours, where it goes on

A method's recipe is `launch/recipes/demo/<method>.yaml`, or the demo's own with `--method`. What a method starts from
(LoRAs, prompts) is trained first, by the same recipes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from more_ds import log
from more_ds.config import RECIPES
from more_ds.demo import prepare
from more_ds.engine import cores
from more_ds.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
SINGLE = ("entailment", "paraphrase", "multiple_choice")
"""Tasks whose LoRAs are mixed, and whose prompts are."""
STARTS = {f"single-{method}-{task}": (method, task) for method in ("lora", "prompt_tuning") for task in SINGLE}
"""Name of a run that others start from -> its method and its task."""
SOURCES = {"mole", "xlora", "spot", "attempt"}
"""Methods that start from those."""
LORAS = [f"single-lora-{task}" for task in SINGLE]
PROMPTS = [f"single-prompt_tuning-{task}" for task in SINGLE]


def command(method: str, place: Path) -> list[str]:
    """The command line that trains a method on all of the demo's tasks, in `place / method`."""
    loras, prompts = ([str(place / name) for name in names] for names in (LORAS, PROMPTS))
    needs = {
        "mole": ["--loras", *loras],
        "xlora": ["--method", "xlora", "--loras", *loras],
        "spot": ["--init_adapter", prompts[0]],
        "attempt": ["--adapter.sources", ",".join(prompts)],
    }
    if method in ("mole", "xlora"):
        return ["launch/compose.py", *recipe(method), *needs[method], "--output_dir", str(place / method)]
    return ["launch/train.py", *recipe(method), *needs.get(method, []), "--output_dir", str(place / method)]


def recipe(method: str) -> list[str]:
    """The flags that name a method's demo recipe."""
    own = RECIPES / "demo" / f"{method}.yaml"
    return ["--recipe", f"demo/{method}"] if own.is_file() else ["--recipe", "demo", "--method", method]


def run(arguments: list[str], folder: Path) -> float:
    """Train, and return the seconds that it took; what it printed lies beside `folder`."""
    began = time.monotonic()
    with folder.with_suffix(".log").open("w") as printed:
        subprocess.run(
            [sys.executable, *arguments, "--resume", "auto"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=printed, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    return time.monotonic() - began


def scores(folder: Path) -> list[dict[str, float]]:
    """A run's validation scores by task, in percent, from the first evaluation on."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [record["evaluation"] for record in records if "evaluation" in record]
    return [{task: next(iter(metrics.values())) for task, metrics in one.items()} for one in found]


def mean(of: dict[str, float], tasks: Iterable[str] | None = None) -> float:
    """The mean of some tasks' scores; default: of all."""
    return statistics.fmean(of[task] for task in tasks or of)


def start(name: str, place: Path) -> None:
    """Train what other methods start from."""
    method, task = STARTS[name]
    options = ["--tasks", task, "--eval_on_start", "false", "--test", "false", "--output_dir", str(place / name)]
    run(["launch/train.py", *recipe(method), *options], place / name)


def train(method: str, place: Path) -> str:
    """Train a method, and print its scores; returns "ok", or what is wrong."""
    try:
        seconds = run([*command(method, place), "--test", "false"], place / method)
    except subprocess.CalledProcessError as error:
        verdict = f"ended with exit code {error.returncode}, see {place / method}.log"
        print(f"{method:14} {verdict}", flush=True)
        return verdict
    best = max(scores(place / method)[1:], key=mean)
    print(f"{method:14} {len(best)} tasks, {mean(best):6.2f}, {seconds:4.0f} s", flush=True)
    return "ok"


def main() -> int:
    """Run all recipes; returns the exit code."""
    log.quiet_libraries()
    prepare()
    place = Path(os.environ.get("MORE_DS_RECIPES") or tempfile.mkdtemp(prefix="recipes-"))
    names = list(dict.fromkeys(["lora", *(sys.argv[1:] or METHODS)]))
    with ThreadPoolExecutor(cores()) as pool:
        if not SOURCES.isdisjoint(names):
            list(pool.map(lambda name: start(name, place), STARTS))
        verdicts = dict(zip(names, pool.map(lambda name: train(name, place), names), strict=True))
    untuned = scores(place / "lora")[0]  # LoRA starts as the backbone
    rows, worse = [], []
    for name, verdict in verdicts.items():
        best = max(scores(place / name)[1:], key=mean) if verdict == "ok" else {}
        own = (mean(untuned, best), mean(best)) if best else (None, None)
        rows.append([name, len(best), *own, verdict])
        if not best or own[0] >= own[1]:
            worse.append(name)
    print("\n" + log.table(["method", "tasks", "untuned", "best", ""], rows))
    print(f"{len(rows) - len(worse)} of {len(rows)} methods beat the untuned backbone; not: {', '.join(worse) or '-'}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
