"""Whether a model keeps the examples of one row apart."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from more_ds.errors import UserError
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel


def check_one_row(text_model: TextModel, examples: Sequence[Example]) -> None:
    """Refuse a model in which an example of a flat micro-batch sees the ones before it.

    Models of transformers learn from positions that begin again where an example ends. One that takes no positions,
    that makes its mask in a way of its own, or that has a state, would train on wrong contexts without a word.

    Args:
        text_model: all ranks call this together.
        examples: the last is compared, with and without the others before it.

    Raises:
        UserError: its answer is another one behind them.
    """
    why = "takes no positions"
    if text_model.takes_positions:
        collator = replace(text_model.collator, flat=True)
        encoder = copy(text_model.encoder)  # which counts what it cuts
        prompts = encoder.prompts([example.prompt for example in examples])
        targets = encoder.targets([example.target for example in examples])
        with text_model.evaluating():
            alone, behind = (
                text_model.label_logits(text_model.to_device(collator.answers(prompts[i:], targets[i:], [0]))).float()
                for i in (len(examples) - 1, 0)
            )
        difference = (behind[:, -alone.shape[1] :] - alone).abs().max() / alone.abs().max()
        if difference < 0.05:  # what bfloat16 rounds
            return
        why = f"lets examples of one row see each other (logits differ by {difference:.0%})"
    name = type(text_model.base).__name__
    raise UserError(f"padding_free: {name} {why}; use --group_by_length true, which pads almost nothing")
