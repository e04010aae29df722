"""Let a trained run learn one more task from a few examples.

    python launch/transfer.py RUN --task scitail --shots 4,16,32 --seeds 5
    deepspeed --num_gpus 2 launch/transfer.py RUN --task scitail --ds_config ds_configs/zero2.json

Every draw of shots starts from the run's adapter. A MoRE is extended by the task, and can learn its embedding alone.
Any other method trains all that it has, in the place of a task that it knows where it routes by task. Draws that are
finished are kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import checkpoint, cli, log
from more_ds.checkpoint_files import ADAPTER, is_taken, to_json, write_file
from more_ds.collective import on_rank_zero
from more_ds.config import RunConfig
from more_ds.data.rows import load_examples
from more_ds.digest import digest_files
from more_ds.ds_config import BatchSizes, batch_sizes, resolve
from more_ds.engine import Ranks, start
from more_ds.errors import UserError, suggest
from more_ds.evaluate import evaluate
from more_ds.fewshot import NEAREST, Draw, FewShot, draw_shots, lacks_encoder, summary
from more_ds.loading import Subject, find_subject, load_text_model
from more_ds.metrics import majority_scores
from more_ds.model import DTYPES
from more_ds.plan_checks import check_sharding
from more_ds.run_folder import versions
from more_ds.tasks import Task, resolve_tasks
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel
from more_ds.tuners import MoreConfig

EMBEDDING, ALL = "embedding", "all"
NOT_DECISIVE = ("output_dir", "batch_size", "per_device_train_batch_size", "ds_config", "save_adapters", "local_rank")
"""Flags that do not decide a draw's result; seeds and shots may be added as well."""


@dataclass(frozen=True)
class _Plan:
    """What will be learnt, and from what; decided before a model is loaded."""

    subject: Subject
    task: Task
    draws: dict[tuple[int, int], list[Example]]
    test: list[Example]
    majority: dict[str, float]
    config: RunConfig
    sizes: BatchSizes
    ds_config: dict[str, Any]
    dtype: str
    output: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    return cli.run(lambda: _main(cli.parse(_parser(), sys.argv[1:] if argv is None else argv)[0]))


def _main(arguments: argparse.Namespace) -> None:
    ranks = Ranks()
    plan = _plan(arguments, ranks)
    settings = _settings(arguments, plan.subject)
    ranks.connect()
    known = on_rank_zero(lambda: _finished(plan.output, settings), ranks.device, f"{plan.output}")
    done = {(item["shots"], item["seed"]): Draw(**item) for item in known}
    left = [key for key in plan.draws if key not in done]
    log.say(
        f"task '{plan.task.name}' from {plan.subject.name}: {len(plan.draws)} draws, {len(plan.draws) - len(left)} "
        f"finished; {len(plan.test):,} examples of {arguments.split}; output {plan.output}"
    )
    if left:
        few_shot = _load(arguments, plan, ranks)
        for shots, seed in left:
            done[shots, seed] = _learn(arguments, plan, few_shot, shots, seed)
    draws = [done[key] for key in plan.draws]
    if ranks.rank == 0:
        _write(plan, draws, settings)
    log.say("\n" + _table(plan, draws))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, or adapter folder")
    add("--task", required=True, help="the task to learn, e.g. scitail; suite/task where suites share a name")
    add("--tasks_file", help="a YAML file with tasks of your own")
    add("--data_dir", help="folder with <suite>/<task>/<split>.jsonl.gz; default: the run's, else the hub")
    add("--shots", default="4,16,32", help="examples of each class, e.g. 4,16,32")
    add("--seeds", type=int, default=5, help="draws of each number of shots: seeds 0 to N - 1")
    add("--init_from", default=NEAREST, help="known task that the task starts as; `nearest`: the shots say which")
    what = "a MoRE's new embedding alone (the other tasks stay as they are, to the bit), or all that the run trained"
    add("--train", choices=(EMBEDDING, ALL), help=f"{what}; default: {EMBEDDING} of a MoRE, else {ALL}")
    add("--max_steps", type=int, default=100, help="optimizer steps of each draw")
    add("--learning_rate", type=float, default=3e-3, help="peak; decays linearly to zero")
    add("--train_batch_size", type=int, default=16, help="examples per step, over all ranks; shots repeat")
    add("--per_device_train_batch_size", type=int, help="examples per micro-batch; default: no accumulation")
    add("--train_split", default="train", help="where shots are drawn from; {seed} in it is the draw's seed")
    add("--split", default="test", help="what is scored")
    add("--limit", type=int, help="at most this many rows of it")
    add("--batch_size", type=int, default=32, help="examples per batch and process when scoring")
    add("--plain_prompts", action="store_true", help="the task's second, plain prompt; default: as in the run")
    add("--base_model", help="base model of the adapter, where the recorded one has moved")
    add("--dtype", choices=list(DTYPES), help="default: the run's, else bf16 on a GPU, fp32 on a CPU")
    add("--ds_config", help="DeepSpeed configuration; default: ZeRO-0")
    add("--save_adapters", action="store_true", help="keep the extended adapter of every draw")
    add("--output_dir", help="default: <RUN>/transfer/<task>-<what is trained>")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _plan(arguments: argparse.Namespace, ranks: Ranks) -> _Plan:
    subject = find_subject(arguments.run, arguments.base_model)
    run, task = subject.run, resolve_tasks([arguments.task], (), arguments.tasks_file)[0]
    arguments.train = arguments.train or (EMBEDDING if isinstance(subject.adapter_config, MoreConfig) else ALL)
    _check(arguments, subject, task)
    shots = _numbers(arguments.shots)
    dtype = arguments.dtype or run.get("dtype", "auto")
    dtype = dtype if dtype != "auto" else "bf16" if ranks.on_gpu else "fp32"
    config = RunConfig(
        model=subject.base, train_batch_size=arguments.train_batch_size, max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size, learning_rate=arguments.learning_rate,
        warmup_steps=0, weight_decay=0.0, per_device_eval_batch_size=arguments.batch_size,
    )  # fmt: skip
    sizes = batch_sizes(config, ranks.world)
    ds_config = resolve(arguments.ds_config, config, sizes, dtype, per_node=ranks.per_node)
    check_sharding(ds_config, ranks.on_gpu)
    options: dict[str, Any] = {
        "data_dir": arguments.data_dir or run.get("data_dir"),
        "plain": arguments.plain_prompts or bool(subject.reading.get("plain_prompts")),
    }
    draws = {}
    for seed in range(arguments.seeds):
        pool = load_examples(task, arguments.train_split.replace("{seed}", str(seed)), **options)
        draws.update({(count, seed): draw_shots(task, pool, count, seed) for count in shots})
    test = load_examples(task, arguments.split, limit=arguments.limit, **options)
    train_golds = [row.gold for row in load_examples(task, "train", **options)]
    default = subject.folder.parent / "transfer" / f"{task.name}-{arguments.train}"
    return _Plan(
        subject=subject,
        task=task,
        draws=draws,
        test=test,
        majority=majority_scores(task, train_golds, [row.gold for row in test]),
        config=config,
        sizes=sizes,
        ds_config=ds_config,
        dtype=dtype,
        output=Path(arguments.output_dir or default),
    )


