"""Evaluation end to end: metrics, records, ranks, adapters, and the runner's command line."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tiny_models import base_model, text_model, tokenizer

from more_ds.errors import UserError
from more_ds.evaluate import evaluate, standard_error
from more_ds.loading import find_subject, load_text_model
from more_ds.model import TextModel
from more_ds.results import TaskResult, mean_score, result_table, write_results
from more_ds.scoring import generate, rank_options
from more_ds.tasks import Task, load_suite
from more_ds.tasks.render import Example, answer_value, render

SUITE = """
suite: toy
tasks:
  accept:
    prompt: "accept: {text}"
    labels: {0: bad, 1: good}
    metrics: [matthews, accuracy]
    extra_tests: [test_hard]
  grade:
    prompt: "grade: {text}"
    labels: {range: [0.0, 2.0, 0.5]}
    metrics: [pearson, spearman]
  choose:
    prompt: "choose: {text}"
    options: ["{a}", "{b}", "it is {b}"]
    metrics: [accuracy]
  tell:
    prompt: "tell: {text}"
    references: said
    metrics: [exact_match]
    max_new_tokens: 6
"""
WORDS = ["red", "green", "a blue one", "x", "something longer", "no"]
NAMES = ["accept", "grade", "choose", "tell"]
ROOT = Path(__file__).resolve().parents[1]


def toy_row(task: str, i: int) -> dict[str, Any]:
    text = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i % 4))
    label: Any = {"accept": i % 2, "grade": (i % 5) / 2, "choose": i % 3}.get(task, 0)
    return {"text": text, "label": label, "a": WORDS[i % 6], "b": WORDS[(i + 2) % 6] + "!", "said": [text, "no"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks file, data and a base model."""
    path = tmp_path_factory.mktemp("toy")
    (path / "toy.yaml").write_text(SUITE)
    for task in NAMES:
        (path / "toy" / task).mkdir(parents=True)
        for split, rows in (("train", 9), ("test", 11), ("test_hard", 5)):
            lines = [json.dumps(toy_row(task, i + len(split))) for i in range(rows)]
            (path / "toy" / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    base_model("llama").save_pretrained(path / "base")
    tokenizer(False).save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    model = text_model("llama", NAMES)
    model.peft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.peft.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_run", ROOT / "eval" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(folder: Path) -> list[Task]:
    return load_suite(folder / "toy.yaml")


def toy_examples(tasks: Sequence[Task], count: int = 11) -> dict[str, list[Example]]:
    return {task.name: [render(task, toy_row(task.name, i), i) for i in range(count)] for task in tasks}


IDS = {name: i for i, name in enumerate(NAMES)}


def toy_scores(
    model: TextModel, tasks: Sequence[Task], batch_size: int, count: int = 11, **options: Any
) -> list[TaskResult]:
    examples = toy_examples(tasks, count)
    return evaluate(model, tasks, examples, task_ids=IDS, batch_size=batch_size, label=None, **options)


def assert_same(one: Sequence[TaskResult], other: Sequence[TaskResult]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.task, a.metrics, a.n, a.unparsable) == (b.task, b.metrics, b.n, b.unparsable)
        for x, y in zip(a.records, b.records, strict=True):
            assert {k: v for k, v in x.items() if k != "scores"} == {k: v for k, v in y.items() if k != "scores"}
            assert x["scores"] == (y["scores"] and pytest.approx(y["scores"], abs=1e-4))


def test_metrics_are_those_of_the_best_scored_option(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    results = {result.task: result for result in toy_scores(model, tasks, 4)}
    assert list(results) == NAMES
    assert [results[name].mode for name in NAMES] == ["likelihood"] * 3 + ["generation"]
    for task in tasks[:3]:
        found, gold = [], []
        for example in toy_examples(tasks)[task.name]:
            prompt = model.encoder.prompt(example.prompt)
            options = [model.encoder.target(text) for text in example.options]
            scores = rank_options(model, [prompt], [IDS[task.name]], [options])[0]
            found.append(answer_value(task, int(torch.tensor(scores).argmax())))
            gold.append(example.gold)
        assert [record["prediction"] for record in results[task.name].records] == found
        if task.name == "accept":
            assert results["accept"].metrics["accuracy"] == pytest.approx(100 * accuracy_score(gold, found))
            assert results["accept"].score == pytest.approx(100 * matthews_corrcoef(gold, found))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["likelihood", "generation"])
def test_batch_size_changes_nothing(tasks: list[Task], kind: str, mode: str) -> None:
    model = text_model(kind, NAMES)
    assert_same(toy_scores(model, tasks, 1, 4, mode=mode), toy_scores(model, tasks, 7, 4, mode=mode))


def test_every_example_is_answered_for_its_own_task(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    examples = toy_examples(tasks)
    mixed = toy_scores(model, tasks, 5)
    apart = [evaluate(model, [t], examples, task_ids=IDS, batch_size=3, label=None)[0] for t in tasks]
    assert_same(mixed, apart)
    swapped = evaluate(
        model, tasks, examples, task_ids=dict(zip(NAMES, (1, 2, 3, 0), strict=True)), batch_size=5, label=None
    )
    assert all(a.records[0]["scores"] != b.records[0]["scores"] for a, b in zip(mixed[:3], swapped, strict=False))


def test_generation_counts_what_is_no_option(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama", NAMES)
    answers = {"accept": ["good", "nonsense"], "grade": ["1.5", "3.0"], "choose": ["it is", ""], "tell": ["no", ""]}
    queue = dict.fromkeys(NAMES, 0)

    def spoken(model: TextModel, prompts: Any, task_ids: Sequence[int], *rest: Any) -> list[list[int]]:
        rows = []
        for task_id in task_ids:
            name = NAMES[task_id]
            text = answers[name][queue[name] % 2]
            queue[name] += 1
            rows.append([*model.encoder.tokenizer(text, add_special_tokens=False).input_ids, 1, 0])
        return rows

    monkeypatch.setattr("more_ds.evaluate.generate", spoken)
    results = {r.task: r for r in toy_scores(model, tasks, 50, mode="generation")}
    assert {name: r.unparsable for name, r in results.items()} == {"accept": 5, "grade": 5, "choose": 11, "tell": 0}
    found = [1 if r["text"] == "good" else -1 for r in results["accept"].records]
    gold = [i % 2 for i in range(11)]
    assert results["accept"].metrics["accuracy"] == pytest.approx(100 * accuracy_score(gold, found))
    assert results["tell"].metrics["exact_match"] == pytest.approx(100 * 6 / 11)


def test_generation_stops_where_the_longest_answer_would(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama", NAMES)
    limits = set()

    def noted(model: TextModel, prompts: Any, task_ids: Sequence[int], limit: int, beams: int) -> list[list[int]]:
        limits.update((NAMES[task_id], limit) for task_id in task_ids)
        return generate(model, prompts, task_ids, limit, beams)

    monkeypatch.setattr("more_ds.evaluate.generate", noted)
    toy_scores(model, tasks, 50, mode="generation")
    longest = len("it is something longer!") + 2  # the space in front, and EOS
    assert limits == {("accept", 6), ("grade", 5), ("choose", longest), ("tell", 6)}


def test_prompts_that_are_cut_are_counted(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    model.encoder.max_source_length = 20
    expected = sum(len(e.prompt) + 1 > 20 for e in toy_examples(tasks)["accept"])
    result = toy_scores(model, tasks, 4)[0]
    assert 0 < result.cut == expected < result.n
    assert "cut" in result_table([result]).splitlines()[0]


def test_a_task_that_the_adapter_does_not_know(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES[:2])
    with pytest.raises(UserError, match=r"does not know 'choose', 'tell'; it knows: accept, grade"):
        evaluate(model, tasks, toy_examples(tasks), task_ids={"accept": 0, "grade": 1}, batch_size=4, label=None)


def test_majority_and_standard_error(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    golds = {"accept": [1, 1, 0]}
    first, _, third, text = toy_scores(model, tasks, 8, train_golds=golds, resamples=50)
    assert first.majority == {"matthews": 0.0, "accuracy": pytest.approx(100 * 5 / 11)}
    assert third.majority is None
    assert text.standard_error is None
    assert third.standard_error is not None
    assert third.standard_error == toy_scores(model, tasks, 3, resamples=50)[2].standard_error > 0
    accuracy = Task("t", "s", "{x}", ("accuracy",), "accuracy", labels=tasks[0].labels)
    many = [int(i % 4 == 0) for i in range(400)]
    assert standard_error(accuracy, many, [0] * 400, 400) == pytest.approx(100 * (0.75 * 0.25 / 400) ** 0.5, rel=0.15)


def test_results_on_disk(tasks: list[Task], tmp_path: Path) -> None:
    results = toy_scores(text_model("llama", NAMES), tasks, 8)
    write_results(tmp_path / "out", results, {"subject": "toy"})
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"]) for row in rows] == [(name, i) for name in NAMES for i in range(11)]
    assert rows[0]["options"] == ["bad", "good"]
    assert rows[0]["prediction"] == max((0, 1), key=rows[0]["scores"].__getitem__)
    assert rows[-1]["gold"] == list(toy_examples(tasks)["tell"][-1].gold)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["subject"] == "toy"
    assert [entry["metrics"] for entry in document["results"]] == [result.metrics for result in results]
    assert f"{mean_score(results):.2f}" in result_table(results).splitlines()[-1]


def _worker(rank: int, world: int, port: int, job: Callable[[int], Any], queue: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        queue.put((rank, job(rank)))
    except BaseException as error:
        queue.put((rank, repr(error)))
        raise


def on_ranks(world: int, job: Callable[[int], Any]) -> list[Any]:
    """Run `job(rank)` in forked processes, and return what they give, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, world, port, job, queue)) for r in range(world)]
    for worker in workers:
        worker.start()
    try:
        found = dict(queue.get(timeout=60) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()
    return [found[r] for r in range(world)]


def test_two_and_three_ranks_give_the_numbers_of_one(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    alone = [toy_scores(model, tasks, 4, 5, mode=mode) for mode in ("likelihood", "generation")]

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        return [toy_scores(model, tasks, 4, 5, mode=mode) for mode in ("likelihood", "generation")]

    for world in (2, 3):
        for found in on_ranks(world, job):
            assert not isinstance(found, str), found
            for one, other in zip(alone, found, strict=True):
                assert_same(one, other)


def test_partitioned_ranks_take_the_same_number_of_passes(tasks: list[Task]) -> None:
    """Where parameters are spread over ranks every rank must run every pass, with or without a batch of its own."""
    model = text_model("llama", NAMES)
    tasks = tasks[:3]
    alone = toy_scores(model, tasks, 3)
    next(model.peft.parameters()).ds_numel = 1  # the mark that ZeRO-3 leaves on a parameter

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        passes = []
        model.module.register_forward_hook(lambda *_: passes.append(1))
        # 33 examples in batches of 3: eleven batches, so that the second rank has none in the last turn; ranking
        # the graded task's five options takes more passes than the others.
        return toy_scores(model, tasks, 3), len(passes)

    (first, passes), (second, others) = on_ranks(2, job)
    assert passes == others > 0
    assert_same(alone, first)
    assert_same(alone, second)


def test_an_adapter_loads_whole(folder: Path, adapter: Path) -> None:
    subject = find_subject(str(adapter))
    assert subject.task_ids == IDS
    model = load_text_model(subject, dtype="fp32", device="cpu", max_source_length=64, max_target_length=32)
    original = text_model("llama", NAMES)
    prompts, options = [[2, 9, 30]], [[[40, 41, 1], [50, 1]]]
    for task in range(4):
        found = rank_options(model, prompts, [task], options)[0]
        assert found == pytest.approx(rank_options(original, prompts, [task], options)[0], abs=1e-5)


def _changed(adapter: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    target.mkdir()
    for name in ("adapter_config.json",):
        (target / name).write_bytes((adapter / name).read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in sorted(tensors) if "more_B" in key)]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.more_B.weight"] = torch.ones(2)


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(tensors) if "more_A" in key)
    tensors[key] = torch.cat([tensors[key]] * 2)


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(key for key in sorted(tensors) if "more_B" in key)].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks 1 tensors of this adapter, e\.g\. .*more_B"),
        (_rename, r"holds 1 tensors that the adapter does not have, e\.g\. .*layers\.7"),
        (_widen, r"does not fit the base model"),
        (_spoil, r"1 tensors are not finite"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: Path, tmp_path: Path, change: Any, message: str) -> None:
    subject = find_subject(str(_changed(adapter, tmp_path / "a", change)))
    with pytest.raises(UserError, match=message):
        load_text_model(subject, dtype="fp32", device="cpu", max_source_length=64, max_target_length=32)


def test_a_cut_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    path = _changed(adapter, tmp_path / "a", lambda tensors: None)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match="is damaged"):
        load_text_model(find_subject(str(path)), dtype="fp32", device="cpu", max_source_length=8, max_target_length=8)


@pytest.fixture
def run_folder(folder: Path, adapter: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for slot in ("best", "last"):
        _changed(adapter, run / slot, lambda tensors: None) if run.is_dir() else run.mkdir()
        if not (run / slot).is_dir():
            _changed(adapter, run / slot, lambda tensors: None)
    config = {
        "model": str(folder / "base"), "suite": [], "tasks": NAMES, "tasks_file": str(folder / "toy.yaml"),
        "data_dir": str(folder), "max_source_length": 64, "max_target_length": 32, "plain_prompts": False,
        "dtype": "auto", "revision": None, "quantization": "none", "attn_implementation": None,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    return run


def read_results(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "results.json").read_text())["results"]


def test_runner_on_a_run_folder(
    runner: ModuleType, run_folder: Path, tasks: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        runner.main([str(run_folder), "--mode", "both", "--batch-size", "5", "--device", "cpu", "--local_rank=0"]) == 0
    )
    output = capsys.readouterr().out
    assert output.startswith(f"adapter {run_folder}/best on ")
    found = read_results(run_folder / "eval" / "tasks-test")
    assert [(entry["task"], entry["split"], entry["mode"]) for entry in found] == [
        ("accept", "test", "likelihood"), ("grade", "test", "likelihood"), ("choose", "test", "likelihood"),
        ("tell", "test", "generation"), ("accept", "test_hard", "likelihood"), ("accept", "test", "generation"),
        ("grade", "test", "generation"), ("choose", "test", "generation"), ("accept", "test_hard", "generation"),
    ]  # fmt: skip
    assert found[0]["majority"]["accuracy"] > 0
    examples = {t.name: [render(t, toy_row(t.name, i + 4), i) for i in range(11)] for t in tasks}
    expected = evaluate(text_model("llama", NAMES), tasks, examples, task_ids=IDS, batch_size=3, label=None)
    assert [entry["metrics"] for entry in found[:4]] == [result.metrics for result in expected]
    assert f"{found[0]['metrics']['matthews']:.2f}" in output


def test_runner_on_two_ranks(runner: ModuleType, run_folder: Path) -> None:
    argv = [str(run_folder), "--device", "cpu", "--batch_size", "3", "--output_dir"]
    assert runner.main([*argv, str(run_folder / "one")]) == 0
    assert on_ranks(2, lambda rank: runner.main([*argv, str(run_folder / "two")])) == [0, 0]
    assert read_results(run_folder / "one") == read_results(run_folder / "two")


def test_runner_on_a_plain_model_and_as_task(
    runner: ModuleType, folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tail = ["--tasks_file", str(folder / "toy.yaml"), "--tasks", "accept", "--data_dir", str(folder), "--limit", "6"]
    tail += ["--device", "cpu", "--max_source_length", "64"]
    assert runner.main([str(folder / "base"), *tail]) == 0
    assert read_results(tmp_path / "eval_results" / "base" / "accept-toy-test")[0]["n"] == 6
    scores = {}
    for name in ("accept", "grade"):
        assert runner.main([str(adapter), *tail, "--as_task", name, "--output_dir", str(tmp_path / name)]) == 0
        scores[name] = json.loads((tmp_path / name / "predictions.jsonl").read_text().splitlines()[0])["scores"]
    assert scores["accept"] != pytest.approx(scores["grade"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RUN"),
        (["{base}"], "records no tasks; say what to score"),
        (["{base}", "--suites", "glue"], "unknown argument '--suites'; did you mean 'suite'?"),
        (["{base}", "--suite", "gleu"], "unknown suite 'gleu'; did you mean 'glue'?"),
        (["{base}", "--limit", "0"], "'0' is not a positive number"),
        (["{base}", "--tasks_file", "{toy}", "--data_dir", "{base}/none"], "no folder"),
        (["{base}", "--tasks_file", "{toy}", "--data_dir", "{data}", "--split", "tset"], "did you mean 'test'"),
        (["{data}/nowhere", "--tasks_file", "{toy}", "--data_dir", "{data}"], "no model at"),
        (["{adapter}", "--tasks", "cola"], "the adapter does not know 'cola'; it knows: accept, grade, choose, tell"),
        (["{adapter}", "--tasks", "cola", "--as_task", "acept"], "did you mean 'accept'"),
        (["{run}"], "holds no adapter"),
    ],
)
def test_runner_refuses_in_one_line(
    runner: ModuleType, folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "suite": [], "tasks": []}))
    places = {"base": folder / "base", "toy": folder / "toy.yaml", "data": folder, "adapter": adapter, "run": tmp_path}
    assert runner.main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
