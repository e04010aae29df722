"""Exports: what stock PEFT and transformers compute with them, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import base_model, text_model, tokenizer
from transformers import LlamaForCausalLM

from more_ds.errors import TrainingError, UserError
from more_ds.export import job
from more_ds.export.job import Request, export
from more_ds.export.lora import check_served
from more_ds.export.merged import _shares_of_files
from more_ds.export.push import push
from more_ds.loading import find_subject

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["cola", "rte", "stsb"]
KINDS = ["llama", "gpt2", "t5"]
IDS = torch.tensor([[2, 40, 41, 60, 61, 9], [2, 50, 11, 12, 13, 14]])


def write_base(folder: Path, kind: str, **save: Any) -> str:
    base_model(kind).save_pretrained(folder, **save)
    tokenizer(kind == "t5").save_pretrained(folder)
    return str(folder)


def write_adapter(folder: Path, kind: str, base: str, **options: Any) -> Path:
    torch.manual_seed(3)
    model = text_model(kind, NAMES, **options).peft
    ranks = model.base_model.ranks()
    assert any(len(set(chosen.tolist())) > 1 for chosen in ranks.values())
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / request.param
    return write_adapter(folder / "adapter", request.param, write_base(folder / "base", request.param))


def request_for(folder: Path, form: Any, output: Path, **options: Any) -> Request:
    return Request(find_subject(str(folder)), form, (), output, **options)


@torch.no_grad()
def logits(model: Any, **extra: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder, **extra).logits


def live_logits(adapter: Path, task: int) -> torch.Tensor:
    base = base_model(adapter.parent.name)
    return logits(PeftModel.from_pretrained(base, str(adapter)).eval(), task_ids=torch.tensor([task, task]))


@pytest.mark.parametrize("form", ["lora", "padded", "merged", "adapter"])
def test_every_form_computes_what_the_adapter_does(adapter: Path, form: Any, tmp_path: Path) -> None:
    rows = export(request_for(adapter, form, tmp_path / "out", dtype="fp32" if form == "merged" else None))
    assert [row["task"] for row in rows] == NAMES
    kind = adapter.parent.name
    for task, row in enumerate(rows):
        expected = live_logits(adapter, task)
        folder = str(tmp_path / "out" / ("" if form == "adapter" else row["task"]))
        if form == "merged":
            found = logits(type(base_model(kind)).from_pretrained(folder).eval())
        else:
            extra = {"task_ids": torch.tensor([task, task])} if form == "adapter" else {}
            found = logits(PeftModel.from_pretrained(base_model(kind), folder).eval(), **extra)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert row["difference"] < 5e-5
        assert (found - logits(base_model(kind))).abs().max() > 1e-3
        assert (Path(folder) / "README.md").is_file()


def test_a_lora_has_the_ranks_of_its_task_and_no_more(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    export(request_for(adapter, "lora", tmp_path / "out", check=False))
    for task, name in enumerate(NAMES):
        found = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        ranks = {key.removesuffix(".more_ranks"): int(v[task]) for key, v in tensors.items() if "more_ranks" in key}
        assert {key.removesuffix(".lora_A.weight"): len(v) for key, v in found.items() if "lora_A" in key} == ranks
        assert {key.removesuffix(".lora_B.weight"): v.shape[1] for key, v in found.items() if "lora_B" in key} == ranks


def test_the_adapter_for_inference_is_as_small_as_a_lora(adapter: Path, tmp_path: Path) -> None:
    export(request_for(adapter, "adapter", tmp_path / "out"))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.rsplit(".more_", 1)[1] for key in found} == {"A.weight", "B.weight", "ranks"}
    before = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(found[key], before[key]) for key in found)


def test_servers_take_the_padded_form_and_would_refuse_the_other(adapter: Path, tmp_path: Path) -> None:
    export(request_for(adapter, "padded", tmp_path / "padded", rank=8, check=False))
    export(request_for(adapter, "lora", tmp_path / "lora", check=False))
    assert check_served(tmp_path / "padded" / "rte") == []
    assert any("rank_pattern" in line for line in check_served(tmp_path / "lora" / "rte"))
    path = tmp_path / "padded" / "rte" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(key for key in sorted(tensors) if "lora_A" in key)
    tensors["model.q.lora_A"] = tensors.pop(first)
    save_file(tensors, path)
    wrong = check_served(tmp_path / "padded" / "rte")
    assert wrong == [
        f"{first.replace('lora_A', 'lora_B')} has no {first}",
        "model.q.lora_A is no name of a LoRA tensor",
    ]


def test_plain_peft_reads_a_lora_where_this_package_is_not(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "llama" / "adapter", "llama", write_base(tmp_path / "base", "llama"))
    export(request_for(adapter, "lora", tmp_path / "out", check=False))
    code = f"""
