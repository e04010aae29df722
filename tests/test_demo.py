"""The embedded default: generated tasks, tokenisers, and the cached backbone. About 15 s."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from more_ds.demo import DemoPaths, prepare, prepare_data
from more_ds.demo.batches import DOCUMENTS, SORTED, batches, gaps, with_faults, without_ends
from more_ds.demo.cache import fingerprint
from more_ds.demo.generate import HELD_OUT, TRAIN_ROWS, input_key, task_rows, write_tasks
from more_ds.demo.lexicon import GLOSSARY, TRADES
from more_ds.demo.text import documents
from more_ds.demo.tokenizer import SENTINELS, train_tokenizer
from more_ds.errors import UserError
from more_ds.pretrain.tokenizer import Kind
from more_ds.tasks import load_suite, suite_path
from more_ds.tasks.render import render

SPLITS = ("train", "validation", "test")
STEPS = 2

PREPARE = (
    f"import sys; from more_ds.demo import prepare; print(prepare(cache_dir=sys.argv[1], steps={STEPS}).model_dir)"
)


@pytest.fixture(scope="session")
def rows() -> dict[str, dict[str, list[dict]]]:
    return {task: task_rows(task) for task in TRAIN_ROWS}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return prepare(cache_dir=tmp_path_factory.mktemp("cache"), steps=STEPS)


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [str(p.relative_to(folder)).encode() + p.read_bytes() for p in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def test_data_is_the_same_bytes_in_another_process(demo: DemoPaths, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from more_ds.demo.generate import write_tasks; write_tasks(Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True)
    assert digest(tmp_path) == digest(demo.data_dir)


def test_another_seed_gives_other_rows(rows: dict) -> None:
    assert task_rows("boolean", seed=1)["test"] != rows["boolean"]["test"]


def test_sizes_are_uneven_and_held_out_rows_enough(demo: DemoPaths) -> None:
    for task, size in TRAIN_ROWS.items():
        counts = {}
        for split in SPLITS:
            with gzip.open(demo.data_dir / "demo" / task / f"{split}.jsonl.gz", "rt") as lines:
                counts[split] = sum(1 for _ in lines)
        assert counts == {"train": size, "validation": HELD_OUT, "test": HELD_OUT}
    assert max(TRAIN_ROWS.values()) >= 20 * min(TRAIN_ROWS.values())
    assert 200 <= HELD_OUT <= 300


def test_no_input_occurs_twice_in_a_task(rows: dict) -> None:
    for task, splits in rows.items():
        keys = [input_key(row) for split in SPLITS for row in splits[split]]
        assert len(keys) == len(set(keys)), task


def test_unlabelled_text_holds_no_prompt(rows: dict) -> None:
    text = " ".join(islice(documents(17), 3000))
    suite = {task.name: task for task in load_suite(suite_path("demo"))}
    for name, splits in rows.items():
        prompt = render(suite[name], splits["test"][0], 0).prompt
        assert prompt not in text
        assert prompt.split(":")[0] + ":" not in text, name


def test_labels_are_near_balance(rows: dict) -> None:
    for task, splits in rows.items():
        golds = [row["answer"] if "answer" in row else row.get("label") for row in splits["train"]]
        if golds[0] is None:
            continue
        counts = Counter(golds)
        share = max(counts.values()) / len(golds)
        assert share < 1.25 / len(counts), (task, counts)
        assert set(counts) == {row.get("label", row.get("answer")) for row in splits["test"]}, task


def test_labels_follow_from_the_words(rows: dict) -> None:
    """An oracle that knows each word's trade reads the labels off the text."""
    trade = {w: i for i, parts in enumerate(TRADES) for words in parts.values() for w in words}

    def trades(text: str) -> list[int]:
        words = text.replace(".", "").split()
        return [trade[word] for word in words if word in trade]

    for row in rows["similarity"]["train"]:
        (first,) = set(trades(row["sentence1"]))
        assert trades(row["sentence2"]).count(first) == row["label"]
    for row in rows["paraphrase"]["train"]:
        same = set(trades(row["sentence1"])) == set(trades(row["sentence2"]))
        assert same == (row["label"] == 1)
    for row in rows["qa_sentence"]["train"]:
        same = set(trades(row["question"])) == set(trades(row["sentence"]))
        assert same == (row["label"] == 0)
    for row in rows["boolean"]["train"]:
        assert (set(trades(row["passage"])) == set(trades(row["question"]))) == row["answer"]
    for row in rows["entailment"]["train"]:
        same = set(trades(row["premise"])) == set(trades(row["hypothesis"]))
        denied = {"never", "hardly"} & set(row["hypothesis"].split())
        assert row["label"] == (1 if not same else 2 if denied else 0)
    for row in rows["multiple_choice"]["train"]:
        (asked,) = trades(row["question"])
        right = [trade[row[f"choice{i}"]] == asked for i in (1, 2, 3)]
        assert right.count(True) == 1
        assert right[row["label"]]


