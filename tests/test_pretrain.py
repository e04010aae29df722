"""Pretraining: what is read and in which order, the gaps, and runs as a whole."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from itertools import groupby, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from launch import pretrain
from more_ds import checkpoint
from more_ds.demo.text import documents
from more_ds.errors import UserError
from more_ds.pretrain.corpus import BlockOrder, pack, read_documents, split_documents
from more_ds.pretrain.spans import corrupt, random_spans

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    texts = list(islice(documents(3), 240))
    (folder / "a.txt").write_text("\n\n".join(texts[:120]) + "\n")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts[120:])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return folder


def run(place: Path, name: str, *extra: str, world: int = 1, code: int = 0) -> Path:
    arguments = [
        str(place / "a.txt"), str(place / "b.jsonl.gz"), "--column", "body", "--output_dir", str(place / name),
        "--hidden_size", "32", "--layers", "1", "--heads", "2", "--vocab_size", "500", "--length", "24",
        "--train_batch_size", "8", "--per_device_train_batch_size", "4", "--max_steps", "6", "--warmup_steps", "2",
        "--learning_rate", "1e-2", "--save_steps", "3", *extra,
    ]  # fmt: skip
    assert run_ranks(lambda _: pretrain.main(arguments), world) == [code] * world
    return place / name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def held_out(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row]


@pytest.fixture(scope="module", params=["causal", "spans"])
def whole(place: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, run(place, f"whole-{request.param}", "--objective", request.param)


def test_the_model_is_a_hugging_face_folder_and_has_learnt(whole: tuple[str, Path]) -> None:
    kind, folder = whole
    auto: Any = AutoModelForSeq2SeqLM if kind == "spans" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)
    first, last = held_out(folder)
    assert last < first < np.log(len(tokenizer)) + 2
    assert tokenizer.decode(tokenizer("the red door").input_ids, skip_special_tokens=True) == "the red door"


def test_the_held_out_loss_is_the_models(place: Path, whole: tuple[str, Path]) -> None:
    """Against transformers' own loss, for the causal model: blocks of one length, so a mean of means is the mean."""
    kind, folder = whole
    if kind == "spans":
        pytest.skip("its rows have unequal numbers of labels")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = list(read_documents([place / "a.txt", place / "b.jsonl.gz"], "body"))
    blocks = torch.from_numpy(pack([texts[99], texts[199]], tokenizer, 24).astype("int64"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        assert held_out(folder)[-1] == pytest.approx(float(model(input_ids=blocks, labels=blocks).loss), rel=1e-5)


def test_a_resumed_run_ends_with_the_same_bytes(place: Path, whole: tuple[str, Path]) -> None:
    kind, folder = whole
    original = checkpoint.save

    def save(*arguments: Any, **options: Any) -> Path:
        original(*arguments, **options)
        raise KeyboardInterrupt

    with mock.patch.object(checkpoint, "save", save), pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        run(place, f"cut-{kind}", "--objective", kind)
    cut = run(place, f"cut-{kind}", "--objective", kind, "--resume", "auto")
    for name in ("model/model.safetensors", "metrics.jsonl", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (cut / name).read_bytes()


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_does(place: Path, whole: tuple[str, Path], stage: int) -> None:
    kind, folder = whole
    two = run(place, f"two-{kind}-{stage}", "--objective", kind, "--ds_config", str(DS_CONFIGS / f"zero{stage}.json"),
              world=2)  # fmt: skip
    assert held_out(two) == pytest.approx(held_out(folder), rel=1e-4)
    other = weights(two)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_no_rank_begins_the_folder_before_all_have_looked_at_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = pretrain._check_folder

    def late(settings: Any, resume: bool) -> None:
        time.sleep(float(os.environ["RANK"]))
        look(settings, resume)

    monkeypatch.setattr(pretrain, "_check_folder", late)
    run(place, "late", world=2)


def test_another_seed_gives_another_model(place: Path, whole: tuple[str, Path]) -> None:
    kind, folder = whole
    other = run(place, f"seed-{kind}", "--objective", kind, "--seed", "1")
    assert held_out(other) != held_out(folder)


def test_going_on_from_a_model(place: Path, whole: tuple[str, Path]) -> None:
    kind, folder = whole
    more = run(place, f"more-{kind}", "--objective", kind, "--from_model", str(folder / "model"))
    assert held_out(more)[-1] < held_out(folder)[-1]
    assert not (more / "tokenizer").exists()
    wrong = "causal" if kind == "spans" else "spans"
    run(place, f"wrong-{kind}", "--objective", wrong, "--from_model", str(folder / "model"), code=2)


def test_files_become_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n two \n\n\nthree\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n\n{"text": " "}\n')
    assert list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], "text")) == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is of an unknown kind"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("a.jsonl", b'{"text": 1}\n', "line 1: no text in column 'text'"),
        ("a.jsonl", b'{"body": "x"}\n', "known: body"),
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents([tmp_path / name], "text"))


