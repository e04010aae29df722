"""METEOR 1.5 (Denkowski and Lavie 2014): its own Java program, an optional extra.

`pip install pycocoevalcap` brings the program with its English paraphrases; Java has to be on the path.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from more_ds.compare.bootstrap import Floats
from more_ds.nlg_metrics.text_metric import References, TextMetric, of_texts
from more_ds.nlg_metrics.tokens import coco, words

Tokenise = Callable[[str], list[str]]

_ALPHA, _POWER, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""Of the matchers: exact, stem, synonym, paraphrase."""


def _missing() -> str | None:
    if _jar() is None:
        return "the package pycocoevalcap (pip install pycocoevalcap)"
    return None if shutil.which("java") else "Java on the path"


def _jar() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = [Path(folder, "meteor", "meteor-1.5.jar") for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def _sums(texts: Sequence[str], golds: References, tokenise: Tokenise, most: int | None) -> Floats:
    """(examples, 23): the program's own sums.

    Lengths (text, reference), function words (text, reference); for each matcher the matches in content words (text,
    reference) and function words (text, reference); chunks; words matched (text, reference).
    """
    jar = _jar()
    if jar is None:
        raise FileNotFoundError(_missing())
    lines = [_line([*refs[:most], text], tokenise) for text, refs in zip(texts, golds, strict=True)]
    command = ["java", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", cwd=jar.parent, text=True, capture_output=True,
                          encoding="utf-8", check=True)  # fmt: skip
    return np.array([[float(number) for number in row.split()] for row in done.stdout.splitlines()])


def _line(texts: Sequence[str], tokenise: Tokenise) -> str:
    return " ||| ".join(["SCORE", *(" ".join(tokenise(text)).replace("|||", "") for text in texts)])


def _value(sums: Floats) -> float:
    lengths, function = sums[0:2], sums[2:4]
    content_matches, function_matches = sums[4:20].reshape(4, 2, 2).transpose(1, 2, 0)
    weighted = _DELTA * content_matches @ _WEIGHTS + (1 - _DELTA) * function_matches @ _WEIGHTS
    precision, recall = weighted / np.maximum(_DELTA * (lengths - function) + (1 - _DELTA) * function, 1e-12)
    if not precision or not recall:
        return 0.0
    mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
    chunks, matched = sums[20], sums[21:23]
    broken = 0.0 if chunks == 1 and (matched == lengths).all() else chunks / matched.mean()
    return 100.0 * float(max(mean * (1 - _GAMMA * broken**_POWER), 0.0))


def _metric(name: str, tokenise: Tokenise, most: int | None, extra: str) -> TextMetric:
    def statistics(texts: Sequence[str], golds: References) -> Floats:
        return _sums(texts, golds, tokenise, most)

    signature = f"meteor-1.5-wo-en-norm-0.85_0.2_0.6_0.75-ex_st_sy_pa-1.0_0.6_0.8_0.6|{extra}"
    return TextMetric(name, of_texts(statistics, _value), signature, missing=_missing)


METEOR = _metric("meteor_1.5", coco, None, "tok:coco")
"""METEOR 1.5 with all references on COCO's tokens, as the E2E challenge reports it, in percent."""

METEOR_3REF = _metric("meteor_1.5_3ref", words, 3, "text:webnlg2017|refs:first3")
"""METEOR 1.5 of WebNLG 2017 and DART: text in `words`, the first three references, in percent."""
