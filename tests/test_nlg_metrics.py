"""Metrics of text: by hand, against sacreBLEU's public functions, and against the official programs (15 s)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from more_ds.compare.bootstrap import standard_error
from more_ds.data.rows import load_examples
from more_ds.errors import UserError
from more_ds.metrics import METRICS, require
from more_ds.nlg_metrics import TEXT_METRICS, meteor
from more_ds.nlg_metrics.coco import _longest_common_subsequence
from more_ds.nlg_metrics.tokens import coco, words
from more_ds.tasks import resolve_tasks

TEXTS = ["the red shop sells good bread .", "it is near the old bridge", "a pub"]
REFERENCES: list[tuple[str, ...]] = [
    ("the red shop sells bread .", "good bread at the shop .", "the shop sells good bread ."),
    ("it is near a bridge",),
    ("a cheap pub by the river", "a pub"),
]
LOCAL = [metric.name for metric in TEXT_METRICS if metric.missing is not meteor._missing]


def score(name: str, texts: Any, references: Any) -> float:
    return METRICS[name].fn(texts, references)


def streams() -> Any:
    return [[refs[i] if i < len(refs) else None for refs in REFERENCES] for i in range(3)]


def test_sacrebleu_gives_the_same_from_its_public_functions() -> None:
    bleu = sacrebleu.corpus_bleu(TEXTS, streams(), lowercase=True, tokenize="13a")
    assert score("bleu", TEXTS, REFERENCES) == pytest.approx(bleu.score)
    assert score("chrf", TEXTS, REFERENCES) == pytest.approx(sacrebleu.corpus_chrf(TEXTS, streams()).score)
    chrf_pp = sacrebleu.corpus_chrf(TEXTS, streams(), word_order=2).score
    assert score("chrf++", TEXTS, REFERENCES) == pytest.approx(chrf_pp)
    assert score("ter", TEXTS, REFERENCES) == pytest.approx(sacrebleu.corpus_ter(TEXTS, streams()).score)


def test_an_absent_third_reference_spares_a_short_text_the_brevity_penalty() -> None:
    # All 5, 4, 3 and 2 n-grams of the 5 tokens match. The first example has 3 references: the width of the files.
    full = [("x y z u v w x y z", "x y", "z"), ("A b c d e f, g h",)]
    # Reference lengths: 9 for the first text; 0 for the second, whose lines 2 and 3 are empty (5 - 0 < 9 - 5 is
    # false, so 9 is nearer to 5 than 0 is).
    assert words(full[1][0]) == ["a", "b", "c", "d", "e", "f", ",", "g", "h"]
    texts = ["x y z u v w x y z", "a b c d e"]
    assert score("bleu_3ref", texts, full) == pytest.approx(100 * math.exp(1 - 18 / 14))
    # With 4 tokens the empty line is nearer (4 - 0 < 9 - 4): the length to reach is 9 + 0.
    texts = ["x y z u v w x y z", "a b c d"]
    assert score("bleu_3ref", texts, full) == pytest.approx(100.0)
    assert score("bleu", texts, full) == pytest.approx(100 * math.exp(1 - 18 / 13))
    # Without other references nothing is absent.
    assert score("bleu_3ref", ["a b c d"], full[1:]) == pytest.approx(100 * math.exp(1 - 9 / 4))


def test_three_references_and_no_more_count() -> None:
    refs = [("a b c d", "e f g h", "i j k l", "m n o p")]
    assert score("bleu_3ref", ["i j k l"], refs) == pytest.approx(100.0)
    assert score("bleu_3ref", ["m n o p"], refs) == 0.0
    assert score("ter_3ref", ["M n, o p"], [("m n , q p", "x", "y", "m n , o p")]) == pytest.approx(100 * 1 / (7 / 3))


def test_tokens() -> None:
    assert coco("It's a £20-25, family-friendly pub; you can't go. J. Smith's U.S. bar (new) cannot serve 1,000!") == [
        *("it", "'s", "a", "#", "20-25", "family-friendly", "pub", "you", "ca", "n't", "go", "j.", "smith", "'s"),
        *("u.s.", "bar", "(", "new", ")", "can", "not", "serve", "1,000"),
    ]
    assert words("Bjørn’s Café – “U.S.”, 3.5m_x") == [
        *("bjorn", "'", "s", "cafe", "-", '"', "u", ".", "s", ".", '"', ",", "3", ".", "5m_x"),
    ]
    assert coco(" . ") == words(" ") == []


@given(st.text(max_size=40))
def test_words_are_found_again_in_a_tokenised_file(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)
    assert all(token.strip() for token in coco(text))


def test_rouge_l_by_hand() -> None:
    # "a b d" in common with the first reference (3 of 4 tokens; 3 of 6), "c d" with the second (2 of 4; 2 of 2): the
    # best precision is 3/4 and the best recall 1.
    value = 100 * (1 + 1.44) * (3 / 4) * 1 / (1 + 1.44 * 3 / 4)
    assert score("rouge_l", ["A b, c d."], [("a x b y d z", "c d")]) == pytest.approx(value)
    assert score("rouge_l", ["a b", ""], [("a b",), ("c",)]) == pytest.approx(50.0)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_longest_common_subsequence(first: str, second: str) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert _longest_common_subsequence(first, second) == table[-1][-1]


def test_cider_by_hand() -> None:
    # Two examples, log 2 for an n-gram of one and 0 for one of both ("a"). First text against "a b": unigram vectors
    # b:log 2 and c:log 2 against b:log 2, cosine 1/sqrt 2; bigram "a b" of both and "b c" of the text alone, which is
    # as rare as any unseen one (log 2), cosine 1/sqrt 2; no longer ones. One bigram more: exp(-1/72).
    first = 10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    # Second: "a d" is right, with one unigram that counts and one bigram.
    second = 10 * 2 / 4
    assert score("cider", ["a b c", "a d"], [("a b",), ("a d",)]) == pytest.approx((first + second) / 2)


def test_nist_by_hand() -> None:
    # Reference words: a b a c (4) and a d (2), of 6: a 3, the others 1. Information: a log2 6/3 = 1, b, c, d log2 6;
    # "a b", "a c", "a d" log2 3/1; "b a" log2 1/1 = 0; longer ones 0.
    # Texts: "a b" and "a d d": unigrams a b a d match (5 written), bigrams "a b" "a d" match (3 written).
    information = (2 * 1 + 2 * math.log2(6)) / 5 + 2 * math.log2(3) / 3
    beta = -math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(-beta * math.log(5 / 6) ** 2)
    texts, refs = ["A b", "a d d"], [("a b a c",), ("a d",)]
    assert score("nist", texts, refs) == pytest.approx(information * penalty)
    assert score("nist_mteval", texts, refs) == pytest.approx(information * penalty)
    # A second reference of the second text: 4 + 2 = 6 words to reach; padded it is (4 + 0 + 2 + 2) / 2 = 4, under 5.
    refs = [("a b a c",), ("a d", "e f")]
    ratio = score("nist", texts, refs) / score("nist_mteval", texts, refs)
    assert ratio == pytest.approx(penalty)


@pytest.mark.parametrize("name", LOCAL)
def test_order_emptiness_and_the_best_text(name: str) -> None:
    metric = METRICS[name]
    value, best = score(name, TEXTS, REFERENCES), score(name, [refs[0] for refs in REFERENCES], REFERENCES)
    nothing = score(name, [None, "", " "], REFERENCES)
    assert nothing == score(name, [""] * 3, REFERENCES)
    assert nothing == 0.0 or not metric.higher_is_better
    assert best > value > nothing if metric.higher_is_better else best == 0.0 < value < nothing
    assert metric.low <= value < metric.high
    assert best <= metric.high + 1e-9
    order = [2, 0, 1]
    shuffled = score(name, [TEXTS[i] for i in order], [REFERENCES[i] for i in order])
    assert shuffled == pytest.approx(value, abs=1e-9)
    assert math.isfinite(score(name, [TEXTS[0]], REFERENCES[:1]))
    spaced = [text.replace(" ", "\t  ") for text in TEXTS]
    assert score(name, spaced, REFERENCES) == value, "white space counts"


def test_variants_have_signatures_of_their_own() -> None:
    signatures = {metric.name: METRICS[metric.name].signature for metric in TEXT_METRICS}
    assert len(set(signatures.values())) == len(signatures)
    assert signatures["bleu"] == f"nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


@pytest.mark.parametrize("name", ["bleu", "bleu_3ref", "chrf", "ter", "rouge_l"])
def test_a_resample_of_sums_is_the_metric_of_the_resample(name: str) -> None:
    metric = METRICS[name]
    assert metric.sums is not None
    rows = [0, 0, 2, 1, 2]
    table = metric.sums.statistics(TEXTS, REFERENCES)
    drawn = score(name, [TEXTS[i] for i in rows], [REFERENCES[i] for i in rows])
    assert metric.sums.value(table[rows].sum(axis=0)) == pytest.approx(drawn)
    assert standard_error(metric.sums, TEXTS, REFERENCES, 20) > 0.0


def borrowed_texts(data_dir: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """For every third input of E2E's test set, what a person wrote for the nearest input of the validation set."""
    (task,) = resolve_tasks(["e2e_nlg"])
    test, other = (load_examples(task, split, data_dir=data_dir) for split in ("test", "validation"))
    pool = [(set(re.findall(r"\w[\w ]*\[[^]]*\]", e.prompt)), e.gold) for e in other]
    texts = []
    for number, example in list(enumerate(test))[::3]:
        own = set(re.findall(r"\w[\w ]*\[[^]]*\]", example.prompt))
        slots, refs = max(pool, key=lambda entry: len(own & entry[0]) - len(own ^ entry[0]))
        assert isinstance(refs, tuple)
        text = refs[number % len(refs)]
        for slot in slots:
            if slot.startswith("name["):
                text = text.replace(slot[5:-1], re.findall(r"name\[([^]]*)\]", example.prompt)[0])
        texts.append(text)
    return texts, [example.gold for example in test[::3] if isinstance(example.gold, tuple)]