def _check(arguments: argparse.Namespace, subject: Subject, task: Task) -> None:
    """Refuse what can be known to be wrong from the flags and the adapter's configuration."""
    known = subject.task_ids
    if subject.adapter is None and not subject.run:
        raise UserError(f"{arguments.run} is no run and no adapter; train one first: launch/train.py")
    if task.name in known:
        raise UserError(f"the adapter knows task '{task.name}' already; it knows: {', '.join(known)}; name another")
    if isinstance(subject.adapter_config, MoreConfig):
        _check_more(arguments, subject.adapter_config, known)
    else:
        _check_other(arguments, subject)
    if arguments.init_from != NEAREST and arguments.init_from not in known:
        raise UserError(
            f"--init_from: unknown task '{arguments.init_from}'{suggest(arguments.init_from, [NEAREST, *known])}"
        )
    for name in ("seeds", "limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")


def _check_more(arguments: argparse.Namespace, adapter: MoreConfig, known: Mapping[str, int]) -> None:
    if not known:
        raise UserError("the adapter does not name its tasks; write them, in order, as task_names in its config")
    if arguments.init_from == NEAREST and adapter.contrastive_weight == 0:
        raise UserError("the adapter was trained with contrastive_weight 0, so no task is near; name one: --init_from")
    if arguments.train == EMBEDDING and (adapter.gate == "frozen" or adapter.gate_input == "pooled"):
        raise UserError("with a frozen gate, or one on the pooled input, an embedding decides nothing; use --train all")


def _check_other(arguments: argparse.Namespace, subject: Subject) -> None:
    if lacks_encoder(subject.adapter_config):
        raise UserError(
            f"{arguments.run} holds what its prompt's encoder wrote, and not the encoder; transfer another run"
        )
    if arguments.train == EMBEDDING:
        raise UserError("--train embedding: only a MoRE has an embedding of its own for a task; use --train all")
    if arguments.init_from != NEAREST and not subject.task_ids:
        raise UserError("--init_from: this adapter does not route by task, so there is none to start as; leave it out")
    if subject.adapter is None and arguments.save_adapters:
        raise UserError("--save_adapters: the run trained the whole model, and there is no adapter; leave it out")


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shots is '{text}'; give numbers above 0, e.g. 4,16,32")
    return sorted({int(part) for part in parts})


