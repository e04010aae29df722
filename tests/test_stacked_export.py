"""Exports of adapters in stacked experts: what stock PEFT and transformers compute with them, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import moe
from oracle import scramble
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tokenizer

from more_ds import MoreConfig
from more_ds.errors import UserError
from more_ds.export import layout
from more_ds.export.factors import folded, read_adapter, unfolded
from more_ds.export.job import Request, export
from more_ds.loading import find_subject

NAMES = ["cola", "rte"]
KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
IDS = torch.tensor([[2, 40, 41, 60, 61, 9], [2, 50, 11, 12, 13, 14]])


def base_of(kind: str) -> Any:
    return moe(kind, vocab_size=VOCABULARY)


def write_adapter(folder: Path, kind: str, *, as_loaded: bool = False, **options: Any) -> Path:
    base_of(kind).save_pretrained(folder / "base", save_original_format=not as_loaded, max_shard_size="8kB")
    tokenizer(False).save_pretrained(folder / "base")
    config = {"r": 4, "num_tasks": 2, "task_names": NAMES, "target_modules": "attention+ffn", **options}
    model: Any = get_peft_model(base_of(kind), MoreConfig(**config, task_type="CAUSAL_LM"))
    scramble(model)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def request_for(folder: Path, form: Any, output: Path, **options: Any) -> Request:
    return Request(find_subject(str(folder)), form, (), output, **options)


@torch.no_grad()
def logits(model: Any, **extra: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, **extra).logits


@pytest.mark.parametrize("form", ["lora", "merged", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_computes_what_the_adapter_does(kind: str, form: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, kind)
    live = PeftModel.from_pretrained(base_of(kind), str(adapter))
    rows = export(request_for(adapter, form, tmp_path / "out", dtype="fp32" if form == "merged" else None))
    assert [row["task"] for row in rows] == NAMES
    for task, row in enumerate(rows):
        expected = logits(live, task_ids=torch.tensor([task, task]))
        folder = str(tmp_path / "out" / ("" if form == "adapter" else row["task"]))
        if form == "merged":
            found = logits(type(base_of(kind)).from_pretrained(folder))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                warnings.simplefilter("error", RuntimeWarning)
                model = PeftModel.from_pretrained(base_of(kind), folder)
            found = logits(model, **({"task_ids": torch.tensor([task, task])} if form == "adapter" else {}))
        scale = expected.abs().max()
        assert (found - expected).abs().max() / scale < 1e-4
        assert row["difference"] < 1e-4
        assert (found - logits(base_of(kind))).abs().max() / scale > 1e-2


@pytest.mark.parametrize("as_loaded", [False, True])
def test_a_merged_model_has_the_files_of_its_base(as_loaded: bool, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, "mixtral", as_loaded=as_loaded, target_modules=["experts.gate_up_proj"])
    export(request_for(adapter, "merged", tmp_path / "out", check=False))
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 2
    changed = set()
    for shard in shards:
        before, after = load_file(tmp_path / "base" / shard), load_file(tmp_path / "out" / "rte" / shard)
        assert before.keys() == after.keys()
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
    places = [f"model.layers.{i}.{'mlp' if as_loaded else 'block_sparse_moe'}.experts" for i in (0, 1)]
    names = ["gate_up_proj"] if as_loaded else [f"{e}.w{n}.weight" for e in range(4) for n in (1, 3)]
    assert changed == {f"{place}.{name}" for place in places for name in names}
    live = PeftModel.from_pretrained(base_of("mixtral"), str(adapter))
    found = logits(type(base_of("mixtral")).from_pretrained(tmp_path / "out" / "rte"))
    torch.testing.assert_close(found, logits(live, task_ids=torch.tensor([1, 1])), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["q_proj", "experts.down_proj"]])
def test_one_weight_of_a_block(targets: list[str], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, "qwen3_moe", target_modules=targets)
    rows = export(request_for(adapter, "lora", tmp_path / "out"))
    assert all(row["difference"] < 1e-4 for row in rows)
    keys = load_file(tmp_path / "out" / "cola" / "adapter_model.safetensors").keys()
    assert not any("base_layer" in key for key in keys)
    assert any(key.endswith("mlp.experts.lora_B.weight") for key in keys)


def test_pefts_own_adapters_are_read_and_merged(tmp_path: Path) -> None:
    write_adapter(tmp_path, "mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM",
        init_lora_weights=False, alpha_pattern={"mlp.experts.down_proj": 3},
        base_model_name_or_path=str(tmp_path / "base"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(base_of("mixtral"), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "lora"))
    factors = read_adapter(find_subject(str(tmp_path / "lora"))).factors(0)
    for name, wrapper in model.base_model.model.named_modules():
        if type(wrapper).__name__ == "ParamWrapper":
            a, b = factors[f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"]
            torch.testing.assert_close(b @ a, wrapper.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    for form in ("lora", "merged"):
        (row,) = export(request_for(tmp_path / "lora", form, tmp_path / f"exported-{form}"))
        assert row["difference"] < 1e-4


def test_folding_is_undone() -> None:
    a, b = torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    again = unfolded(*folded(a, b), 2)
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path, "mixtral")
    with pytest.raises(UserError, match="has a pair for each expert: use --form lora"):
        export(request_for(adapter, "padded", tmp_path / "out"))
    monkeypatch.setattr(layout, "MergeModulelist", type("Other", (), {}))
    with pytest.raises(UserError, match="in a way that cannot be merged into"):
        export(request_for(adapter, "merged", tmp_path / "out"))
    monkeypatch.undo()
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = next(key for key in content["weight_map"] if ".w2." in key)
    gone = content["weight_map"][lost]
    content["weight_map"] = {key: shard for key, shard in content["weight_map"].items() if shard != gone}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="do not hold all of"):
        export(request_for(adapter, "merged", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
