"""What `--method list` shows: every method, and how many parameters it trains in the model that is asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from more_ds import cli, log, plan
from more_ds.config import RunConfig
from more_ds.errors import UserError
from more_ds.methods import METHODS, adapter_config, check_together
from more_ds.model import read_model_config
from more_ds.tasks import resolve_tasks

LIST = "list"


def method_table(recipe: Mapping[str, Any], flags: Mapping[str, Any], trust_remote_code: bool = False) -> str:
    """The table for a run's model and number of tasks, from shapes alone.

    Args:
        recipe: keys of a run's configuration; `method` and `adapter` are set aside.
        flags: those that override them; likewise.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the model or the tasks are not there.
    """
    own, given = ({k: v for k, v in m.items() if k not in ("method", "adapter")} for m in (recipe, flags))
    config = plan.with_demo(cli.merged(own, given, "--method list"))
    names = [task.name for task in resolve_tasks(config.tasks or None, config.suite, config.tasks_file)]
    model_config = read_model_config(config.model, revision=config.revision, trust_remote_code=trust_remote_code)
    rows = [
        [
            name,
            _trainable(replace(config, method=name), names, model_config, trust_remote_code),
            "yes" if method.routes_by_task else "no",
            method.merges,
            method.about,
        ]
        for name, method in METHODS.items()
    ]
    header = ["method", "trainable", "task ids", "merges", "what it is"]
    return f"{config.model}, {len(names)} tasks\n\n{log.table(header, rows)}"


def _trainable(config: RunConfig, names: list[str], model_config: Any, trust_remote_code: bool) -> str:
    """The number of trainable parameters with the method's defaults, or why there is none."""
    try:
        check_together(config.method, encoder_decoder=model_config.is_encoder_decoder)
        adapter = adapter_config(config.method, {}, names, model_config)
        return f"{sum(plan.count(model_config, adapter, trust_remote_code).trainable.values()):,}"
    except UserError:
        return "not here"
