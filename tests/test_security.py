"""Hostile files: refused, or not opened at all, and whatever code they carry does not run (10 s)."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from fault_runs import argv, make_place, start
from tiny_engines import engine
from tiny_models import base_model, text_model

from launch import train
from more_ds import checkpoint, loading
from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG, MANIFEST
from more_ds.data.rows import load_examples
from more_ds.engine import Ranks
from more_ds.errors import UserError
from more_ds.export.job import Request, export
from more_ds.tasks import resolve_tasks

ROOT = Path(__file__).parents[1]
BOMBS = ("adapter_model.bin", "rng_state.pth", "optimizer.pt", "training_args.bin", "pytorch_model.bin",
         "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")  # fmt: skip


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def plant(folder: Path, marker: Path, names: tuple[str, ...] = BOMBS) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))


def leave_a_mark(module: Path, marker: Path) -> None:
    module.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("security"))


def test_the_bomb_works(tmp_path: Path) -> None:
    plant(tmp_path, tmp_path / "marker", ("optimizer.pt",))
    pickle.loads((tmp_path / "optimizer.pt").read_bytes())
    assert (tmp_path / "marker").exists()


def resume_beside_bombs(ranks: Ranks, folder: Path) -> bool:
    module = engine(ranks, "zero2 fp32", folder)
    path = checkpoint.save(folder, module, 1, {})
    plant(path, folder / "marker")
    plant(folder, folder / "marker")
    checkpoint.load(path, module)
    (path / ADAPTER).write_bytes(pickle.dumps(Bomb(folder / "marker")))
    with pytest.raises(UserError, match=f"{ADAPTER} (has|differs)"):
        checkpoint.load(path, module)
    return (folder / "marker").exists()


def test_a_checkpoint_with_pickles_in_it_runs_none(tmp_path: Path) -> None:
    assert run_ranks(resume_beside_bombs, 1, tmp_path) == [False]


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_read_by_its_bytes_alone(tmp_path: Path) -> None:
    """The manifest's file names are ours: one that leads out of the folder is refused."""
    (tmp_path / "step-00000001").mkdir()
    entries = {f"../{name}": {"bytes": 1, "sha256": ""} for name in (ADAPTER, ADAPTER_CONFIG)}
    (tmp_path / "step-00000001" / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))
    with pytest.raises(UserError, match="does not list the files of a checkpoint"):
        checkpoint.read_state(tmp_path / "step-00000001")


def test_an_adapter_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    plant(tmp_path, tmp_path / "marker")
    with pytest.raises(UserError, match="only safetensors are read"):
        loading.load_adapter(base_model("llama"), tmp_path)
    (tmp_path / ADAPTER).write_bytes((2**62).to_bytes(8, "little") + b"{}")  # a header larger than the file
    with pytest.raises(UserError, match="is damaged"):
        loading.load_adapter(base_model("llama"), tmp_path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        ("pytorch_model.bin", None),
    ],
)
def test_a_base_model_cannot_bring_code(
    place: Path, name: str, content: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(place / "llama", model)
    leave_a_mark(model / "evil.py", marker)
    if content is None:
        (model / "model.safetensors").unlink()
        plant(model, marker)
    else:
        there = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**there, **content}))
    code = start([*argv(place, tmp_path / "run"), "--model", str(model), "--max_steps", "1"], tmp_path / "log", world=1)
    assert code.wait()[0] in (0, 2)  # 0: the code is not needed, and was left alone
    assert not marker.exists()
    if name != "tokenizer_config.json":
        assert "error: " in (tmp_path / "log").read_text()


def adapter_with(place: Path, folder: Path, **keys: Any) -> Path:
    """An adapter that is sound but for some keys of its configuration, and a module beside it that leaves a mark."""
    model = text_model("llama", ["a", "b"]).peft
    model.peft_config["default"].base_model_name_or_path = str(place / "llama")
    model.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    leave_a_mark(folder / "evil.py", folder / "marker")
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True},
    ],
)
def test_an_adapter_cannot_bring_code(
    place: Path, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter_with(place, tmp_path / "adapter", **keys)
    monkeypatch.syspath_prepend(str(folder))
    with contextlib.suppress(UserError):  # refused, or left alone
        subject = loading.find_subject(str(folder))
        loading.load_text_model(subject, dtype="fp32", device="cpu", max_source_length=8, max_target_length=8)
    assert not (folder / "marker").exists()
    importlib.import_module("evil")
    assert (folder / "marker").exists(), "it would have been found"
    del sys.modules["evil"]


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a\\b", "..", "", "a\0b", 5])
def test_an_adapter_cannot_name_a_path(place: Path, name: Any, tmp_path: Path) -> None:
    """An export makes a folder for each task of an adapter."""
    folder = adapter_with(place, tmp_path / "a" / "b" / "adapter", task_names=["a", name])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="which no folder can be called"):
        export(Request(loading.find_subject(str(folder)), "lora", (), tmp_path / "a" / "b" / "out"))
    assert sorted(tmp_path.rglob("*")) == before


