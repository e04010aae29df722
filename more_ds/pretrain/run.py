"""A pretraining run: its parts, its loop, and the model that comes out."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from more_ds import checkpoint, log
from more_ds.checkpoint_files import newest_complete, newest_sound, write_file
from more_ds.collective import on_rank_zero
from more_ds.config import RunConfig
from more_ds.ds_config import BatchSizes, batch_sizes, resolve
from more_ds.engine import Ranks, learning_rate, set_learning_rate, start, step
from more_ds.errors import TrainingError, UserError
from more_ds.model import DTYPES, auto_class, load_base, load_tokenizer, read_model_config
from more_ds.plan_checks import check_sharding
from more_ds.pretrain.corpus import BlockOrder, Blocks, pack, read_documents, split_documents
from more_ds.pretrain.objective import Objective
from more_ds.pretrain.shapes import Sizes, llama, t5
from more_ds.pretrain.tokenizer import train_sentencepiece
from more_ds.stopping import Stop

SENTINELS = 100
HELD_OUT_BLOCKS = 256
"""Most blocks of the held-out texts that are scored."""
TOKENIZER_TEXTS = 200_000
"""Most texts that a tokeniser is trained on."""
NOT_DECISIVE = ("output_dir", "per_device_train_batch_size", "save_steps")
"""Keys of `Settings` that a resumed run may change."""
LOGGING_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `launch/pretrain.py` was told; see its help."""

    texts: tuple[str, ...]
    output_dir: str
    column: str = "text"
    objective: str = "causal"
    from_model: str | None = None
    config: str | None = None
    hidden_size: int = 256
    intermediate_size: int | None = None
    layers: int = 6
    heads: int = 4
    tokenizer: str | None = None
    vocab_size: int = 4096
    length: int = 256
    max_steps: int = 1000
    train_batch_size: int = 32
    per_device_train_batch_size: int | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    dtype: str | None = None
    seed: int = 0
    save_steps: int = 200

    def decisive(self) -> dict[str, Any]:
        """What decides the bytes of the result, as plain JSON."""
        kept = {key: value for key, value in asdict(self).items() if key not in NOT_DECISIVE}
        return {**kept, "texts": list(self.texts)}


@dataclass(frozen=True)
class Pretraining:
    """A run under way."""

    settings: Settings
    config: RunConfig
    sizes: BatchSizes
    ranks: Ranks
    engine: Any
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    blocks: Blocks
    held_out: Blocks
    order: BlockOrder
    folder: Path


def prepare(settings: Settings, ranks: Ranks, ds_config_path: str | None) -> Pretraining:
    """Read the texts, make tokeniser and model, and shard it. Collective.

    Raises:
        UserError: a file, a model or a configuration is not as it must be.
    """
    folder = Path(settings.output_dir)
    dtype = settings.dtype or ("bf16" if ranks.on_gpu else "fp32")
    config = RunConfig(
        train_batch_size=settings.train_batch_size, learning_rate=settings.learning_rate, seed=settings.seed,
        per_device_train_batch_size=settings.per_device_train_batch_size, max_steps=settings.max_steps,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, lr_scheduler_type="cosine",
    )  # fmt: skip
    sizes = batch_sizes(config, ranks.world)
    ds_config = resolve(ds_config_path, config, sizes, dtype, per_node=ranks.per_node)
    check_sharding(ds_config, ranks.on_gpu)
    texts, held = split_documents(list(read_documents([Path(text) for text in settings.texts], settings.column)))
    on_rank_zero(lambda: _begin(settings, folder, texts), ranks.device, f"{folder} cannot be written")
    tokenizer = load_tokenizer(_tokenizer_folder(settings, folder))
    objective = Objective(tokenizer, settings.objective == "spans", seed=settings.seed)
    blocks, held_out = (pack(part, tokenizer, settings.length) for part in (texts, held))
    torch.manual_seed(settings.seed)
    model = _model(settings, tokenizer, dtype).requires_grad_(True)
    ranks.spare_threads(settings.hidden_size)
    parameters = sum(p.numel() for p in model.parameters())
    log.say(
        f"{model.config.model_type}, {parameters:,} parameters, {dtype}; {len(blocks):,} blocks of {settings.length} "
        f"tokens, {len(held_out):,} held out; {settings.max_steps:,} steps of {sizes.total} blocks "
        f"({settings.max_steps * sizes.total / len(blocks):.2f} passes); output {folder}"
    )
    engine = start(model, config, ds_config, ranks)
    order = BlockOrder(len(blocks), sizes.total, settings.seed)
    return Pretraining(
        settings, config, sizes, ranks, engine, tokenizer, objective, blocks, held_out[:HELD_OUT_BLOCKS], order, folder
    )


