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


TRANSFORMS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "lettered_options": lettered_options,
    "linearise_triples": linearise_triples,
}