def test_official_values_on_e2e(data_dir: Path) -> None:
    """What the scripts of the challenge give for the same texts: COCO's scorers behind the Java tokeniser (the package
    pycocoevalcap 1.2), and BLEU and NIST as its python script computes them; `nist_mteval` with perl's penalty."""
    texts, refs = borrowed_texts(data_dir)
    assert len(texts) == len(refs) == 210
    assert score("bleu", texts, refs) == pytest.approx(40.920708, abs=1e-5)
    assert score("nist", texts, refs) == pytest.approx(6.080089, abs=1e-5)
    assert score("nist_mteval", texts, refs) == pytest.approx(6.446353, abs=1e-5)
    assert score("rouge_l", texts, refs) == pytest.approx(49.28001, abs=1e-3)
    assert score("cider", texts, refs) == pytest.approx(0.810761, abs=1e-4)


# What the program itself prints for two texts: its sums, then their score and that of both together.
METEOR_SUMS = [
    "7.0 8.0 3.0 2.0 4.0 4.0 2.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 1.0 0.0 2.0 7.0 7.0",
    "3.0 4.0 0.0 0.0 2.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 2.0 2.0",
]
METEOR_TEXTS = ["the red house is near the river", "john likes apple"]
METEOR_REFERENCES = [
    ("the red house stands near the old river", "a red home is close to the river"),
    ("john likes green apples",),
]