def test_references_tell_all_the_data(rows: dict) -> None:
    for row in rows["data_to_text"]["train"]:
        values = [fact.split(": ")[1] for fact in row["meaning_representation"].split(", ")]
        assert len(set(row["references"])) == 3
        for reference in row["references"]:
            assert all(value in reference for value in values)


def test_every_row_renders(rows: dict) -> None:
    suite = load_suite(suite_path("demo"))
    assert [task.name for task in suite] == list(TRAIN_ROWS)
    for task in suite:
        for index, row in enumerate(rows[task.name]["train"] + rows[task.name]["test"]):
            example = render(task, row, index)
            assert not example.options or example.target in example.options
        render(task, rows[task.name]["test"][0], 0, plain=True)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tokenizer(kind: str, rows: dict, tmp_path: Path) -> None:
    texts = [*islice(documents(1), 1500), *GLOSSARY]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        tokenizer = train_tokenizer(kind, texts, folder)
    assert digest(folders[0]) == digest(folders[1])
    for text in [*texts[:200], rows["data_to_text"]["test"][0]["meaning_representation"]]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        if kind == "llama":
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.eos_token_id not in ids
        else:
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id
    answers = ("yes", "no", "3.0", "entailment", "contradiction", "unacceptable", "irrelevant")
    for word in answers:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 3
    if kind == "llama":
        odd = "Zoë paid 5 € 😀"
        assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd


def test_gaps_hide_something_and_never_all() -> None:
    rng = random.Random(3)
    for length in range(2, 60):
        hidden = gaps(length, rng)
        assert len(hidden) == length
        assert 0 < sum(hidden) < length
        assert not hidden[0], "a text begins with something to go on"


def test_an_end_is_as_long_in_every_row_and_never_all() -> None:
    rng = random.Random(3)
    rows = [list(range(length)) for length in (4, 4, 5, 9)]
    seen = set()
    for _ in range(50):
        pairs = without_ends(rows, rng)
        assert [source + target for source, target in pairs] == rows
        assert len({len(target) for _, target in pairs}) == 1
        seen.add(len(pairs[0][1]))
    assert seen == {1, 2, 3}


