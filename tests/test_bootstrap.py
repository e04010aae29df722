"""Bootstrap standard errors and the paired test, against closed forms and by both ways of computing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from more_ds.compare.bootstrap import Sums, paired_test, standard_error


def share(predictions: Sequence[int], golds: Sequence[int]) -> float:
    """Accuracy in percent."""
    return 100 * sum(p == g for p, g in zip(predictions, golds, strict=True)) / len(golds)


SHARE = Sums(
    lambda p, g: np.array([(float(a == b), 1.0) for a, b in zip(p, g, strict=True)]), lambda s: float(100 * s[0] / s[1])
)


def test_the_standard_error_of_a_share_is_the_binomial_one() -> None:
    found = standard_error(share, [int(i % 4 == 0) for i in range(400)], [0] * 400, resamples=1000)
    assert found == pytest.approx(100 * (0.75 * 0.25 / 400) ** 0.5, rel=0.07)


def test_the_standard_error_of_a_mean_is_that_of_statistics() -> None:
    values = np.random.default_rng(1).normal(3, 2, 300)
    mean = Sums(lambda p, g: np.stack([np.asarray(p), np.ones(len(p))], axis=1), lambda s: float(s[0] / s[1]))
    assert standard_error(mean, values.tolist(), [0] * 300, 1000) == pytest.approx(values.std() / 300**0.5, rel=0.07)


def test_sums_give_what_the_plain_function_gives() -> None:
    draw = np.random.default_rng(0)
    a, b, gold = (draw.integers(3, size=57).tolist() for _ in range(3))
    assert SHARE(a, gold) == share(a, gold)
    assert standard_error(SHARE, a, gold, 50, seed=3) == pytest.approx(standard_error(share, a, gold, 50, seed=3))
    fast, plain = (paired_test(fn, a, b, gold, 80, seed=5) for fn in (SHARE, share))
    assert fast.p == plain.p
    assert fast.interval == pytest.approx(plain.interval)


def test_the_seed_decides() -> None:
    gold, found = [0, 1] * 20, [0] * 30 + [1] * 10
    first = [standard_error(share, found, gold, 30, seed) for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_a_system_does_not_differ_from_itself() -> None:
    found = [0, 1, 1, 0, 1] * 8
    assert paired_test(share, found, found, [0, 1] * 20) == (0.0, 1.0, (0.0, 0.0))


def test_p_follows_the_normal_approximation_of_mcnemar() -> None:
    # 400 examples; the systems disagree on 60: 38 for the first, 22 for the second. z = 16 / sqrt(60 - 16^2/400).
    gold = [1] * 400
    a = [1] * 38 + [0] * 22 + [1] * 340
    b = [0] * 38 + [1] * 22 + [1] * 340
    result = paired_test(SHARE, a, b, gold, resamples=4000)
    assert result.difference == pytest.approx(4.0)
    assert result.p == pytest.approx(0.0375, abs=0.012)
    assert result.interval == pytest.approx((4 - 3.77, 4 + 3.77), abs=0.4)
    mirrored = paired_test(SHARE, b, a, gold, resamples=4000)
    assert (mirrored.difference, mirrored.p) == (-result.difference, result.p)


def test_pairing_sees_what_two_standard_errors_would_not() -> None:
    """A system that is right wherever the other is, and on eight examples more."""
    gold = [1] * 200
    b = [int(i % 2) for i in range(200)]
    a = [1 if i < 16 else value for i, value in enumerate(b)]
    result = paired_test(SHARE, a, b, gold)
    assert result.difference == pytest.approx(4.0)
    assert result.difference < 2 * standard_error(SHARE, a, gold)
    assert result.p < 0.02
    assert result.interval[0] > 0


@pytest.mark.parametrize(
    ("predictions", "golds", "resamples", "message"),
    [([1], [1, 0], 10, "predictions for 2"), ([], [], 10, "for 0 examples"), ([1], [1], 1, "two or more")],
)
def test_what_cannot_be_resampled(predictions: list[int], golds: list[int], resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        standard_error(share, predictions, golds, resamples)