def test_meteor_from_its_sums() -> None:
    table = np.array([[float(number) for number in row.split()] for row in METEOR_SUMS])
    assert meteor._value(table[0]) == pytest.approx(43.329441439642497)
    assert meteor._value(table[1]) == pytest.approx(24.814008416744182)
    assert meteor._value(table.sum(axis=0)) == pytest.approx(36.440653047405974)
    assert meteor._value(np.zeros(23)) == 0.0


def test_a_metric_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meteor, "_jar", lambda: None)
    with pytest.raises(
        UserError, match=r"'meteor_1.5' needs the package pycocoevalcap \(pip install .*leave the metri"
    ):
        require(["bleu", "meteor_1.5"])
    suite = tmp_path / "mine.yaml"
    suite.write_text('tasks: {t: {prompt: "{x}", references: r, metrics: [bleu, meteor_1.5_3ref]}}')
    with pytest.raises(UserError, match=r"'meteor_1\.5_3ref' needs"):
        resolve_tasks(tasks_file=suite)
    monkeypatch.setattr(meteor, "_jar", lambda: Path("meteor-1.5.jar"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match="needs Java on the path"):
        require(["meteor_1.5"])


@pytest.mark.slow
def test_meteor_runs(data_dir: Path) -> None:
    reason = meteor._missing()
    if reason is not None:
        pytest.skip(f"METEOR needs {reason}")
    assert score("meteor_1.5", METEOR_TEXTS, METEOR_REFERENCES) == pytest.approx(36.440653047405974)
    # Three references, the fourth unseen; of an empty text nothing matches.
    assert score("meteor_1.5_3ref", [None, "b"], [("a",), ("x", "y", "z", "b")]) == 0.0
    # What the challenge's scripts give, with the Java tokeniser.
    assert score("meteor_1.5", *borrowed_texts(data_dir)) == pytest.approx(30.35441, abs=0.05)