def test_faults_change_every_row_a_little() -> None:
    rng = random.Random(3)
    for length in range(3, 40):
        row = list(range(length))
        faulty = with_faults(row, rng)
        assert faulty != row
        assert abs(len(faulty) - length) <= max(1, length // 10)
        assert len(set(row) - set(faulty)) <= max(1, length // 10)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_document_is_in_a_batch(kind: Kind, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(kind, [*islice(documents(1), 1500), *GLOSSARY], tmp_path)
    rows = []
    for batch in islice(batches(kind, tokenizer, 2), SORTED):
        labels = batch["labels"].clamp_min(0).tolist() if kind == "t5" else [[]] * DOCUMENTS
        rows += [readings(tokenizer, *row) for row in zip(batch["input_ids"].tolist(), labels, strict=True)]
    for text in islice(documents(2), len(rows)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.remove(next(row for row in rows if ids in row))
    assert not rows


def readings(tokenizer: PreTrainedTokenizerBase, source: list[int], target: list[int]) -> list[list[int]]:
    """What the document of a row may be: continued, mended, or filled."""
    sentinels = set(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])) - {None}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    source, target = ([token for token in ids if token not in special] for ids in (source, target))
    hidden: dict[int, list[int]] = {}
    last: list[int] = []
    for token in target:
        if token in sentinels:
            hidden[token] = last = []
        else:
            last.append(token)
    return [source + target, target, [piece for token in source for piece in hidden.get(token, [token])]]


def test_backbone_loads_and_is_reproducible(demo: DemoPaths, tmp_path: Path) -> None:
    again = prepare(cache_dir=tmp_path, steps=STEPS)
    weights = "model.safetensors"
    assert (again.model_dir / weights).read_bytes() == (demo.model_dir / weights).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(demo.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert (demo.model_dir / "pretraining.log").read_text().startswith(f"step {STEPS} of {STEPS}")


def test_pretraining_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare("t5", cache_dir=tmp_path, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_t5_learns_to_fill_gaps(tmp_path: Path) -> None:
    paths = prepare("t5", cache_dir=tmp_path, steps=12)
    lines = (paths.model_dir / "pretraining.log").read_text().splitlines()
    model = AutoModelForSeq2SeqLM.from_pretrained(paths.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(paths.model_dir)
    batch = next(batches("t5", tokenizer, seed=99))
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert lines
    assert loss < 0.9 * torch.tensor(float(len(tokenizer))).log().item()


def test_second_call_builds_nothing(demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("more_ds.demo.cache.build_backbone", unexpected)
    monkeypatch.setattr("more_ds.demo.cache.write_tasks", unexpected)
    monkeypatch.setenv("MORE_DS_CACHE", str(demo.data_dir.parents[1]))
    assert prepare(steps=STEPS) == demo
    assert demo.data_dir.parent.name == f"demo-{fingerprint()}"


def test_the_data_need_no_backbone(tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("a backbone was built")

    monkeypatch.setattr("more_ds.demo.cache.build_backbone", unexpected)
    data_dir = prepare_data(tmp_path)
    assert digest(data_dir) == digest(demo.data_dir)
    assert [path.name for path in data_dir.parent.iterdir() if path.is_dir()] == ["data"]


def test_a_failed_build_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, folder: Path, steps: int) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("more_ds.demo.cache.build_backbone", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(cache_dir=tmp_path, steps=STEPS)
    model_dir = prepare(cache_dir=tmp_path, steps=STEPS).model_dir
    assert (model_dir / "model.safetensors").is_file()
    assert not list(model_dir.parent.glob("*.building"))


def test_a_killed_build_leaves_no_lock_and_nothing_complete(tmp_path: Path) -> None:
    code = PREPARE.replace(f"steps={STEPS}", "steps=100000")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    building = tmp_path / f"demo-{fingerprint()}" / "llama-100000-steps.building"
    try:
        limit = time.monotonic() + 120
        while not (building / "tokenizer.json").is_file():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert building.is_dir()
    assert not building.with_suffix("").exists()
    paths = prepare(cache_dir=tmp_path, steps=STEPS)
    assert (paths.model_dir / "model.safetensors").is_file()


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    folders = {out.strip().splitlines()[-1] for out, _ in ends}
    assert len(folders) == 1
    (folder,) = folders
    AutoModelForCausalLM.from_pretrained(folder)
    assert sum("pretraining" in err for _, err in ends) == 1


def test_bad_arguments_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'llama'"):
        prepare("lama", cache_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        prepare(cache_dir=tmp_path, steps=0)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="MORE_DS_CACHE"):
        prepare(cache_dir=blocked, steps=STEPS)


def test_written_rows_are_plain_json(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    with gzip.open(tmp_path / "demo" / "similarity" / "test.jsonl.gz", "rt") as lines:
        assert all(0.0 <= json.loads(line)["label"] <= 5.0 for line in lines)
