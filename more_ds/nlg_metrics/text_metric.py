"""What a metric of generated text is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from more_ds.compare.bootstrap import Floats, Sums

References = Sequence[tuple[str, ...]]
Statistics = Callable[[Sequence[str], References], Floats]


class TextMetric(NamedTuple):
    """A corpus metric of texts against references, which reads the examples through sums alone.

    What all examples share (how rare an n-gram is, say) is counted over the whole corpus once, and a bootstrap does not
    count it anew.

    Attributes:
        sums: texts (None: no text) and references -> the metric.
        signature: what its number depends on; sacreBLEU's own where there is one.
        high: its largest value.
        missing: what has to be installed before it can be computed, or None.
    """

    name: str
    sums: Sums
    signature: str
    high: float = 100.0
    higher_is_better: bool = True
    missing: Callable[[], str | None] = lambda: None


def of_texts(statistics: Statistics, value: Callable[[Floats], float]) -> Sums:
    """Return the metric with no text read as the empty one, and white space as one blank."""

    def cleaned(predictions: Sequence[str | None], golds: References) -> Floats:
        return statistics([" ".join((text or "").split()) for text in predictions], golds)

    return Sums(cleaned, value)
