"""Damaged and missing data files: one readable line each (1 s)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from more_ds.data.row_files import read_rows
from more_ds.data.rows import load_examples, load_split
from more_ds.errors import UserError
from more_ds.tasks.schema import Label, Task

LABELS = (Label("no", ("0",)), Label("yes", ("1",)))


def _task(**fields: Any) -> Task:
    fields = {"labels": LABELS, "path": "s/t", **fields}
    return Task(name="t", suite="s", prompt="{text}", metrics=("accuracy",), primary="accuracy", **fields)


def _rows(count: int, tag: str = "r") -> list[dict[str, Any]]:
    return [{"text": f"{tag}{i}", "label": i % 2} for i in range(count)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _spoiled_gzip() -> bytes:
    return gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in _rows(500)))[:-200]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.jsonl",
            b'{"text": "a", "label": 0}\n\n{"text": \n',
            "train.jsonl, line 3 is not JSON: Expecting value",
        ),
        ("train.jsonl", b'{"text": "a"}\n[1]\n', "train.jsonl, line 2 is no JSON object: [1]"),
        ("train.jsonl", b'{"text": "\xff"}\n', "train.jsonl is damaged: 'utf-8' codec"),
        ("train.jsonl", b"[" * 100_000, "train.jsonl, line 1 is not JSON"),
        ("train.jsonl.gz", b"plain text", "train.jsonl.gz is damaged: Not a gzipped file"),
        ("train.jsonl.gz", _spoiled_gzip(), "train.jsonl.gz is damaged: Compressed file ended"),
        ("train.csv", b"text,label\na,0\nb\n", "train.csv, line 3 has 1 fields, the header 2"),
        ("train.csv", b"text,label\na,0,9\n", "train.csv, line 2 has 3 fields, the header 2"),
        ("train.csv", b"text,text\na,0\n", "train.csv: an empty or repeated column name"),
        ("train.csv", b'text,label\n"a,0\n', "train.csv, line 2: unexpected end of data"),
        ("train.tsv", b'text\tlabel\n"a" b\t0\n', "train.tsv, line 2:"),
        ("train.parquet", b"PAR1 no", "train.parquet is damaged:"),
        ("train.jsonl", b"", "task 't': split 'train' has no rows"),
        ("train.csv", b"text,label\n", "task 't': split 'train' has no rows"),
        ("train.jsonl", b'{"label": 0}\n', "split 'train': task 't', row 0: no column 'text'; found: label"),
        (
            "train.jsonl",
            b'{"text": "a", "label": 0}\n{"text": "b", "label": 7}\n',
            "split 'train': task 't', row 1: label 7 in column 'label' is outside the set; allowed: 0, 1",
        ),
        ("train.xlsx", b"", "no data file in"),
    ],
)
def test_bad_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s/t" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_examples(_task(), "train", data_dir=tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def layout(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: _write(tmp_path / name, _rows(2))


def test_missing_places_say_what_is_there(layout: Callable[[str], Path], tmp_path: Path) -> None:
    layout("s/other/train.jsonl")
    with pytest.raises(UserError) as error:
        load_split(_task(), "train", data_dir=tmp_path)
    assert str(error.value) == (f"task 't': no folder {tmp_path}/s/t; {tmp_path}/s holds: other; check --data_dir")
    layout("s/t/trian.jsonl")
    with pytest.raises(UserError, match=r"no split 'train' \(in .*\); did you mean 'trian'\?"):
        load_split(_task(), "train", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"no file .*/s/x\.csv; .*/s holds: other, t; check its name"):
        load_split(_task(files={"train": tmp_path / "s/x.csv"}), "train")
    layout("s/t/train.jsonl")
    layout("s/t/train.jsonl.gz")
    with pytest.raises(UserError, match="are both split 'train'; keep one"):
        load_split(_task(), "train", data_dir=tmp_path)


def test_long_listings_are_cut(tmp_path: Path) -> None:
    for i in range(15):
        (tmp_path / f"f{i:02}").touch()
    with pytest.raises(UserError, match=r"holds: f00, .*f09 and 5 more; check"):
        list(read_rows(tmp_path / "x.csv"))