def _settings(arguments: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """What decides a single draw's result: the adapter's bytes, and flags."""
    folder, pattern = (Path(subject.base), "*.safetensors") if subject.adapter is None else (subject.adapter, ADAPTER)
    weights = sorted(folder.glob(pattern))
    if not weights:
        raise UserError(f"no {pattern} in {folder}; only safetensors are read; save the adapter again")
    flags = {name: v for name, v in vars(arguments).items() if name not in (*NOT_DECISIVE, "shots", "seeds")}
    return {**flags, "adapter_sha256": digest_files(weights)}


def _finished(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The draws in the folder, which is made where there is none.

    Raises:
        UserError: it holds something else, or draws with other settings.
    """
    saved = output / "settings.json"
    if not saved.is_file():
        if is_taken(output):
            raise UserError(f"{output} exists and holds something else; name another --output_dir")
        output.mkdir(parents=True, exist_ok=True)
        write_file(saved, to_json(settings))
    (output / "draws").mkdir(exist_ok=True)
    before = json.loads(saved.read_text(encoding="utf-8"))
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise UserError(f"{output} holds other draws: {'; '.join(changed)}; name another --output_dir")
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "draws").glob("*.json"))]


def _load(arguments: argparse.Namespace, plan: _Plan, ranks: Ranks) -> FewShot:
    source_length, target_length = plan.subject.lengths()
    text_model = load_text_model(
        plan.subject, dtype=plan.dtype, device=str(ranks.device), max_source_length=source_length,
        max_target_length=target_length, trainable=True,
    )  # fmt: skip
    model: Any = text_model.module
    known = list(plan.subject.task_ids)
    if text_model.routes_by_task and not known:
        raise UserError(f"{plan.subject.name} routes by task and does not name its tasks; give the run's folder")
    if isinstance(plan.subject.adapter_config, MoreConfig):
        model.add_task(plan.task.name, 0)
        model.train_task(plan.task.name if arguments.train == EMBEDDING else None)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"nothing of {plan.subject.name} can be trained further; transfer another run")
    engine = start(model, plan.config, plan.ds_config, ranks)
    return FewShot(TextModel(engine, text_model.encoder), ranks, plan.config, plan.sizes, plan.task.name, known)


def _learn(arguments: argparse.Namespace, plan: _Plan, few_shot: FewShot, shots: int, seed: int) -> Draw:
    """One draw: start, score, train, score, and write."""
    examples = plan.draws[shots, seed]
    init_from, votes = few_shot.begin(examples, arguments.init_from)
    untrained = _score(plan, few_shot)
    losses = few_shot.train(examples, seed)
    draw = Draw(shots, seed, init_from, votes, losses, untrained, _score(plan, few_shot))
    name = f"shots-{shots:04d}-seed-{seed}"
    if arguments.save_adapters:
        checkpoint.save_adapter(plan.output / "adapters" / name, few_shot.engine)
    if few_shot.ranks.rank == 0:
        write_file(plan.output / "draws" / f"{name}.json", to_json(asdict(draw)))
    primary = plan.task.primary
    log.say(
        f"{shots} shots, seed {seed}: {f'started as {init_from}, ' if init_from else ''}loss {losses[0]:.3f} to "
        f"{losses[-1]:.3f}, "
        f"{primary} {untrained[primary]:.2f} to {draw.metrics[primary]:.2f}"
    )
    return draw


def _score(plan: _Plan, few_shot: FewShot) -> dict[str, float]:
    name = plan.task.name
    [result] = evaluate(
        few_shot.text_model, [plan.task], {name: plan.test}, task_ids={name: few_shot.task_id},
        batch_size=plan.config.per_device_eval_batch_size, split="", label=None,
    )  # fmt: skip
    return result.metrics


def _write(plan: _Plan, draws: Sequence[Draw], settings: dict[str, Any]) -> None:
    content = {
        "format": 1,
        "task": plan.task.name,
        "metric": plan.task.primary,
        "adapter": str(plan.subject.adapter or plan.subject.base),
        "settings": settings,
        "examples": len(plan.test),
        "majority": plan.majority,
        "summary": summary(draws, plan.task.primary),
        "draws": [asdict(draw) for draw in draws],
        "versions": versions(),
    }
    write_file(plan.output / "results.json", to_json(content))


def _table(plan: _Plan, draws: Sequence[Draw]) -> str:
    primary = plan.task.primary
    rows = [[plan.task.name, primary, "majority", None, plan.majority[primary], None, None, None]]
    for row in summary(draws, primary):
        rows.append(
            [
                plan.task.name,
                primary,
                str(row["shots"]),
                *(row[key] for key in ("draws", "mean", "deviation", "lowest", "highest")),
            ]
        )
    return log.table(["task", "metric", "shots", "draws", "mean", "+/-", "lowest", "highest"], rows)


if __name__ == "__main__":
    sys.exit(main())
