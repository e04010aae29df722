"""Answers that outlive the process which computed them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from more_ds.scoring.journal import Journal, name_of

SETTINGS = {"adapter": "a", "beams": 1}


def write(folder: Path) -> None:
    first, second = Journal(folder, SETTINGS, 0), Journal(folder, SETTINGS, 1)
    first.add({"x": [-1.5, -0.1], "y": "text\nand more"})
    second.add({"z": None})
    first.add({"w": 0.1 + 0.2})


def test_all_ranks_answers_are_found_to_the_bit(tmp_path: Path) -> None:
    assert Journal(tmp_path / "none", SETTINGS, 0).known == {}
    assert not (tmp_path / "none").exists()
    write(tmp_path)
    expected = {"x": [-1.5, -0.1], "y": "text\nand more", "z": None, "w": 0.1 + 0.2}
    assert Journal(tmp_path, SETTINGS, 5).known == expected


def test_a_second_interruption_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    Journal(tmp_path, SETTINGS, 0).add({"v": 1})
    assert set(Journal(tmp_path, SETTINGS, 0).known) == {"x", "y", "z", "w", "v"}


@pytest.mark.parametrize("bytes_lost", [1, 5])
def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, bytes_lost: int) -> None:
    write(tmp_path)
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-bytes_lost])
    assert set(Journal(tmp_path, SETTINGS, 0).known) == {"x", "y", "z"}
    Journal(tmp_path, SETTINGS, 0).add({"w": 3})
    assert Journal(tmp_path, SETTINGS, 0).known["w"] == 3


@pytest.mark.parametrize("content", ["", "hello\n", "\xff\n{}", json.dumps(["x", 1]) + "\n", "[1]\n[2]\n"])
def test_other_settings_and_foreign_files_are_not_read(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    assert Journal(tmp_path, SETTINGS | {"beams": 2}, 0).known == {}
    (tmp_path / "answers-0.jsonl").write_text(content)
    assert Journal(tmp_path, SETTINGS, 0).known == {"z": None}


def test_removed_when_the_results_are_there(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    Journal(tmp_path, SETTINGS, 0).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_another_text_is_another_example() -> None:
    names = {
        name_of(kind, split, "cola", index, texts)
        for kind in ("likelihood", "generation")
        for split in ("test", "validation")
        for index in (1, 11)
        for texts in (("a", "b"), ("a b",), ("b", "a"))
    }
    assert len(names) == 24