def train(run: Pretraining, stop: Stop, *, resume: bool) -> None:
    """Train to the last step, print the held-out loss, and write `model`. Collective.

    Raises:
        PreemptedError: a rank was asked to stop; everything is saved.
        TrainingError: a loss is not finite.
    """
    done = _resumed(run) if resume else 0
    settings, total = run.settings, run.settings.max_steps
    losses: list[Tensor] = []
    run.engine.train()
    with log.Progress(total, "pretraining", initial=done) as bar:
        while done < total:
            losses.append(_take_step(run, done, stop))
            done += 1
            stops, saves = stop.agreed(), done % settings.save_steps == 0 or done == total
            if stops or saves or done % LOGGING_STEPS == 0:
                _log(run, {"step": done, "loss": _mean(losses, done)})
                losses = []
            if saves:
                log.say(f"step {done}: held-out loss {_held_out_loss(run, done):.4f} nats per token")
            if stops or saves:
                began = time.monotonic()
                checkpoint.save(run.folder / "checkpoints", run.engine, done, {"settings": settings.decisive()})
                stop.saved(time.monotonic() - began)
            if stops:
                raise stop.error()
            bar.advance()
    _write_model(run)


def _take_step(run: Pretraining, number: int, stop: Stop) -> Tensor:
    """One optimizer step; returns the mean loss over the labels of all ranks."""
    sizes, ranks = run.sizes, run.ranks
    blocks = run.order.step(number)
    parts = [blocks[i * sizes.micro : (i + 1) * sizes.micro] for i in range(sizes.world * sizes.accumulation)]
    own = [
        run.objective.batch(run.blocks, parts[i * sizes.world + ranks.rank], number) for i in range(sizes.accumulation)
    ]
    counted = [sum(map(run.objective.labels, own)), stop.reason() is not None]
    labels, asked = ranks.sum(torch.tensor(counted, dtype=torch.float64))
    stop.hear(asked)
    set_learning_rate(run.engine, learning_rate(run.config, number, run.settings.max_steps))
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(own):
        torch.manual_seed(((run.settings.seed * 1_000_003 + number) * 65_537 + i * sizes.world + ranks.rank) % 2**63)
        nll = _nll(run, batch)
        run.engine.backward(nll * (sizes.world * sizes.accumulation / labels.float()))
        step(run.engine)
        total += nll.detach()
    return ranks.sum(total) / labels


def _nll(run: Pretraining, batch: dict[str, Tensor]) -> Tensor:
    tensors = {name: tensor.to(run.ranks.device) for name, tensor in batch.items()}
    inputs = tensors if run.objective.gaps else {"input_ids": tensors["input_ids"]}
    return run.objective.nll(run.engine(**inputs, use_cache=False).logits, tensors)


