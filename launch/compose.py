"""Put finished LoRAs together, and score what comes out.

    python launch/compose.py --loras runs/a runs/b runs/c --suite glue --tasks rte         MoLE: gates are trained
    python launch/compose.py --loras_of rte,mrpc,sst2 --suite glue --output_dir runs/mole  three LoRAs are trained first
    python launch/compose.py --method xlora --loras A B C --suite glue                     X-LoRA: a classifier is
    deepspeed launch/compose.py --loras A B C --ds_config ds_configs/zero2.json ...        the same on several ranks
    python launch/compose.py --method lorahub --loras A B C --suite glue --tasks rte --shots 5
    python launch/compose.py --method mask --loras RUN --only A,C --suite glue                a MoLE without the others
    python launch/compose.py --method ties --loras A B C --weights 0.5,0.25,0.25 --density 0.3 --suite glue

A LoRA is a run, an adapter folder that PEFT reads, or FOLDER:TASK for a task of a MoRE; all are of one base model.
With `--loras_of` they lie in OUTPUT_DIR-loras (see launch/single.py); the same command goes on where it was stopped.
MoLE and X-LoRA are runs like those of launch/train.py, with its flags; `--adapter.level layer`, `--adapter.only [0,2]`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from launch import single, train
from more_ds import cli, log
from more_ds.checkpoint_files import is_taken, to_json, write_file
from more_ds.compose.lorahub import few_shot_loss, search
from more_ds.compose.masking import masked
from more_ds.compose.merging import KINDS, merge
from more_ds.compose.sources import OF_LORAS, Source, aligned, read_sources, weighted_sum
from more_ds.config import RunConfig, convert, read_recipe
from more_ds.data.rows import load_examples
from more_ds.errors import UserError, suggest
from more_ds.evaluate import evaluate
from more_ds.export.lora import write_lora
from more_ds.loading import choose_device, find_subject, load_text_model
from more_ds.plan import with_demo
from more_ds.rendezvous import from_slurm
from more_ds.results import TaskResult, result_table, write_results
from more_ds.run_folder import default_path, versions
from more_ds.stopping import Signals
from more_ds.tasks import Task, resolve_tasks
from more_ds.text_model import TextModel

METHODS = (*OF_LORAS, "mask", "lorahub", *KINDS)


@dataclass(frozen=True)
class _Job:
    """What is put together without gradients, and where it goes."""

    config: RunConfig
    method: str
    sources: list[Source]
    tasks: list[Task]
    folder: Path
    device: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    from_slurm()
    with Signals() as signals:
        return cli.run(lambda: _main(*cli.parse(_parser(), sys.argv[1:] if argv is None else argv), signals))


def _parser() -> argparse.ArgumentParser:
    usage = (
        "launch/compose.py --loras A B ... [--method mole|xlora|mask|lorahub|cat|linear|ties|dare] [--KEY VALUE ...]"
    )
    parser = cli.config_parser(__doc__ or "", usage)
    add = parser.add_argument
    add("--loras", nargs="+", default=[], metavar="LORA", help="runs, adapter folders, or FOLDER:TASK")
    add("--loras_of", default="", metavar="TASKS", help="train a LoRA for each of these tasks first, and take those")
    add("--lora_recipe", default="demo", help="recipe of their training; other flags than --adapter hold for it too")
    add("--recipe", default="mole", help="recipe: a YAML file, or a name in launch/recipes")
    add("--only", default="", help="of mask: the LoRAs of the MoLE that stay, by name or number from 0")
    add("--weights", help="of the LoRAs, in merging: numbers with commas; default: 1 / N each")
    add("--density", type=float, default=0.5, help="share of the values that ties and dare keep")
    add("--shots", type=cli.positive, default=5, help="training examples of each task that lorahub looks at")
    add("--evaluations", type=cli.positive, default=40, help="weights that lorahub tries")
    add("--ds_config", help="of mole, xlora: DeepSpeed configuration; default: ZeRO-0")
    add("--resume", default="none", help="of mole, xlora: none, auto, or a checkpoint's folder")
    add("--dry_run", action="store_true", help="of mole, xlora: print the plan and stop")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _main(arguments: argparse.Namespace, flags: dict[str, Any], signals: Signals) -> None:
    recipe = read_recipe(arguments.recipe)
    method = flags.pop("method", "mole")
    if method not in METHODS:
        raise UserError(f"--method {method} puts no LoRAs together{suggest(method, METHODS)}")
    if arguments.loras_of:
        _check_before_training(arguments, flags, method)
        arguments.loras = _train_first(arguments, flags)
    if method in OF_LORAS:
        read_sources(arguments.loras, None)  # what is wrong with them is said before a demo's backbone is built
        flags["adapter"] = {**flags.get("adapter", {}), "loras": arguments.loras}
        return train.train(arguments, {**flags, "method": method}, signals)
    _compose(_job(arguments, recipe, flags, method), arguments)


def _check_before_training(arguments: argparse.Namespace, flags: Mapping[str, Any], method: str) -> None:
    """Refuse what could not be put together once the LoRAs of `--loras_of` are trained."""
    if arguments.loras or arguments.dry_run or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--loras_of trains in processes of its own: start it with python, without --loras and --dry_run; "
            "or train with launch/single.py, and give --loras"
        )
    if "output_dir" not in flags:
        raise UserError("the LoRAs of --loras_of need a place, beside that of what they become: --output_dir DIR")
    if method == "mask":
        _the_mole(arguments)
    _check_density(arguments)
    _weights(arguments.weights, len(arguments.loras_of.split(",")))


def _train_first(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> list[str]:
    """Train a LoRA for each task of `--loras_of`; returns their folders."""
    own = {
        "recipe": arguments.lora_recipe, "method": "lora", "tasks": arguments.loras_of, "test": "true",
        "output_dir": f"{flags['output_dir']}-loras",
    }  # fmt: skip
    shared = {key: value for key, value in flags.items() if key != "adapter"}
    return [str(run) for run in single.train_each([f"--{key}={value}" for key, value in {**shared, **own}.items()])]


def _check_density(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.density <= 1:
        raise UserError(f"--density is {arguments.density}; it must be above 0 and at most 1")


def _job(arguments: argparse.Namespace, recipe: Mapping[str, Any], flags: dict[str, Any], method: str) -> _Job:
    """Check what can be checked before a model is loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--method {method} runs in one process; start it with python")
    _check_density(arguments)
    config = cli.merged({k: v for k, v in recipe.items() if k not in ("method", "adapter")}, flags, "compose")
    named = with_demo(config).model if "model" in flags else None
    sources: list[Source] = []
    if method == "mask":
        base = find_subject(_the_mole(arguments), named).base
    else:
        sources = read_sources(arguments.loras, named)
        base = sources[0].base
    config = with_demo(replace(config, model=named or base))
    folder = Path(config.output_dir or default_path(method))
    if is_taken(folder):
        raise UserError(f"output_dir {folder} exists and holds something; name another folder")
    tasks = resolve_tasks(config.tasks or None, config.suite, config.tasks_file)
    return _Job(config, method, sources, tasks, folder, choose_device())


