"""Exports of adapters that were trained on a 4-bit or 8-bit base, from a real model (20 s)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from more_ds import MoreConfig
from more_ds.config import RunConfig
from more_ds.errors import UserError
from more_ds.export.job import Request, export
from more_ds.loading import find_subject
from more_ds.model import load_base, read_model_config

IDS = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone(models_dir: Path) -> str:
    """Kept in bfloat16."""
    return str(models_dir / "llama-6m")


def quantised(backbone: str, bits: str) -> Any:
    return load_base(backbone, read_model_config(backbone), dtype="fp32", quantization=bits)


def write_run(folder: Path, backbone: str, bits: str) -> Path:
    """A run's folder as far as an export reads it; its adapter does something."""
    torch.manual_seed(0)
    config = MoreConfig(
        r=4, num_tasks=2, task_names=["rte", "sst2"], init_weights=False, lora_alpha=4, task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    model = get_peft_model(quantised(backbone, bits), config)
    model.save_pretrained(str(folder / "best"))
    run = RunConfig(model=backbone, quantization=bits, suite=["glue"], tasks=["rte", "sst2"])  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(asdict(run)))
    return folder


def as_trained(run: Path, backbone: str, bits: str, task: int) -> Tensor:
    model = PeftModel.from_pretrained(quantised(backbone, bits), str(run / "best")).eval()
    with torch.no_grad():
        return model(input_ids=IDS, task_ids=torch.tensor([task, task])).logits


def run_export(run: Path, form: Any, output: Path, **options: Any) -> dict[str, dict[str, Any]]:
    rows = export(Request(find_subject(str(run)), form, (), output, **options))
    return {row["task"]: row for row in rows}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    assert getattr(model.config, "quantization_config", None) is None
    return model(input_ids=IDS).logits


def test_a_merged_4_bit_base_computes_what_the_run_did(backbone: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", backbone, "4bit")
    rows = run_export(run, "merged", tmp_path / "seen", quantized="dequantize", dtype="fp32")
    exact = as_trained(run, backbone, "4bit", 1)
    assert rows["sst2"]["difference"] < 1e-5
    torch.testing.assert_close(logits(tmp_path / "seen" / "sst2"), exact, rtol=1e-4, atol=1e-4)

    rows = run_export(run, "merged", tmp_path / "made", quantized="original", dtype="fp32")
    assert rows["sst2"]["difference"] < 1e-5  # from the adapter on the weights as they were made
    assert (logits(tmp_path / "made" / "sst2") - exact).abs().max() > 0.05

    rows = run_export(run, "merged", tmp_path / "narrow", quantized="dequantize")
    assert {t.dtype for t in load_file(tmp_path / "narrow" / "rte" / "model.safetensors").values()} == {torch.bfloat16}
    assert 1e-4 < rows["rte"]["difference"] < 0.05


def test_an_8_bit_base_rounds_activations_which_no_weights_do(backbone: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", backbone, "8bit")
    for form in ("lora", "adapter"):
        assert all(row["difference"] < 1e-5 for row in run_export(run, form, tmp_path / form).values())
    rows = run_export(run, "merged", tmp_path / "seen", quantized="dequantize", dtype="fp32")
    exact = as_trained(run, backbone, "8bit", 0)
    found = logits(tmp_path / "seen" / "rte")
    assert 1e-4 < rows["rte"]["difference"] < 0.1
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("bits", "words"), [("4bit", "the same scores"), ("8bit", "round the activations too")])
def test_which_weights_to_merge_into_must_be_said(bits: str, words: str, backbone: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", backbone, bits)
    with pytest.raises(UserError, match=words):
        run_export(run, "merged", tmp_path / "out")