def test_held_out_texts() -> None:
    texts = [str(i) for i in range(250)]
    learnt, held = split_documents(texts)
    assert held == ["99", "199"]
    assert sorted([*learnt, *held], key=int) == texts
    assert split_documents(["a", "b"]) == (["a"], ["b"])
    with pytest.raises(UserError, match="1 texts in the files"):
        split_documents(["a"])


def test_every_epoch_reads_every_block_once() -> None:
    order = BlockOrder(7, 3, seed=5)
    read = [block for step in range(14) for block in order.step(step)]
    epochs = [read[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert BlockOrder(7, 3, seed=5).step(9) == read[27:30], "a resumed run asks for the middle"
    assert BlockOrder(7, 3, seed=6).step(0) != read[:3]


@pytest.mark.parametrize("length", [2, 3, 10, 24, 512])
def test_gaps_are_as_many_and_as_long_as_asked(length: int) -> None:
    for seed in range(30):
        hidden = random_spans(length, 0.15, 3.0, 100, random.Random(seed))
        assert len(hidden) == length
        assert sum(hidden) == max(1, round(0.15 * length))
        runs = [covered for covered, _ in groupby(hidden)]
        assert runs[0] is False
        assert runs.count(True) == max(1, round(sum(hidden) / 3))


def test_gaps_are_no_more_than_there_are_sentinels() -> None:
    hidden = random_spans(1000, 0.5, 1.0, 8, random.Random(0))
    assert [covered for covered, _ in groupby(hidden)].count(True) == 8


def test_a_corrupted_text_can_be_put_together_again() -> None:
    ids = list(range(10, 40))
    source, target = corrupt(ids, random_spans(30, 0.3, 2.0, 9, random.Random(1)), range(100, 109))
    gaps: dict[int, list[int]] = {}
    for token in target:
        if token >= 100:
            gaps[token] = []
        else:
            gaps[list(gaps)[-1]].append(token)
    assert [t for token in source for t in gaps.get(token, [token])] == ids


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--heads", "3"], "--hidden_size 32 is no multiple of --heads 3"),
        (["--from_model", "x", "--config", "y"], "--from_model brings its own"),
        (["--train_batch_size", "6"], "does not divide"),
        (["--ds_config", "nowhere.json"], "nowhere.json does not exist"),
        (["--vocab_size", "100000"], "--vocab_size 100000 does not fit these texts"),
        (["--column", "nobody"], "no text in column 'nobody'"),
    ],
)
def test_mistakes(place: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(place, f"wrong{len(message)}", *extra, code=2)
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_sharding_that_only_gpus_can_do_is_refused(
    place: Path, quantised_gathers: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(place, "qwz", "--ds_config", str(quantised_gathers), code=2)
    assert "zero_quantized_weights in the ds_config needs a GPU" in capfd.readouterr().err
    assert not (place / "qwz").exists()


def test_another_runs_folder_is_refused(
    place: Path, whole: tuple[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    kind, folder = whole
    run(place, folder.name, "--objective", kind, code=2)
    assert "holds another run; name another folder, or add --resume auto" in capfd.readouterr().err
    run(place, folder.name, "--objective", kind, "--resume", "auto", "--seed", "7", code=2)
    assert "seed was 0, is 7" in capfd.readouterr().err
