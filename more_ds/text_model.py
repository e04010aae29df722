"""A model with its tokeniser's conventions: how a batch runs through it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, MultitaskPromptTuningConfig, PeftModel, PolyConfig
from torch import Tensor, nn

from more_ds.data.collate import Batch, Collator, positions
from more_ds.data.encoding import Encoder
from more_ds.losses import label_nll
from more_ds.tuners.adalora import orthogonality

if TYPE_CHECKING:
    from more_ds.distillation import Distillation


class TextModel:
    """A model, its tokeniser's conventions and its batches, behind one way to call them.

    Attributes:
        module: what is called: the (PEFT) model, or the DeepSpeed engine around it.
        encoder: text to token ids.
        collator: token ids to tensors.
        takes_cache: whether earlier tokens are known by their keys and values alone.
        distillation: teachers, whose loss is added in training; None: there are none.
    """

    def __init__(self, module: nn.Module, encoder: Encoder) -> None:
        """Read from the model which arguments it takes."""
        self.module, self.encoder = module, encoder
        base: Any = self.peft.get_base_model() if isinstance(self.peft, PeftModel) else self.peft
        self.config = base.config
        self.base = base
        self.is_encoder_decoder = encoder.is_encoder_decoder
        start = getattr(self.config, "decoder_start_token_id", None)
        self.collator = Collator(encoder.pad_id, start if self.is_encoder_decoder else None)
        accepted = inspect.signature(base.forward).parameters
        self.decoder_keys = ["decoder_input_ids", "decoder_attention_mask"]
        self.takes_positions = "position_ids" in accepted and not self.is_encoder_decoder
        self.keeps_logits = "logits_to_keep" in accepted
        if self.keeps_logits and (head := base.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_fold_rows)
        adapter = self.peft.active_peft_config if isinstance(self.peft, PeftModel) else None
        self.trains_prompt = adapter is not None and adapter.is_prompt_learning
        if self.trains_prompt and self.takes_positions:
            base.register_forward_pre_hook(_count_positions, with_kwargs=True)
        if isinstance(adapter, MultitaskPromptTuningConfig):
            self.decoder_keys = ["labels"]  # PEFT drops the decoder's inputs; the model makes them of the labels
        # PEFT's Poly and MPT take task ids too, and nothing else of ours.
        tuner = getattr(self.peft, "base_model", None)
        routes = bool(getattr(tuner, "routes_by_task", False))
        self.pools = routes or bool(getattr(tuner, "pools_prompts", False))
        self.takes_cache = bool(getattr(tuner, "takes_cache", True))
        self.distillation: Distillation | None = None
        self.routes_by_task = routes or isinstance(adapter, (PolyConfig, MultitaskPromptTuningConfig))

    @property
    def peft(self) -> nn.Module:
        """The model inside of a DeepSpeed engine, or the model itself."""
        inner = getattr(self.module, "module", None)
        return inner if isinstance(inner, nn.Module) else self.module

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return next(self.peft.parameters()).device

    @property
    def is_partitioned(self) -> bool:
        """Whether the parameters are spread over the ranks (ZeRO-3), so that no rank can run a pass alone."""
        return any(hasattr(parameter, "ds_numel") for parameter in self.peft.parameters())

    @property
    def in_step(self) -> bool:
        """Whether all ranks must take the same number of forward passes."""
        return dist.is_initialized() and dist.get_world_size() > 1 and self.is_partitioned

    def to_device(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        return {key: value.to(self.device) for key, value in batch.items()}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and dropout; the training mode comes back afterwards."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def auxiliary_loss(self) -> Tensor | None:
        """The method's own loss of the last forward pass in training, weighted; None if it has none."""
        if isinstance(self.peft, PeftModel) and isinstance(self.peft.active_peft_config, AdaLoraConfig):
            return orthogonality(self.peft) if self.peft.training else None
        return getattr(getattr(self.peft, "base_model", None), "auxiliary_loss", None)

    def label_logits(self, batch: Batch) -> Tensor:
        """Logits that predict `batch["labels"]`, (batch, answer length, vocabulary).

        The vocabulary is projected for the answer alone where the model can do that.
        """
        length = batch["labels"].shape[1]
        if self.is_encoder_decoder:
            keys = ["input_ids", "attention_mask", *self.decoder_keys]
            return self.module(**{key: batch[key] for key in keys}, **self.extras(batch), use_cache=False).logits
        if "label_positions" in batch:
            return self._flat_logits(batch)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | self.extras(batch)
        if self.takes_positions and not self.trains_prompt:
            inputs["position_ids"] = positions(batch["attention_mask"])
        kept = {"logits_to_keep": length + 1} if self.keeps_logits else {}
        logits = self.module(**inputs, **kept, use_cache=False).logits
        return logits[:, -length - 1 : -1]

    def _flat_logits(self, batch: Batch) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")} | self.extras(batch)
        if self.keeps_logits:
            logits: Tensor = self.module(**inputs, logits_to_keep=batch["label_positions"], use_cache=False).logits
            return logits
        return self.module(**inputs, use_cache=False).logits[:, batch["label_positions"]]

    def training_loss(self, batch: Batch, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of a micro-batch whose tokens are `weight` of the step's each.

        Args:
            batch: with labels.
            weight: scalar that the sum over the label tokens is multiplied by. DeepSpeed averages over ranks and
                accumulation steps: their number over the step's label tokens makes the loss the mean over all of them.

        Returns:
            The loss to go backward from, the sum over the label tokens in nats, and the method's own part, weighted;
            None if it has none.
        """
        logits = self.label_logits(batch)
        nll, _ = label_nll(logits, batch["labels"])
        total, auxiliary = nll.sum(), self.auxiliary_loss()
        if self.distillation is not None:
            auxiliary = self.distillation.loss(logits, batch)
        loss = total * weight
        return loss if auxiliary is None else loss + auxiliary, total, auxiliary

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """What a method that routes by task or reads the prompt is told beside the base model's own inputs."""
        keys = [*["task_ids"] * self.routes_by_task, *["prompt_mask"] * self.pools]
        return {key: batch[key] for key in keys if key in batch}


def _fold_rows(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a frozen head rows that one product takes.

    What `logits_to_keep` leaves of the rows is a view with gaps, for which torch copies the head's matrix once a row:
    (batch, vocabulary, width), gigabytes for a real vocabulary.
    """
    return args[0].contiguous(), *args[1:]


def _count_positions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count positions over the real tokens, where PEFT has put trained rows before the padding of a causal batch.

    It passes no positions; the distance from the trained rows to the text would depend on the longest row of the batch.
    """
    mask = kwargs.get("attention_mask")
    tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs["position_ids"] = positions(mask)[:, -tokens.shape[1] :]
    return args, kwargs
