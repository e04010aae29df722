"""Every method in the loop over a bfloat16 base model, as it is trained on a GPU: beside the same run in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from test_methods_peft import argv, place
from test_training import DS_CONFIGS, adapter, losses

from launch import train
from more_ds.methods import METHODS

__all__ = ["place"]

PROMPTS = ("prompt_tuning", "spot", "p_tuning", "mpt", "attempt", "prefix_tuning")
FAST = ("more", "mole", "xlora", "vera", "adalora", "poly", "attempt", "mpt")
"""Methods with buffers, or with parameters that do not train."""
CASES = [
    pytest.param(method, stage, marks=() if method in FAST and stage == 2 else pytest.mark.slow)
    for method, chosen in METHODS.items()
    for stage in (0, 2, 3)
    if method != "full" and not (stage == 3 and "zero3" in chosen.refuses)
]


def trained(place: Path, output: Path, method: str, *options: str) -> Path:
    given = [*options, *(["--adapter.num_virtual_tokens", "3"] if method in PROMPTS else [])]
    steps = ["--max_steps", "8" if method == "adalora" else "1"]
    arguments = argv(place, method, *given, *steps, "--output_dir", str(output))
    assert run_ranks(lambda _: train.main(arguments), 1) == [0]
    return output


@pytest.fixture(scope="module")
def sources(place: Path) -> dict[str, list[str]]:
    """Finished LoRAs and prompts: the options that name them."""
    found = {
        method: [
            str(trained(place, place / f"{method}-{i}", method, "--tasks", "copy", "--seed", str(i))) for i in "12"
        ]
        for method in ("lora", "prompt_tuning")
    }
    loras, prompts = (",".join(names) for names in found.values())
    return {
        "mole": ["--adapter.loras", loras], "xlora": ["--adapter.loras", loras],
        "attempt": ["--adapter.sources", prompts], "spot": ["--init_adapter", found["prompt_tuning"][0]],
    }  # fmt: skip


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_a_bfloat16_model_trains(
    place: Path, sources: dict[str, list[str]], tmp_path: Path, method: str, stage: int
) -> None:
    ds_config = DS_CONFIGS / "zero2.json"
    if stage != 2:
        ds_config = tmp_path / "ds_config.json"
        text = (DS_CONFIGS / "zero3.json").read_text() if stage == 3 else '{"zero_optimization": {"stage": 0}}'
        ds_config.write_text(text)
    first = {}
    for dtype in ("fp32", "bf16"):
        options = [*sources.get(method, []), "--dtype", dtype, "--ds_config", str(ds_config)]
        first[dtype] = losses(trained(place, tmp_path / dtype, method, *options))[0]["loss"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.05)
    assert set(adapter(tmp_path / "bf16", "best")) == set(adapter(tmp_path / "fp32", "best"))
