"""Task embeddings of a saved MoRE adapter: a map of them, and how alike they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from more_ds.checkpoint_files import ADAPTER
from more_ds.map_names import place_of
from more_ds.reporting.html import beside, folded, heat, section
from more_ds.reporting.svg import points

Floats = NDArray[np.float64]
_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.more_task\.(?:weight|added_\d+)$")


def read_embeddings(adapter: Path) -> dict[str, Floats]:
    """The task embeddings of an adapter, (tasks, width) by adapted map; empty where it has none."""
    path = adapter / ADAPTER
    parts: dict[str, list[tuple[str, Floats]]] = {}
    for key, value in (load_file(path) if path.is_file() else {}).items():
        if found := _KEY.match(key):
            parts.setdefault(found[1], []).append((key, value.astype(np.float64)))
    # `weight` holds the first tasks; the added ones follow in their order.
    order = {
        name: sorted(own, key=lambda part: (not part[0].endswith("weight"), part[0])) for name, own in parts.items()
    }
    return {name: np.concatenate([value for _, value in own]) for name, own in order.items()}


def similarity(embeddings: Sequence[Floats]) -> Floats:
    """Cosine of every pair of tasks, (tasks, tasks), a mean over the maps."""
    return np.mean([unit @ unit.T for unit in map(_unit, embeddings)], axis=0)


def plane(embeddings: Sequence[Floats]) -> tuple[Floats, Floats]:
    """The two main directions (PCA) of the tasks' embeddings, each of length one, of several maps side by side.

    Returns:
        (tasks, 2) places, the sign of each direction such that its largest value is positive; and (2,) the share of the
        variance that each explains.
    """
    joined = np.concatenate([_unit(own) for own in embeddings], axis=1)
    left, sizes, _ = np.linalg.svd(joined - joined.mean(0), full_matrices=False)
    places = np.zeros((len(joined), 2))
    share = np.zeros(2)
    kept = min(2, len(sizes))
    places[:, :kept] = left[:, :kept] * sizes[:kept]
    share[:kept] = sizes[:kept] ** 2 / max(float((sizes**2).sum()), 1e-30)
    for i in range(kept):
        places[:, i] *= np.sign(places[np.abs(places[:, i]).argmax(), i]) or 1.0
    return places, share


def by_layer(embeddings: dict[str, Floats]) -> dict[str, list[Floats]]:
    """The maps' embeddings by layer."""
    layers: dict[str, list[Floats]] = {}
    for name, own in embeddings.items():
        layers.setdefault(place_of(name).layer, []).append(own)
    return layers


def embedding_section(adapter: Path | None, tasks: Sequence[str]) -> str:
    """A map of all layers together, similarities, and a map of each layer; empty for a method without embeddings."""
    embeddings = read_embeddings(adapter) if adapter is not None else {}
    if not embeddings or len(tasks) < 2:
        return ""
    every = list(embeddings.values())
    names = [*tasks, *(f"task {i}" for i in range(len(tasks), len(every[0])))]
    places, share = plane(every)
    title = f"all maps; {share[0]:.0%} and {share[1]:.0%} of the variance"
    layers = {layer: [tuple(place) for place in plane(own)[0].tolist()] for layer, own in by_layer(embeddings).items()}
    alike = similarity(every)
    whole = points({title: [tuple(place) for place in places.tolist()]}, names, columns=1, width=5.2)
    return section(
        "Task embeddings",
        beside(
            f'<div class="half">{whole}</div>',
            heat("cosine similarity, mean over maps", names, names, alike.tolist(), low=0.0, high=1.0, decimals=2),
        ),
        folded("Layer by layer", points(layers, names)),
        note="The best adapter's: principal components of the embeddings, each of length one, all maps side by side.",
    )


def _unit(values: Floats) -> Floats:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)
