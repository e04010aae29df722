"""Train one model on many tasks.

    deepspeed launch/train.py --ds_config ds_configs/zero2.json
    deepspeed --num_gpus 4 launch/train.py --ds_config ds_configs/zero3.json --recipe llama2_7b_glue --model FOLDER

Without a recipe the embedded demo is trained. A recipe is a YAML file, or the name of one in launch/recipes; flags
override it. --dry_run prints the plan and stops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from more_ds import checkpoint, cli, log, memory_use, plan, report
from more_ds.agreement import check_ranks, fingerprint
from more_ds.checkpoint_files import read_state
from more_ds.config import read_recipe
from more_ds.data.mixture import MicroBatch
from more_ds.distillation import Distillation
from more_ds.ds_config import with_monitors
from more_ds.engine import Ranks, in_touch, learning_rate, set_learning_rate, shard_while_loading, start, step
from more_ds.errors import NonFiniteError, PreemptedError, UserError
from more_ds.ledger import Ledger
from more_ds.loading import start_from
from more_ds.method_table import LIST, method_table
from more_ds.model import attach, load_base
from more_ds.padding_free import check_one_row
from more_ds.rendezvous import from_slurm
from more_ds.run import Run
from more_ds.run_folder import RunFolder, default_path
from more_ds.stopping import Signals, Stop
from more_ds.text_model import TextModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    from_slurm()
    parser = cli.config_parser(
        __doc__ or "", "[deepspeed] launch/train.py [--recipe NAME] [--ds_config FILE] [--KEY VALUE ...]"
    )
    parser.add_argument("--recipe", default="demo", help="recipe: a YAML file, or a name in launch/recipes")
    parser.add_argument("--ds_config", help="DeepSpeed configuration; default: ZeRO-0")
    parser.add_argument("--resume", default="none", help="none, auto (the newest checkpoint), or a checkpoint's folder")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not needed")
    with Signals() as signals:
        return cli.run(lambda: train(*cli.parse(parser, sys.argv[1:] if argv is None else argv), signals))


def train(arguments: Any, flags: dict[str, Any], signals: Signals) -> None:
    """Check everything; then load, train, score and save."""
    recipe = read_recipe(arguments.recipe)
    if flags.get("method") == LIST:
        return log.say(method_table(recipe, flags, arguments.trust_remote_code))
    config = cli.merged(recipe, flags, f"recipe '{arguments.recipe}'")
    if arguments.resume == "auto" and config.output_dir is None:
        raise UserError("--resume auto looks for checkpoints in output_dir, and none is given; add --output_dir")
    ranks = Ranks()
    folder = RunFolder(Path(config.output_dir or default_path(arguments.recipe)))
    resumed = folder.find_checkpoint(arguments.resume)
    saved = read_state(resumed) if resumed else None
    the_plan = plan.make(
        config,
        ds_config_path=arguments.ds_config,
        world=ranks.world,
        on_gpu=ranks.on_gpu,
        per_node=ranks.per_node,
        group_size=saved["sampler"]["plan"]["group_size"] if saved else None,
        trust_remote_code=arguments.trust_remote_code,
    )
    ranks.spare_threads(the_plan.model_config.hidden_size)
    folder.check(the_plan.config, resume=arguments.resume != "none")
    if saved:
        folder.check_base(saved["base"], the_plan.config)
    log.say(report.header(the_plan, ranks, str(folder.path)) + "\n")
    log.say(report.sampling(the_plan) + "\n")
    if arguments.dry_run:
        return
    with in_touch():
        ranks.connect()
        check_ranks(ranks, fingerprint(the_plan, resumed))
        stop = Stop(signals, ranks, config.max_hours)
        run = begin(the_plan, ranks, RunFolder(ranks.agree(folder.path)), stop, arguments.trust_remote_code)
        if resumed and arguments.resume == "auto":
            run.resume_newest()
        elif resumed:
            run.resume(resumed)
        signals.is_training = True
        train_on(run)


def begin(the_plan: plan.Plan, ranks: Ranks, folder: RunFolder, stop: Stop, trust_remote_code: bool) -> Run:
    """Load the base model, attach the adapter, and shard both."""
    config = the_plan.config
    ds_config = with_monitors(the_plan.ds_config, config.report_to, folder.path / "monitors")
    if ranks.rank == 0:
        folder.create(config, ds_config, report.facts(the_plan, ranks))
        if "wandb" in config.report_to:  # which writes where it was started, unless it is told
            (folder.path / "monitors").mkdir(exist_ok=True)
            os.environ.setdefault("WANDB_DIR", str(folder.path / "monitors"))
    sharding = shard_while_loading(ds_config)
    base: Any = load_base(
        config.model,
        the_plan.model_config,
        dtype=the_plan.dtype,
        revision=config.revision,
        quantization=config.quantization,
        attn_implementation=config.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    torch.manual_seed(config.seed)
    model: Any = attach(base, the_plan.adapter)
    if config.init_adapter is not None:
        start_from(model, config.init_adapter)
    if the_plan.fill is not None:
        the_plan.fill(model)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = start(model, config, ds_config, ranks)
    del sharding
    text_model = TextModel(engine, the_plan.encoder)
    if the_plan.teachers is not None:
        text_model.distillation = Distillation(text_model, the_plan.teachers)
    if config.padding_free:
        check_one_row(text_model, [example for examples in the_plan.train for example in examples[:2]])
    run = Run(the_plan, ranks, folder, text_model, stop)
    checkpoint.adapter_tensors(engine)  # what could not be saved later is refused now
    memory = memory_use.by_rank(ranks, engine.module)
    held, kept = (memory_use.words(memory, kind) for kind in ("held", "parameters"))
    log.say(f"memory  {held} {memory_use.where()}, {kept} of it parameters\n")
    return run


def train_on(run: Run) -> None:
    """Train to the end and score the best adapter; save before a stop that was asked for.

    Raises:
        PreemptedError: a rank was to stop; everything is saved.
    """
    try:
        leave_out_bad_steps(run)
        run.finish()
    except PreemptedError:
        run.pause()
        raise
    finally:
        run.saving.settle()


def leave_out_bad_steps(run: Run) -> None:
    """Train, leaving out as many steps that are not finite as the run allows."""
    if run.progress.step == 0:
        run.begin()
        if run.plan.config.skip_nonfinite:
            run.save()  # there must be something to go back to
    while True:
        try:
            return loop(run)
        except NonFiniteError as error:
            run.leave_out(error)


def loop(run: Run) -> None:
    """Train until the last step, until the validation score has stopped rising, or until a rank is to stop.

    Raises:
        NonFiniteError: a loss or a gradient is not finite.
        PreemptedError: a rank is to stop; what has been trained is not saved yet.
    """
    config, total, state = run.plan.config, run.plan.total_steps, run.progress
    ledger = Ledger(run.plan.task_names, run.ranks)
    run.engine.train()
    with log.Progress(total, "training", initial=state.step) as bar:
        while True:
            if run.evaluation_is_due():
                run.validate()
                if state.step > 0:
                    run.save()
            if run.is_trained():
                return
            rate = learning_rate(config, state.step, total)
            set_learning_rate(run.engine, rate)
            norm = take_step(run, ledger)
            state.step += 1
            run.after_step(state.step)
            stops, evaluates = run.stop.agreed(), run.evaluation_is_due()
            saves = config.save_steps is not None and state.step % config.save_steps == 0
            note = ""
            if stops or evaluates or saves or state.step % config.logging_steps == 0:
                row = ledger.close()
                note = f"loss {row['loss_lm']:.3f}"
                memory = memory_use.by_rank(run.ranks, run.engine.module)
                row |= {"peak_memory_gb": max(memory["peak"]), "memory_gb": memory}
                run.log({"learning_rate": rate, "grad_norm": None if norm is None else float(norm), **row})
            bar.advance(1, note)
            if stops:
                raise run.stop.error()
            if saves and not evaluates:
                run.save()


def take_step(run: Run, ledger: Ledger) -> Tensor | None:
    """Take one optimizer step; returns the gradient's norm before clipping, or None if the step is to be left out.

    The loss is the mean over the label tokens of the whole global batch, however that is split over ranks and
    accumulation steps: DeepSpeed averages over both, so each micro-batch's sum is scaled by their number. A method's
    own loss is a mean over the examples of equal micro-batches, and needs no scaling.
    """
    sizes, number = run.plan.sizes, run.progress.step
    batches = run.mixture.micro_batches(number, rank=run.ranks.rank, world=sizes.world, accumulation=sizes.accumulation)
    counted = [sum(batch.label_tokens for batch in batches), run.stop.reason() is not None]
    tokens, asked = run.ranks.sum(torch.tensor(counted, dtype=torch.float32))
    run.stop.hear(asked)
    if number in run.progress.skipped:
        return None
    norm: Tensor | None = None
    for batch in batches:
        seed_micro_batch(run.plan.config.seed, number, batch)
        tensors = {name: tensor.to(run.ranks.device) for name, tensor in batch.tensors.items()}
        weight = sizes.world * sizes.accumulation / tokens
        loss, nll, auxiliary = run.text_model.training_loss(tensors, weight)
        run.engine.backward(loss)
        norm = step(run.engine)
        ledger.add(number, batch, nll, auxiliary)
    assert norm is not None, "a step ended without its last micro-batch"
    if run.plan.dtype == "fp16":  # whose overflows DeepSpeed leaves out itself
        ledger.watch_scale(number, run.engine.skipped_steps)
    else:
        ledger.add_norm(number, norm)
    return norm


def seed_micro_batch(seed: int, step: int, batch: MicroBatch) -> None:
    """Make dropout a function of (seed, step, slot), so that a resumed run needs no random state to go on alike."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + batch.slot) % 2**63)


if __name__ == "__main__":
    sys.exit(main())
