"""Where a run is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """What a checkpoint says beside the weights.

    Attributes:
        step: optimizer steps taken.
        best_score: best mean validation score so far, in percent.
        best_step: the step it was reached at.
        worse_in_a_row: evaluations since then.
        scores: primary metric by title (`majority`, `untuned`, `best`) and task, in percent.
        first_ranks: the ranks that the gates chose at the start, by adapted map.
        evaluated_step: the step of the last evaluation that was completed; -1: none.
        skipped: steps that were left out because their loss was not finite, counted from 0.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    worse_in_a_row: int = 0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    first_ranks: dict[str, list[int]] = field(default_factory=dict)
    evaluated_step: int = -1
    skipped: list[int] = field(default_factory=list)
