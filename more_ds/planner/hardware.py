"""What is known without a download or a GPU: data sheets of GPUs, and shapes of models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from more_ds.errors import UserError, suggest
from more_ds.model import read_model_config
from more_ds.planner.timing import Links, Speed

FOLDER = Path(__file__).parent

GEMM_SHARE = 0.65
"""Share of the data sheet's arithmetic that large matrix products reach; an assumption. cuBLAS reaches 70 to 80 % on an
A100 or H100 for the largest, less where tokens are few."""

BANDWIDTH_SHARE = 0.8
"""Share of the data sheet's bandwidth that elementwise kernels reach; an assumption."""

KERNEL_SECONDS = 2e-6
"""What the smallest kernel takes on a GPU; an assumption."""

LAUNCH_SECONDS = 6e-6
"""What PyTorch needs on the host to start one in eager mode; an assumption."""

LINK_SHARE = 0.75
"""Share of a link's rate that NCCL's collectives reach; an assumption."""

ASSUMPTIONS = (
    f"products at {GEMM_SHARE:.0%} of the data sheet, memory at {BANDWIDTH_SHARE:.0%}, links at {LINK_SHARE:.0%}, "
    f"{LAUNCH_SECONDS * 1e6:.0f} us a launch"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: as `--gpu` takes it.
        tflops: 10^12 dense bfloat16 operations per second.
        memory: GB of 10^9 bytes.
        bandwidth: GB per second.
        watts: board power.
        per_node: GPUs of a usual node.
        inside: GB per second to a GPU of the same node, one way.
        between: GB per second to one of another node, one way.
        source: where the numbers are from.
    """

    name: str
    tflops: float
    memory: float
    bandwidth: float
    watts: float
    per_node: int
    inside: float
    between: float
    source: str

    @property
    def speed(self) -> Speed:
        """What it reaches."""
        return Speed(
            self.tflops * 1e12 * GEMM_SHARE, self.bandwidth * 1e9 * BANDWIDTH_SHARE, KERNEL_SECONDS, LAUNCH_SECONDS
        )

    def links(self, per_node: int) -> Links:
        """How GPUs of this kind are joined, `per_node` on a node."""
        return Links(per_node, self.inside * 1e9 * LINK_SHARE, self.between * 1e9 * LINK_SHARE)


def gpus() -> dict[str, Gpu]:
    """All GPUs with a known data sheet, by name."""
    return {name: Gpu(name=name, **values) for name, values in _read("hardware.yaml").items()}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: there is no such data sheet here; the nearest name is suggested.
    """
    known = gpus()
    if name not in known:
        raise UserError(f"unknown --gpu '{name}'{suggest(name, known)}")
    return known[name]


def gpu_like(device: str, memory_gb: float) -> Gpu | None:
    """The GPU whose data sheet belongs to a device.

    Args:
        device: its name, as CUDA says it, e.g. `NVIDIA A100-SXM4-80GB`.
        memory_gb: its memory in GB of 10^9 bytes, which tells its forms apart.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    for name, gpu in gpus().items():
        kind = [word for word in name.split("-") if not word.endswith("gb")]
        if words.issuperset(kind) and abs(gpu.memory / memory_gb - 1) < 0.15:
            return gpu
    return None


def shapes() -> dict[str, dict[str, Any]]:
    """Published number of parameters and configuration of the models that are known offline, by hub id."""
    return _read("models.yaml")


def training_rows() -> dict[str, int]:
    """Training rows of the public data sets, by task."""
    return _read("rows.yaml")


def model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's Hugging Face configuration: from here if the shape is known, else from its folder or the hub.

    Raises:
        UserError: neither knows it.
    """
    known = shapes()
    if name in known:
        return AutoConfig.for_model(**known[name]["config"])
    try:
        return read_model_config(name, revision=revision, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}; shapes known offline: {', '.join(known)}") from error


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return content