def _the_mole(arguments: argparse.Namespace) -> str:
    if len(arguments.loras) != 1 or not arguments.only:
        raise UserError("--method mask takes one trained MoLE and the LoRAs that stay: --loras RUN --only A,C")
    return str(arguments.loras[0])


def _compose(job: _Job, arguments: argparse.Namespace) -> None:
    """Write the adapter, and score it."""
    weights = _weights(arguments.weights, len(job.sources)) if job.sources else []
    job.folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"method": job.method, "base_model": job.config.model}
    if job.method == "mask":
        document["only"] = masked(find_subject(arguments.loras[0]), arguments.only.split(","), job.folder)
    elif job.method == "lorahub":
        weights = _search(job, arguments)
    else:
        base = _load(job, job.sources[0].base).module
        merge(base, job.sources, job.method, weights, arguments.density, job.config.seed, job.folder)
    if job.sources:
        document["weights"] = {source.name: weight for source, weight in zip(job.sources, weights, strict=True)}
        rows = [[source.name, source.rank, weight] for source, weight in zip(job.sources, weights, strict=True)]
        log.say("\n" + log.table(["LoRA", "rank", "weight"], rows))
    if job.method in ("ties", "dare"):
        document["density"] = arguments.density
    write_file(job.folder / "compose.json", to_json({**document, "versions": versions()}))
    if job.config.test:
        results = _score(job)
        about = {"subject": str(job.folder), "base_model": job.config.model, "versions": versions()}
        write_results(job.folder / "eval" / "test", results, about)
        log.say("\n" + result_table(results))
    log.say(f"\nwritten to {job.folder}; score it again: python eval/run.py {job.folder}")


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        weights = convert(text, list[float])
    except ValueError as error:
        raise UserError(f"--weights is '{text}'; give numbers with commas, e.g. 0.5,0.5") from error
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} numbers for {count} LoRAs; give one for each")
    return weights


def _search(job: _Job, arguments: argparse.Namespace) -> list[float]:
    """Find LoraHub's weights, and write its LoRA."""
    config, loras = job.config, aligned(job.sources)
    examples = [
        example
        for task in job.tasks
        for example in load_examples(
            task, "train", data_dir=config.data_dir, limit=arguments.shots, seed=config.seed, plain=config.plain_prompts
        )
    ]
    count = len(job.sources)
    zero = weighted_sum(loras, [0.0] * count)
    first = job.sources[0]
    write_lora(job.folder, zero, first.config, base=config.model, dtype=torch.float32)
    text_model = _load(job, str(job.folder))
    log.say(f"lorahub: {len(examples)} examples of {len(job.tasks)} tasks, {arguments.evaluations} evaluations")
    loss = few_shot_loss(text_model, loras, examples, config.per_device_eval_batch_size)
    weights = search(loss, count, arguments.evaluations, config.seed)
    log.say(f"loss {loss([0.0] * count):.4f} of the base model, {loss(weights):.4f} with the weights found")
    write_lora(job.folder, weighted_sum(loras, weights), first.config, base=config.model, dtype=torch.float32)
    return weights


def _load(job: _Job, name: str) -> TextModel:
    config = job.config
    dtype = config.dtype if config.dtype != "auto" else "fp32" if job.device == "cpu" else "bf16"
    return load_text_model(
        find_subject(name), dtype=dtype, device=job.device,
        max_source_length=config.max_source_length, max_target_length=config.max_target_length,
    )  # fmt: skip


def _score(job: _Job) -> list[TaskResult]:
    config = job.config
    examples = {
        task.name: load_examples(
            task,
            "test",
            data_dir=config.data_dir,
            limit=config.eval_limit,
            seed=config.seed,
            plain=config.plain_prompts,
        )
        for task in job.tasks
    }
    return evaluate(
        _load(job, str(job.folder)), job.tasks, examples, task_ids=dict.fromkeys(examples, 0), split="test",
        batch_size=config.per_device_eval_batch_size, mode=config.eval_mode, label="scoring test",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
