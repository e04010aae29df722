"""Full fine-tuning: every parameter of the base model is trained, and nothing is added to it.

What comes out is a model and no adapter: an ordinary Hugging Face folder. Every rank needs its share of a gradient, a
float32 master value and two moments of each parameter (16 bytes in bfloat16), and rank 0 holds whole float32 tensors
while it writes a checkpoint. A quantised base cannot be trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig


@dataclass
class FullConfig(PeftConfig):
    """The place of an adapter's configuration, where there is no adapter. It has no options."""
