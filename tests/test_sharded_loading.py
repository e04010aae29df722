"""Under ZeRO-3 weights are read shard by shard: no rank has the model in its memory, and one of them alone the file."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from more_ds.config import RunConfig
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, shard_while_loading
from more_ds.model import load_base, read_model_config

MB = 1_000_000
M_MMAP_THRESHOLD = -3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 MB in five files, whose largest parameter has 4 MB."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20MB")
    assert len(list(path.glob("*.safetensors"))) > 4
    return path


def load(ranks: Ranks, folder: Path, ds_path: str) -> dict[str, Any]:
    """What of a rank's memory loading takes, in bytes: its own and that of mapped files, at the most."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 100_000)  # what is freed goes back to the system
    config = RunConfig(train_batch_size=ranks.world)
    ds_config = resolve(ds_path, config, batch_sizes(config, ranks.world), "bf16")
    base, most, done = resident(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            for name, value in resident().items():
                most[name] = max(most[name], value - base[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    sharding = shard_while_loading(ds_config)
    model = load_base(str(folder), read_model_config(str(folder)), dtype="bf16")
    done.set()
    watcher.join()
    del sharding
    return most | {"held": sum(p.ds_tensor.numel() * 2 for p in model.parameters())}  # type: ignore[attr-defined]


def resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: 1024 * int(line.split()[1]) for line in lines for name in ("RssAnon", "RssFile") if name in line}


def test_a_rank_holds_its_part_and_one_parameter(folder: Path) -> None:
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = run_ranks(load, 2, folder, str(Path(__file__).parents[1] / "ds_configs" / "zero3.json"))
    for one in found:
        assert one["held"] == pytest.approx(weights / 2, rel=0.01)
        assert one["RssAnon"] < one["held"] + 25 * MB < weights
    assert found[1]["RssFile"] < 20 * MB, "the other rank reads the file too"
