"""The jobs of a study: single commands, each with a folder of its own, that any study may share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from more_ds.config import RunConfig, build, read_recipe
from more_ds.errors import UserError
from more_ds.methods import METHODS
from more_ds.results import RESULTS
from more_ds.study.definition import Arm, Study
from more_ds.study.scaling import scaled_adapters
from more_ds.tasks import resolve_tasks

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("lora_alpha", "lora_dropout", "target_modules")
"""Options of a backbone's recipe that every method gets that adapts the maps it is told."""
Rates = Mapping[tuple[str, str], float]
"""Learning rates by backbone and system."""
OWN = ("method", "adapter", "seed", "output_dir", "recipe", "test")
"""Keys that the study sets itself."""


@dataclass(frozen=True)
class Job:
    """A command of the queue.

    Attributes:
        id: names its folder; two jobs that do the same have the same.
        arm: name of the system.
        backbone: name of the backbone.
        seed: of the run.
        script: what is started, below the root of the checkout.
        arguments: of it; the folder of the result is among them.
        folder: of the result.
        recipe: configuration of a run, to be written to `recipe_path` before the start; None: no run.
        source: the run that it starts from.
        component: the expert that is switched off, from 1; 0: none of them; None: the job is another.
    """

    id: str
    arm: str
    backbone: str
    seed: int
    script: str
    arguments: tuple[str, ...]
    folder: Path
    recipe: Mapping[str, Any] | None = None
    source: Job | None = None
    component: int | None = None

    @property
    def results(self) -> Path:
        """The folder with the scores."""
        return self.folder / "eval" / "test" if self.recipe is not None else self.folder

    @property
    def is_done(self) -> bool:
        """Whether the command has reached its end."""
        path = self.results / RESULTS
        if not path.is_file():
            return False
        if self.script != "launch/transfer.py":
            return True
        wanted = int(self.arguments[self.arguments.index("--seeds") + 1])
        return len({draw["seed"] for draw in json.loads(path.read_text(encoding="utf-8"))["draws"]}) >= wanted

    @property
    def command(self) -> list[str]:
        """What the job's process runs."""
        return [sys.executable, "-u", str(ROOT / self.script), *self.arguments]

    def prepare(self) -> None:
        """Write what the command reads."""
        if self.recipe is not None:
            path = Path(self.arguments[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(dict(self.recipe), sort_keys=True), encoding="utf-8")
        if self.component is not None and self.source is not None:
            scaled_adapters(self.source.folder, self.folder.parents[1])


def make_jobs(
    study: Study,
    scale: Mapping[str, Any],
    seeds: int,
    flags: Mapping[str, Any],
    output: Path,
    ds_config: str | None,
    rates: Rates | None = None,
) -> list[Job]:
    """All jobs of a study, those that others start from first.

    Args:
        study: what is compared.
        scale: from `read_scale`.
        seeds: number of runs of each system; of draws, of a transfer.
        flags: keys of the runs that override those of the scale.
        output: folder of all studies of a scale, which share their runs.
        ds_config: DeepSpeed's configuration of every run.
        rates: learning rates of systems that do not train at their backbone's.

    Raises:
        UserError: the scale has no such data, or a run's configuration is wrong.
    """
    if study.kind == "count":
        return []
    for key in (study.data, *(["transfer"] if study.kind == "transfer" else [])):
        if key not in scale:
            raise UserError(f"study '{study.name}' needs '{key}', and this scale has: {', '.join(scale)}; name another")
    runs = range(1 if study.kind in ("transfer", "scaling", "embeddings", "speed") else seeds)
    jobs: dict[str, Job] = {}
    for backbone, keys in scale[study.data].items():
        common = base_keys(keys, flags)
        for arm in study.arms:
            rate = (rates or {}).get((backbone, arm.name))
            own = common if rate is None else {**common, "learning_rate": rate}
            for seed in runs:
                for job in _runs(study, arm, backbone, own, seed, output, ds_config):
                    if job.id in jobs and study.kind != "transfer":
                        raise UserError(
                            f"systems '{jobs[job.id].arm}' and '{arm.name}' are one run; change one of them"
                        )
                    jobs[job.id] = job
                    jobs |= {one.id: one for one in _followers(study, arm, job, scale, seeds)}
    return sorted(jobs.values(), key=lambda job: job.source is not None)


def base_keys(keys: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a backbone's runs: its recipe, what the scale changes of it, and flags.

    Raises:
        UserError: a flag sets what the study sets, or no model is named.
    """
    own = [f"--{name}" for name in flags if name in OWN and name != "adapter"]
    if own:
        raise UserError(f"{', '.join(own)} after --: the study sets it; leave it out")
    recipe = read_recipe(keys["recipe"]) if "recipe" in keys else {}
    adapter = {**recipe.get("adapter", {}), **keys.get("adapter", {}), **flags.get("adapter", {})}
    merged = {**recipe, **{k: v for k, v in keys.items() if k != "recipe"}, **flags, "adapter": adapter}
    if "model" not in merged:
        raise UserError("this scale names no model; give yours behind --: -- --model FOLDER --data_dir FOLDER")
    return merged


def adapter_options(arm: Arm, common: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a system's adapter: the backbone's where they are the method's too, and its own."""
    chosen = METHODS[arm.method]
    names = set(common) if arm.method == "more" else set(SHARED)
    if "target_modules" not in chosen.defaults and arm.method != "more":
        names.discard("target_modules")  # it decides itself what it adapts
    return {key: common[key] for key in common if key in names & chosen.options} | dict(arm.adapter)


def _runs(
    study: Study, arm: Arm, backbone: str, keys: Mapping[str, Any], seed: int, output: Path, ds_config: str | None
) -> list[Job]:
    values = {**keys, **arm.run, "method": arm.method, "seed": seed, "adapter": adapter_options(arm, keys["adapter"])}
    config = build(values, f"study '{study.name}', system '{arm.name}'")
    alone = [task.name for task in resolve_tasks(config.tasks or None, config.suite, config.tasks_file)]
    parts: Sequence[dict[str, Any]] = [{"tasks": [name]} for name in alone] if arm.each_task else [{}]
    return [_run(arm, backbone, {**values, **part}, seed, output, ds_config) for part in parts]


def _run(arm: Arm, backbone: str, values: dict[str, Any], seed: int, output: Path, ds_config: str | None) -> Job:
    digest = build(values, arm.name).digest()[:10]
    name = f"{arm.method}-{_slug(backbone)}-s{seed}-{digest}"
    folder = output / "runs" / name
    arguments = ["--recipe", str(output / "recipes" / f"{name}.yaml"), "--output_dir", str(folder), "--resume", "auto"]
    if ds_config is not None:
        arguments += ["--ds_config", ds_config]
    return Job(name, arm.name, backbone, seed, "launch/train.py", tuple(arguments), folder, values)


def _followers(study: Study, arm: Arm, job: Job, scale: Mapping[str, Any], seeds: int) -> list[Job]:
    if study.kind == "transfer":
        return [_transfer(arm, job, task, scale["transfer"], seeds) for task in scale["transfer"]["tasks"]]
    if study.kind == "scaling":
        rank = int(job_adapter(job).get("r", 8))
        return [_scaled(arm, job, component) for component in range(rank + 1)]
    return []


def _transfer(arm: Arm, job: Job, task: str, keys: Mapping[str, Any], seeds: int) -> Job:
    options = {**keys.get("options", {}), **arm.transfer, "shots": ",".join(map(str, keys["shots"])), "seeds": seeds}
    name = f"{_slug(task)}-{_slug(json.dumps({k: v for k, v in options.items() if k != 'seeds'}))}-{job.id}"
    folder = job.folder.parents[1] / "transfer" / name
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    arguments = [str(job.folder), "--task", task, "--output_dir", str(folder), *flags]
    return Job(name, arm.name, job.backbone, job.seed, "launch/transfer.py", tuple(arguments), folder, source=job)


def _scaled(arm: Arm, job: Job, component: int) -> Job:
    name = f"{job.id}/expert-{component}"
    folder = job.folder.parents[1] / "scaled" / name
    arguments: tuple[str, ...] = (str(folder), "--split", "validation", "--output_dir", str(folder / "eval"))
    limit = (job.recipe or {}).get("eval_limit")
    arguments += ("--limit", str(limit)) if limit else ()
    done = folder / "eval"
    return Job(name, arm.name, job.backbone, job.seed, "eval/run.py", arguments, done, source=job, component=component)


def job_adapter(job: Job) -> Mapping[str, Any]:
    """Options of a run's adapter."""
    adapter: Mapping[str, Any] = (job.recipe or {})["adapter"]
    return adapter


def run_config(job: Job) -> RunConfig:
    """The configuration of a run."""
    return build(job.recipe or {}, job.id)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
