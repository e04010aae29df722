"""What a study is: systems that are trained on the same data, in the same order, and compared.

A study is a YAML file in `launch/studies`; where it trains stands in `launch/studies/scales/<scale>.yaml`, for each of
the data sets that studies name, and there for each backbone, as keys of a run. Its `transfer` says what is learnt from
a few examples, and its `only` which systems of a study are trained at this scale.

    about: one line
    data: glue                  # a data set of the scale
    kind: train                 # train | transfer | scaling | embeddings | speed | count
    baseline: LoRA              # the system that the others are tested against
    published: results          # a group of numbers in more_ds/compare/paper.yaml
    systems:
      LoRA: {method: lora, adapter: {r: 8}}
      one LoRA a task: {method: lora, adapter: {r: 8}, each_task: true}
      lambda 0.1: {method: more, curve: lambda, x: 0.1}
      MoRE alone: {method: more, transfer: {train: all}}
      random sampling: {method: more, run: {sampling: proportional}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from more_ds.config import RECIPES
from more_ds.errors import UserError, suggest
from more_ds.methods import check_method

FOLDER = RECIPES.parent / "studies"
SCALES = FOLDER / "scales"
KINDS = ("train", "transfer", "scaling", "embeddings", "speed", "count")


@dataclass(frozen=True)
class Arm:
    """One system of a study.

    Attributes:
        name: of its row.
        method: of `more_ds.methods`.
        adapter: options of the method.
        run: keys of the run besides.
        each_task: train a run for each task alone, and take their scores together.
        transfer: options of `launch/transfer.py`.
        curve: the curve that it is a point of.
        x: where on it.
    """

    name: str
    method: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    each_task: bool = False
    transfer: Mapping[str, Any] = field(default_factory=dict)
    curve: str | None = None
    x: float | None = None


@dataclass(frozen=True)
class Study:
    """An experiment; see the module's docstring.

    Attributes:
        relative: numbers that the paper prints relative to the baseline's, by system.
    """

    name: str
    about: str
    data: str
    arms: list[Arm]
    kind: str = "train"
    baseline: str | None = None
    published: str | None = None
    relative: Mapping[str, float] = field(default_factory=dict)


def only_systems(study: Study, names: Sequence[str]) -> Study:
    """The study with some of its systems, in its own order; without its baseline nothing is tested against it.

    Raises:
        UserError: it has no such system.
    """
    known = [arm.name for arm in study.arms]
    for name in names:
        if name not in known:
            raise UserError(f"study '{study.name}' has no system '{name}'{suggest(name, known)}")
    arms = [arm for arm in study.arms if arm.name in names]
    return replace(study, arms=arms, baseline=study.baseline if study.baseline in names else None)


def study_names() -> list[str]:
    """Names of all studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_study(name: str, scale: Mapping[str, Any]) -> Study:
    """Read a study, with the systems that are trained at a scale.

    Raises:
        UserError: there is none of that name, or it is not as the module's docstring says.
    """
    content = _read(FOLDER / f"{name}.yaml", f"no study '{name}'{suggest(name, study_names())}")
    where = f"study '{name}'"
    arms = [_arm(title, keys, where) for title, keys in content.pop("systems", {}).items()]
    _check_keys(content, {f.name for f in fields(Study)} - {"name", "arms"}, where)
    study = Study(name=name, arms=arms, **content)
    if study.kind not in KINDS:
        raise UserError(f"{where}: kind is '{study.kind}'{suggest(study.kind, KINDS)}")
    if study.baseline is not None and study.baseline not in [arm.name for arm in arms]:
        raise UserError(f"{where}: baseline is '{study.baseline}'{suggest(study.baseline, [arm.name for arm in arms])}")
    only = scale.get("only", {}).get(name)
    return study if only is None else only_systems(study, only)


def read_scale(name: str) -> dict[str, Any]:
    """Where the studies train at a scale: data set -> backbone -> keys of a run.

    Raises:
        UserError: there is no such scale.
    """
    known = sorted(path.stem for path in SCALES.glob("*.yaml"))
    return _read(SCALES / f"{name}.yaml", f"no scale '{name}'{suggest(name, known)}")


def _arm(name: str, keys: Mapping[str, Any], where: str) -> Arm:
    _check_keys(keys, {f.name for f in fields(Arm)} - {"name"}, f"{where}, system '{name}'")
    arm = Arm(name=name, **keys)
    if wrong := check_method(arm.method, arm.adapter):
        raise UserError(f"{where}, system '{name}': {'; '.join(wrong)}")
    return arm


def _check_keys(content: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{suggest(key, known)}")


def _read(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(missing)
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