import sys, torch
sys.modules["more_ds"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out/rte").eval()
torch.save(model(input_ids=torch.tensor({IDS.tolist()})).logits.detach(), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, live_logits(adapter, 1), atol=1e-4, rtol=1e-4)


def test_peft_adds_exported_loras_up(adapter: Path, tmp_path: Path) -> None:
    export(request_for(adapter, "padded", tmp_path / "out", check=False))
    kind = adapter.parent.name
    model: Any = PeftModel.from_pretrained(base_model(kind), str(tmp_path / "out" / "cola"), adapter_name="cola")
    model.load_adapter(str(tmp_path / "out" / "rte"), adapter_name="rte")
    model.add_weighted_adapter(["cola", "rte"], [0.25, 0.75], "both", combination_type="cat")
    model.set_adapter("both")
    one, other = (load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("cola", "rte"))
    for key in one:
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            expected = 0.25 * one[b] @ one[key] + 0.75 * other[b] @ other[key]
            layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
            found = layer.get_delta_weight("both")
            torch.testing.assert_close(found.T if kind == "gpt2" else found, expected)


@pytest.mark.parametrize("options", [{"gate": "soft"}, {"experts": "subset"}, {"scale": "component"}])
def test_the_switches_of_the_method(options: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", "llama", base, **options)
    for form in ("lora", "merged"):
        rows = export(request_for(adapter, form, tmp_path / form))
        assert max(row["difference"] for row in rows) < 5e-5


def test_plain_lora_goes_the_same_way(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, alpha_pattern={"q_proj": 7}, rank_pattern={"q_proj": 2},
        target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base_model("llama"), config).eval()
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(tmp_path / "adapter"))
    for form in ("lora", "padded", "merged"):
        (row,) = export(request_for(tmp_path / "adapter", form, tmp_path / form))
        assert row["task"] == "default"
        assert row["difference"] < 5e-5
    with pytest.raises(UserError, match="only MoRE has gates"):
        export(request_for(tmp_path / "adapter", "adapter", tmp_path / "no"))


def test_shards_keep_their_names_and_types(tmp_path: Path) -> None:
    base = Path(write_base(tmp_path / "base", "llama", max_shard_size="12KB"))
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 2
    adapter = write_adapter(tmp_path / "adapter", "llama", str(base))
    export(request_for(adapter, "merged", tmp_path / "same"))
    assert sorted(path.name for path in (tmp_path / "same" / "rte").glob("model-*")) == shards
    export(request_for(adapter, "merged", tmp_path / "half", dtype="bf16"))
    folder = tmp_path / "half" / "rte"
    assert {t.dtype for s in shards for t in load_file(folder / s).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = [
        json.loads((p / "model.safetensors.index.json").read_text())["metadata"]["total_size"] for p in (base, folder)
    ]
    assert sizes[0] == 2 * sizes[1]
    assert (folder / "tokenizer.json").is_file()


def test_an_export_that_computes_something_else_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter", "llama", write_base(tmp_path / "base", "llama"))
    right = job.write_lora

    def wrong(folder: Path, factors: Any, *arguments: Any, **options: Any) -> Any:
        return right(folder, {k: (a, b * (1.01 if "q_proj" in k else 1)) for k, (a, b) in factors.items()}, *arguments,
                     **options)  # fmt: skip

    monkeypatch.setattr(job, "write_lora", wrong)
    with pytest.raises(TrainingError, match="differs from the adapter"):
        export(request_for(adapter, "lora", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_export", ROOT / "launch" / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["launch_export"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter", "llama", write_base(tmp_path / "base", "llama"))
    assert command.main([str(adapter), "--tasks", "rte,cola", "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cola", "export.json", "rte"]
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["lora", "merged", "adapter"])
def test_an_export_knows_how_its_run_read_prompts(form: Any, command: ModuleType, tmp_path: Path) -> None:
    """Cut at another length, the same adapter has other scores."""
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "run" / "best", "llama", base)
    how = {"max_source_length": 9, "max_target_length": 5, "plain_prompts": True}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(base), **how}))
    out = tmp_path / "out"
    given = [str(tmp_path / "run"), "--form", form, "--tasks", *(["rte"] if form != "adapter" else [""])]
    assert command.main([*given, "--output_dir", str(out)]) == 0
    exported = find_subject(str(out / "rte" if form != "adapter" else out))
    assert exported.reading == how
    assert not exported.run
    assert find_subject(str(tmp_path / "base")).reading == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}", "--tasks", "colla"], "the adapter knows no task 'colla'; did you mean 'cola'?"),
        (["{base}"], "is a model without an adapter"),
        (["{nowhere}"], "is no folder; there is nothing to export"),
        (["runs/nowhere"], "runs/nowhere is no folder"),
        (["{adapter}", "--output_dir", "{base}"], "exists and holds something"),
        (["{adapter}", "--form", "padded", "--rank", "1"], "rank 1 is less than the"),
        (["{adapter}", "--rank", "none"], "'none' is not a positive number"),
        (["{pooled}"], "gate_input=pooled chooses the ranks by example"),
        (["{soft}", "--form", "adapter"], "no table of ranks says what this gate chooses"),
        (["{adapter}", "--form", "merged", "--base_model", "{other}"], "is this the base model of the adapter?"),
        (["{adapter}", "--base_model", "{nowhere}"], "no model at"),
    ],
)
def test_mistakes_get_one_line(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"base": write_base(tmp_path / "base", "llama"), "other": write_base(tmp_path / "other", "gpt2")}
    places["adapter"] = str(write_adapter(tmp_path / "adapter", "llama", places["base"]))
    places["pooled"] = str(write_adapter(tmp_path / "pooled", "llama", places["base"], gate_input="pooled"))
    places["soft"] = str(write_adapter(tmp_path / "soft", "llama", places["base"], gate="soft"))
    places["nowhere"] = str(tmp_path / "nowhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert command.main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_pushing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options["private"]))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            if repo_id == "me/full":
                raise OSError("no space\nleft")
            calls.append((repo_id, folder_path))

    monkeypatch.setattr("more_ds.export.push.HfApi", Hub)
    assert push(tmp_path, "me/lora") == "https://hub/me/lora"
    assert calls == [("me/lora", True), ("me/lora", tmp_path)]
    with pytest.raises(UserError, match="could not be pushed to 'me/full': no space left; it is still there"):
        push(tmp_path, "me/full")


def test_a_head_that_is_the_embedding_too_is_not_merged(tmp_path: Path) -> None:
    config = base_model("llama").config
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    factors = {"lm_head": (torch.zeros(2, config.hidden_size), torch.zeros(config.vocab_size, 2))}
    with pytest.raises(UserError, match=r"the weight of lm_head is also that of model\.embed_tokens"):
        _shares_of_files(tmp_path, ["model.safetensors"], factors, config)
