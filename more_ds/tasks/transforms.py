"""Named row transforms: pure functions from a row to a row, for what a template cannot say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]


def lettered_options(row: Row) -> dict[str, Any]:
    """Add column `lettered`, "(A) first (B) second", from the list in column `options`.

    Raises:
        ValueError: there is no such list.
    """
    options = row.get("options")
    if not isinstance(options, (list, tuple)) or not options:
        raise ValueError("needs a column 'options' holding a list")
    pairs = (f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return {**row, "lettered": " ".join(pairs)}


def linearise_triples(row: Row) -> dict[str, Any]:
    """Add column `triples`, "s | p | o; s | p | o", from column `tripleset` (WebNLG, DART).

    Raises:
        ValueError: the column is not a list of triples of texts.
    """
    triples = row.get("tripleset")
    if not isinstance(triples, (list, tuple)) or not triples:
        raise ValueError("needs a column 'tripleset' holding a list of triples")
    if any(not isinstance(triple, (list, tuple)) or len(triple) != 3 for triple in triples):
        raise ValueError("an entry of 'tripleset' is not a triple")
    return {**row, "triples": "; ".join(" | ".join(map(str, triple)) for triple in triples)}


def numbered_choices(row: Row) -> dict[str, Any]:
    """Read `choices` ({text: [...], label: [...]}) and `answerKey` as ARC and OpenBookQA have them.

    Adds `listed`, "Answer1: first Answer2: second", `names`, ["answer1", "answer2"], `format`, "answer1/answer2", and
    `label`, the index of the right one. Rows have three to five choices, and keys A to E or 1 to 5.

    Raises:
        ValueError: a column is missing or of another form, or the key is none of the labels.
    """
    choices, key = row.get("choices"), row.get("answerKey")
    texts, labels = (choices.get(name) for name in ("text", "label")) if isinstance(choices, Mapping) else (None, None)
    if not isinstance(texts, (list, tuple)) or not isinstance(labels, (list, tuple)) or len(texts) != len(labels):
        raise ValueError("needs a column 'choices' holding as many labels as texts")
    if key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the labels {list(labels)}")
    names = [f"answer{i}" for i in range(1, len(texts) + 1)]
    listed = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
    return {**row, "listed": listed, "names": names, "format": "/".join(names), "label": labels.index(key)}


def four_endings(row: Row) -> dict[str, Any]:
    """Add columns `ending1` to `ending4` from the list in column `endings` (HellaSwag).

    Raises:
        ValueError: there are not four.
    """
    endings = row.get("endings")
    if not isinstance(endings, (list, tuple)) or len(endings) != 4:
        raise ValueError("needs a column 'endings' holding a list of four")
    return {**row, **{f"ending{i}": ending for i, ending in enumerate(endings, start=1)}}


TRANSFORMS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "lettered_options": lettered_options,
    "linearise_triples": linearise_triples,
    "numbered_choices": numbered_choices,
    "four_endings": four_endings,
}
