"""Answers of a trained adapter: mixed tasks, several adapters, and the command line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import base_model, text_model, tokenizer
from toy_suite import NAMES, write_toy

from more_ds.errors import UserError
from more_ds.export.job import Request, export
from more_ds.inference import Inference
from more_ds.loading import find_subject
from more_ds.scoring.generation import generate

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["accept: red", "grade: something much longer", "choose: x", "tell: a blue one", "accept: no"]
TASKS = ["accept", "grade", "choose", "tell", "accept"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_generate", ROOT / "launch" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["launch_generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(model: Inference, batch_size: int = 32) -> list[str]:
    return [a.text for a in model.generate(PROMPTS, TASKS, max_new_tokens=6, batch_size=batch_size)]


def one_by_one() -> list[str]:
    model = text_model("llama", NAMES)
    ids = [model.encoder.prompt(prompt) for prompt in PROMPTS]
    rows = [generate(model, [row], [NAMES.index(task)], 6)[0] for row, task in zip(ids, TASKS, strict=True)]
    return [model.encoder.decode(row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_mixed_tasks_answer_as_one_at_a_time(folder: Path, batch_size: int) -> None:
    model = Inference.open(str(folder / "adapter"))
    assert texts(model, batch_size) == one_by_one()
    answers = model.generate(PROMPTS[:2], TASKS[:2], max_new_tokens=2)
    assert [(a.task, a.inferred) for a in answers] == [("accept", False), ("grade", False)]


def test_the_adapter_without_gates_answers_the_same(folder: Path, tmp_path: Path) -> None:
    export(Request(find_subject(str(folder / "adapter")), "adapter", (), tmp_path / "out"))
    model = Inference.open(str(tmp_path / "out"))
    assert texts(model) == one_by_one()
    with pytest.raises(UserError, match="exported without task embeddings"):
        model.generate(["no task is told"])


def test_a_task_that_is_not_told_is_found(folder: Path) -> None:
    model = Inference.open(str(folder / "adapter"))
    found = model.generate(PROMPTS, max_new_tokens=3)
    assert all(answer.inferred for answer in found)
    told = model.generate(PROMPTS, [answer.task for answer in found], max_new_tokens=3)
    assert [answer.text for answer in told] == [answer.text for answer in found]


def test_adapters_of_one_base_are_switched_without_loading(folder: Path, tmp_path: Path) -> None:
    other = text_model("llama", ["only", "two"], scale="none")
    other.peft.save_pretrained(str(tmp_path / "other"))
    model = Inference.open(str(folder / "adapter"))
    model.add("other", tmp_path / "other")
    assert texts(model) == one_by_one()
    model.use("other")
    expected = generate(other, [other.encoder.prompt("hm")], [1], 6)[0]
    assert [a.text for a in model.generate(["hm"], "two", max_new_tokens=6)] == [other.encoder.decode(expected)]
    with pytest.raises(UserError, match="does not know 'accept'; known: only, two"):
        model.generate(["hm"], "accept")
    model.use("default")
    assert texts(model) == one_by_one()
    with pytest.raises(UserError, match="no adapter 'othr'; did you mean 'other'"):
        model.use("othr")
    with pytest.raises(UserError, match="called 'other' already"):
        model.add("other", tmp_path / "other")


def test_a_plain_model_answers_without_tasks(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    model = Inference.open(str(tmp_path))
    plain = text_model("llama")
    expected = plain.encoder.decode(generate(plain, [plain.encoder.prompt("hm")], [0], 6)[0])
    with pytest.raises(UserError, match="does not route by task; leave the task out"):
        model.generate(["hm"], "accept")
    (answer,) = model.generate(["hm"], max_new_tokens=6)
    assert (answer.text, answer.task, answer.inferred) == (expected, None, False)


def test_the_command_line(
    command: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"task": t, "text": p.partition(": ")[2]} for p, t in zip(PROMPTS, TASKS, strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail = ["--tasks_file", str(folder / "toy.yaml"), "--max_new_tokens", "6", "--device", "cpu"]
    output = tmp_path / "out.jsonl"
    argv = [str(folder / "adapter"), "--input", str(tmp_path / "in.jsonl"), "--output", str(output), *tail]
    assert command.main(argv) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in written] == PROMPTS
    assert [row["text"] for row in written] == one_by_one()
    capsys.readouterr()
    assert command.main([str(folder / "adapter"), "--prompt", PROMPTS[3], "--task", "tell", *tail]) == 0
    assert capsys.readouterr().out.strip() == f"[tell] {one_by_one()[3]}".strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "give either --prompt or --input"),
        (["{adapter}", "--prompt", "a", "--task", "acept"], "does not know 'acept'; did you mean 'accept'?"),
        (["{adapter}", "--input", "{empty}"], "no rows"),
        (["{adapter}", "--input", "{broken}"], "cannot be read"),
        (["{adapter}", "--input", "{bare}"], "row 1 has neither prompt nor task"),
        (["{adapter}", "--input", "{column}", "--tasks_file", "{toy}"], "row 1, task 'accept': no column 'text'"),
        (["{adapter}", "--prompt", "a", "--task", "tell", "--output", "{bare}/no/x"], "there is no folder"),
    ],
)
def test_mistakes_get_one_line(
    command: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    contents = {"empty": "", "broken": "{", "bare": '{"a": 1}\n', "column": '{"task": "accept", "txt": "a"}\n'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    places = {name: tmp_path / name for name in contents} | {"adapter": folder / "adapter", "toy": folder / "toy.yaml"}
    assert command.main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