def tar_of(names: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, link in names.items():
            member = tarfile.TarInfo(name)
            member.size = 0 if link else 4
            member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
            archive.addfile(member, io.BytesIO(b"evil"))
    return stream.getvalue()


@pytest.mark.parametrize("members", [{"../../evil": None}, {"/tmp/evil": None}, {"link": "/etc", "link/evil": None}])
@pytest.mark.parametrize("name", ["rows.tar.gz", "rows.tar", "rows.zip", "rows.jsonl.gz"])
def test_an_archive_is_no_data(members: dict[str, Any], name: str, tmp_path: Path) -> None:
    """It is refused by its name, or read as rows, which it does not hold; nothing is unpacked."""
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / name).write_bytes(tar_of(members))
    task = {"files": {"train": name}, "prompt": "{text}", "target": "{text}", "metrics": ["exact_match"]}
    (tmp_path / "x" / "y" / "mine.yaml").write_text(json.dumps({"suite": "mine", "tasks": {"x": task}}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"no file that can be read|rows\.jsonl\.gz"):
        load_examples(resolve_tasks(None, [], str(tmp_path / "x" / "y" / "mine.yaml"))[0], "train")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_yaml_makes_no_objects(place: Path, tag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    evil = f"tasks: {tag} ['touch {marker}']\n"
    (tmp_path / "evil.yaml").write_text(evil)
    assert train.main(["--recipe", str(tmp_path / "evil.yaml")]) == 2
    with pytest.raises(UserError):
        resolve_tasks(None, [], str(tmp_path / "evil.yaml"))
    assert train.main([*argv(place, tmp_path / "run"), "--adapter.r", f"{tag} ['touch {marker}']"]) == 2
    assert all(line.startswith("error: ") for line in capfd.readouterr().err.splitlines())
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a\\b", "..", "a\0b"])
def test_a_task_cannot_name_a_path(place: Path, name: str, tmp_path: Path) -> None:
    suite = {"suite": "mine", "tasks": {name: {"prompt": "{text}", "target": "{text}", "metrics": ["exact_match"]}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(suite))
    with pytest.raises(UserError):
        resolve_tasks(None, [], str(tmp_path / "mine.yaml"))
    suite = {"suite": name, "tasks": {"x": {"prompt": "{text}", "target": "{text}", "metrics": ["exact_match"]}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(suite))
    with pytest.raises(UserError):
        resolve_tasks(None, [], str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("prompt", ["{text.__class__}", "{text[0]}", "{text!r:>99999999}"])
def test_a_prompt_is_no_format_string(prompt: str, tmp_path: Path) -> None:
    suite = {"suite": "mine", "tasks": {"x": {"prompt": prompt, "target": "{text}", "metrics": ["exact_match"]}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(suite))
    with pytest.raises(UserError):
        resolve_tasks(None, [], str(tmp_path / "mine.yaml"))


FORBIDDEN = re.compile(
    r"weights_only\s*=\s*False|yaml\.load\("
    r"|\beval\(|\bexec\(|pickle\.|import pickle|trust_remote_code\s*=\s*True|unsafe_load"
    r"|extractall|zipfile|tarfile|unpack_archive"
    r"|shell\s*=\s*True|os\.system|__import__"
)


def test_the_code_has_no_way_to_run_what_it_reads() -> None:
    files = [path for part in ("more_ds", "launch", "eval") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 40
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line) and not re.search(r"\.eval\(\)", line)
    ]
    assert found == []
    assert FORBIDDEN.search("torch.load(path, weights_only = False)")


def test_bandit_finds_nothing() -> None:
    command = [sys.executable, "-m", "bandit", "-q", "-ll", "-c", "pyproject.toml", "-r", "more_ds", "launch", "eval"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