@torch.no_grad()
def _held_out_loss(run: Pretraining, done: int) -> float:
    """Mean over the labels of the held-out blocks, in nats; logged too. Every rank computes all of it."""
    run.engine.eval()
    total, labels = 0.0, 0
    for begin in range(0, len(run.held_out), run.sizes.micro):
        batch = run.objective.batch(run.held_out, range(begin, min(begin + run.sizes.micro, len(run.held_out))), -1)
        total += float(_nll(run, batch))
        labels += run.objective.labels(batch)
    run.engine.train()
    _log(run, {"step": done, "held_out_loss": total / labels})
    return total / labels


def _resumed(run: Pretraining) -> int:
    """Steps that are done: of the newest sound checkpoint, if there is any."""
    folder = run.folder / "checkpoints"
    if newest_complete(folder) is None:
        return 0
    name = on_rank_zero(lambda: newest_sound(folder).name, run.ranks.device, f"{folder} cannot be read")
    checkpoint.load(folder / name, run.engine)
    done = int(run.engine.global_steps)
    log.say(f"resumed from {folder / name}, step {done}")
    if run.ranks.rank == 0:
        rows = [
            json.loads(line) for line in _metrics(run).read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= done]
        write_file(_metrics(run), "".join(kept).encode())
    return done


def _mean(losses: list[Tensor], done: int) -> float:
    value = float(torch.stack(losses).mean())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is not finite by step {done}; the last checkpoint is as it was; lower learning_rate"
        )
    return value


def _write_model(run: Pretraining) -> None:
    """Write the master values as a Hugging Face folder, in the run's number format."""
    tensors = checkpoint.adapter_tensors(run.engine)
    model: Any = run.engine.module
    folder = run.folder / "model"

    def write() -> None:
        model.save_pretrained(folder, state_dict={name: t.to(model.dtype) for name, t in tensors.items()})
        run.tokenizer.save_pretrained(folder)

    on_rank_zero(write, run.ranks.device, f"{folder} was not written")
    log.say(f"written to {folder}; python launch/train.py --model {folder} ... starts from it")


def _begin(settings: Settings, folder: Path, texts: list[str]) -> None:
    """Write the settings, and train a tokeniser where none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "settings.json", (json.dumps(settings.decisive(), indent=2) + "\n").encode())
    own = folder / "tokenizer"
    if settings.from_model or settings.tokenizer or (own / "tokenizer_config.json").is_file():
        return
    own.mkdir(exist_ok=True)
    try:
        train_sentencepiece(
            "t5" if settings.objective == "spans" else "llama", texts[:TOKENIZER_TEXTS], own,
            vocab_size=settings.vocab_size, sentinels=SENTINELS, max_length=max(512, settings.length),
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"--vocab_size {settings.vocab_size} does not fit these texts: {error}") from error


def _tokenizer_folder(settings: Settings, folder: Path) -> str:
    return settings.from_model or settings.tokenizer or str(folder / "tokenizer")


def _model(settings: Settings, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Any:
    """The model to train.

    Raises:
        UserError: it is not of the objective's kind.
    """
    source = settings.from_model or settings.config
    if source is None:
        inner = settings.intermediate_size or 4 * settings.hidden_size
        sizes = Sizes(settings.hidden_size, inner, settings.layers, settings.heads, max(512, settings.length))
        fresh: Any = (t5 if settings.objective == "spans" else llama)(tokenizer, sizes)
        return fresh.to(DTYPES[dtype])
    config = read_model_config(source)
    if bool(config.is_encoder_decoder) != (settings.objective == "spans"):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a causal"
        raise UserError(
            f"{source} is {kind} model; use --objective {'spans' if config.is_encoder_decoder else 'causal'}"
        )
    if settings.from_model:
        return load_base(settings.from_model, config, dtype=dtype)
    config.vocab_size = len(tokenizer)
    return auto_class(config).from_config(config).to(DTYPES[dtype])


def _metrics(run: Pretraining) -> Path:
    return run.folder / "metrics.jsonl"


def _log(run: Pretraining, row: dict[str, Any]) -> None:
    if run.ranks.rank == 0:
        with _metrics(run).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
