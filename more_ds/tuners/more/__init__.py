"""MoRE: a mixture of low-rank experts, as a PEFT tuner.

One LoRA pair per linear map; every rank of it is an expert; a task embedding and a gate choose how many ranks a task
uses. For an adapted map with frozen weight W0 (m x d), input x and task t of T:

    p   = softmax(W_g e_t + b_g)                      (r,) in float32
    r_t = argmax p, counted from 1
    s   = p + sg(onehot(r_t) - p)                     straight-through
    v_j = s[r_t] * c(r_t) * 1[j <= r_t]               (r,) c(r_t) = r_t / T
    y   = W0 x + (alpha / r) * B ((A dropout(x)) * v)

Source: "MoRE: A Mixture of Low-Rank Experts for Adaptive Multi-Task Learning", equations 2 to 6, 8 and 10, and its
published code. What differs from that code:
- the gate is trained (there, the task-to-rank map is fixed from random weights at the first forward);
- v multiplies the rank side instead of slicing A and B: the same values and gradients, one static shape, no host
  synchronisation, and a task per example instead of one per batch;
- the task-to-rank table is in the checkpoint and is what evaluation uses;
- the adapter merges exactly, for a chosen task;
- equation 8 is used with the minus sign; embeddings narrower than the input are compared with a fixed random
  projection of it.
Experts whose weights are stacked in one module have an A and a B each, and share the gate (`stacked.py`).
Where paper and code disagree, `MoreConfig` has a switch whose default is the paper's.
"""

from __future__ import annotations

from more_ds.tuners.base import register
from more_ds.tuners.more.config import MoreConfig
from more_ds.tuners.more.experts import expert_table
from more_ds.tuners.more.layer import MoreLinear
from more_ds.tuners.more.model import MoreModel

register("more", MoreConfig, MoreModel)

__all__ = ["MoreConfig", "MoreLinear", "MoreModel", "expert_table"]
