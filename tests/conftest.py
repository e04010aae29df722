"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are tested on the CPU

import pytest
import torch

from more_ds.log import quiet_libraries

quiet_libraries()
torch.set_num_threads(1)


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder")
    return Path(value)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real benchmark data (`MORE_DS_DATA`)."""
    return _folder("MORE_DS_DATA")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder with small real checkpoints (`MORE_DS_MODELS`)."""
    return _folder("MORE_DS_MODELS")


@pytest.fixture
def quantised_gathers(tmp_path: Path) -> Path:
    """A DeepSpeed configuration whose weights are gathered in 8 bits, which a CPU cannot do."""
    path = tmp_path / "quantised_gathers.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}))
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
