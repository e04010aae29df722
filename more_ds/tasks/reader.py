"""Typed access to a mapping read from YAML that collects mistakes instead of stopping at one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from more_ds.errors import suggest


class Reader:
    """Reads the entries of one mapping; mistakes go to `errors`, each with its place in front.

    Every method returns a value of the promised type, a harmless one after a mistake.
    """

    def __init__(self, place: str, entry: Mapping[Any, Any], errors: list[str]) -> None:
        self.place = place
        self.entry = entry
        self.errors = errors

    def fail(self, key: str, message: str) -> None:
        """Note a mistake at `key`."""
        self.errors.append(f"{self.place}.{key}: {message}" if self.place else f"{key}: {message}")

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Note every key that is not in `known`."""
        names = list(known)
        for key in self.entry:
            if key not in names:
                self.fail(str(key), f"unknown key{suggest(str(key), names)}")

    def text(self, key: str, default: str = "") -> str:
        """A text; numbers are taken as text, since `version: 1.0` is one to YAML."""
        value = self.entry.get(key, default)
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        self.fail(key, f"text expected, found {describe(value)}")
        return default

    def optional_text(self, key: str) -> str | None:
        """A text, or None where the key is absent."""
        return self.text(key) if key in self.entry else None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty where the key is absent."""
        value = self.entry.get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        self.fail(key, f"a list of texts expected, found {describe(value)}")
        return ()

    def positive(self, key: str) -> int | None:
        """A positive integer, or None where the key is absent."""
        value = self.entry.get(key)
        if key not in self.entry or (type(value) is int and value > 0):
            return value
        self.fail(key, f"a positive integer expected, found {describe(value)}")
        return None

    def child(self, key: str) -> Reader:
        """A reader of the mapping at `key`, of an empty one where the key is absent."""
        value = self.entry.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"a mapping expected, found {describe(value)}")
            value = {}
        return Reader(f"{self.place}.{key}" if self.place else key, value, self.errors)


def describe(value: Any) -> str:
    """Name a wrong value for a message; YAML 1.1 reads the words yes, no, on, off as booleans."""
    if isinstance(value, bool):
        return f"the boolean {value} (quote the words yes, no, true, false, on, off)"
    if value is None:
        return "nothing"
    return f"{type(value).__name__} {value!r}"


def duplicate_keys(node: yaml.Node | None) -> list[str]:
    """Return "line N: duplicate key 'x'" for each repeated key; `safe_load` keeps the last one."""
    found: list[str] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                found.append(f"line {key.start_mark.line + 1}: duplicate key '{name}'")
            seen.add(name)
            found += duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found += duplicate_keys(item)
    return found
