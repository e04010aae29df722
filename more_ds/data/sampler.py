"""Which samples of which task each optimizer step trains on: a pure plan, the same on every rank.

The plan has two independent parts, both with random access:

* the *task sequence*: which task fills unit 0, 1, 2, ... A unit is a group of `group_size` samples
  (scope "micro_batch") or a whole optimizer step (scope "step").
* the *passes* of one task: pass k over its samples is a permutation seeded by (seed, task, k), and
  the task's stream is pass 0, pass 1, ... end to end, so nothing is dropped or repeated early.

World size, rank and micro-batch size are no part of it: a rank's view is a slice of the ordered
global batch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from more_ds.data.far_passes import FAR, FarPasses
from more_ds.data.shares import STRATEGIES, covering_units, task_probabilities
from more_ds.data.streams import AnyIntArray, IntArray, Passes, TaskSequence
from more_ds.digest import digest, digest_integers
from more_ds.errors import UserError, suggest

__all__ = [
    "SCOPES",
    "STRATEGIES",
    "BalancedSampler",
    "StepPlan",
    "TaskSummary",
    "task_probabilities",
]

SCOPES = ("micro_batch", "step")

_STATE_VERSION = 1
_CHUNK_UNITS = 4096


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step's global batch, in order: read-only arrays of shape [global_batch].

    Attributes:
        tasks: the task of each sample.
        indices: the sample's index within its task's own data set.
    """

    tasks: IntArray
    indices: IntArray


@dataclass(frozen=True)
class TaskSummary:
    """What a number of steps does with one task; `passes` is samples / size, the repeats."""

    name: str
    size: int
    share: float
    samples: int
    passes: float


class BalancedSampler:
    """Same-task batches in fixed shares, elastic over the world size, resumable at any step.

    The global batch is `group_size * groups_per_step` samples. A group holds one task; it is the
    micro-batch of the run that began, and a resumed run may use any micro-batch that divides it.
    With scope "step" the whole optimizer step holds one task, as in the paper, and any split fits.

    An epoch is ceil(sum of sizes / global batch) steps, in which a task gets its share of units
    within a few (fractions carry on into the next epoch). With strategy "proportional" each task
    instead gets a constant whole number of units an epoch, enough to show every sample in every
    epoch and less than one global batch more, so an epoch may be some steps longer.

    Deviation from the paper's published code, which draws tasks independently: the shares are the
    same, the fluctuation is smaller.

    Attributes:
        probabilities: what the strategy asks for, [num_tasks].
        shares: the share of samples each task gets, [num_tasks]; equal to `probabilities` except
            that "proportional" rounds up to whole units.
        steps_per_epoch: optimizer steps in an epoch.
        next_step: the next step to train; kept by the training loop, saved in the state.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        strategy: str = "exp_share",
        scope: str = "micro_batch",
        group_size: int,
        groups_per_step: int,
        seed: int = 0,
        temperature: float = 1.0,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        lengths: Sequence[AnyIntArray] | None = None,
    ) -> None:
        """Make the plan of the tasks with `sizes` samples each; `names` label and identify them.

        With the samples' `lengths`, [size] for each task, what is trained together is of similar length.

        Raises:
            UserError: see `task_probabilities`; or an unknown scope, a count below 1, a seed
                outside [0, 2**32), or a number of names that is not the number of tasks.
        """
        self.sizes = [operator.index(size) for size in sizes]
        self.probabilities = task_probabilities(self.sizes, strategy, temperature, weights)
        if scope not in SCOPES:
            raise UserError(f"unknown sampling scope '{scope}'{suggest(scope, SCOPES)}")
        for label, count in (("group_size", group_size), ("groups_per_step", groups_per_step)):
            if count < 1:
                raise UserError(f"{label} must be at least 1; found {count}")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must be in [0, 2**32); found {seed}")
        self.names = [f"task {t}" for t in range(len(self.sizes))] if names is None else list(names)
        if len(self.names) != len(self.sizes):
            raise UserError(f"found {len(self.names)} task names for {len(self.sizes)} tasks")
        self.scope, self.group_size, self.groups_per_step = scope, group_size, groups_per_step
        self.global_batch = group_size * groups_per_step
        self.next_step = 0
        self._fields = {
            "strategy": strategy,
            "scope": scope,
            "group_size": group_size,
            "groups_per_step": groups_per_step,
            "seed": seed,
            "temperature": float(temperature),
            "weights": None if weights is None else digest([float(w) for w in weights]),
            "tasks": digest([self.names, self.sizes]),
        }
        if lengths is not None:
            if [len(own) for own in lengths] != self.sizes:
                raise UserError(f"found {[len(own) for own in lengths]} lengths for {self.sizes} samples")
            self._fields["lengths"] = digest([digest_integers(own) for own in lengths])
        self._build(strategy == "proportional", seed, lengths)

    def _build(self, covering: bool, seed: int, lengths: Sequence[AnyIntArray] | None) -> None:
        one_task_step = self.scope == "step"
        self._unit = self.global_batch if one_task_step else self.group_size
        self._step_units = 1 if one_task_step else self.groups_per_step
        self._chunk: tuple[int, IntArray, IntArray] | None = None
        self._last: tuple[int, StepPlan] | None = None
        per_epoch: list[int | None] = [None] * len(self.sizes)
        if covering:
            counts = covering_units(self.sizes, self._unit, self._step_units)
            self.steps_per_epoch = sum(counts) // self._step_units
            self.shares = np.array(counts) / sum(counts)
            rates = [float(count) for count in counts]
            per_epoch = [count * self._unit for count in counts]
        else:
            self.steps_per_epoch = -(-sum(self.sizes) // self.global_batch)
            self.shares = self.probabilities
            # Twelve digits: the last bits of exp() differ between machines' math libraries.
            rates = [float(f"{share:.12g}") for share in self.shares]
        self._sequence = TaskSequence(rates, seed)
        self._passes = [
            (FarPasses if size > FAR else Passes)(
                size, task, seed, per_epoch[task], None if lengths is None else lengths[task], self._unit
            )
            for task, size in enumerate(self.sizes)
        ]

    def step(self, step: int) -> StepPlan:
        """The global batch of optimizer step `step`, counted from 0; the cost does not grow."""
        if self._last is None or self._last[0] != step:
            self._last = (step, self._plan(step))
        return self._last[1]

    def _plan(self, step: int) -> StepPlan:
        length = max(1, _CHUNK_UNITS // self._step_units)  # steps, so that no step is cut
        chunk, within = divmod(step, length)
        if self._chunk is None or self._chunk[0] != chunk:
            start = chunk * length * self._step_units
            self._chunk = (chunk, *self._sequence.units(start, start + length * self._step_units))
        part = slice(within * self._step_units, (within + 1) * self._step_units)
        units, ordinals = self._chunk[1][part], self._chunk[2][part]
        taken = [
            self._passes[task].take(ordinal * self._unit, self._unit)
            for task, ordinal in zip(units.tolist(), ordinals.tolist(), strict=True)
        ]
        tasks, indices = np.repeat(units, self._unit), np.concatenate(taken)
        tasks.flags.writeable = indices.flags.writeable = False
        return StepPlan(tasks, indices)

    def micro_batches(self, step: int, *, rank: int, world_size: int, accumulation: int) -> list[tuple[int, IntArray]]:
        """This rank's (task, indices) of `step`, one for each accumulation slot, all equally long.

        The global batch is cut into world_size * accumulation equal pieces; piece j belongs to slot
        j // world_size of rank j % world_size, so the pieces are trained in the plan's order.

        Raises:
            UserError: the pieces are not equal, or would mix tasks.
        """
        if not 0 <= rank < world_size or accumulation < 1:
            raise ValueError(f"no rank {rank} of {world_size}, accumulation {accumulation}")
        pieces = world_size * accumulation
        size, rest = divmod(self.global_batch, pieces)
        if rest:
            raise UserError(
                f"the global batch of {self.global_batch} does not divide by world size "
                f"{world_size} x accumulation {accumulation} = {pieces}; "
                "change one of the three"
            )
        if self._unit % size:
            raise UserError(
                f"a micro-batch of {size} does not divide the same-task group of {self._unit} "
                f"samples; use a micro-batch that divides {self._unit} with more accumulation, "
                "or sampling scope 'step'"
            )
        plan = self.step(step)
        starts = range(rank * size, self.global_batch, world_size * size)
        return [(int(plan.tasks[i]), plan.indices[i : i + size]) for i in starts]

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 0, that `step` belongs to."""
        return step // self.steps_per_epoch

    def counts(self, epoch: int) -> IntArray:
        """Samples of each task in `epoch`, shape [num_tasks]."""
        start = epoch * self.steps_per_epoch
        return self._samples_before(start + self.steps_per_epoch) - self._samples_before(start)

    def summary(self, num_steps: int) -> list[TaskSummary]:
        """What the first `num_steps` steps do with each task, for the printed plan."""
        samples = self._samples_before(num_steps).tolist()
        rows = zip(self.names, self.sizes, self.shares.tolist(), samples, strict=True)
        return [TaskSummary(name, size, share, seen, seen / size) for name, size, share, seen in rows]

    def _samples_before(self, step: int) -> IntArray:
        return self._sequence.before(step * self._step_units) * self._unit

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan as plain JSON under 1 kB.

        A run resumed on another micro-batch size or world size builds its sampler with the saved
        state["plan"]["group_size"] and state["plan"]["groups_per_step"], not with its own.
        """
        return {"version": _STATE_VERSION, "next_step": self.next_step, "plan": dict(self._fields)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the saved place.

        Raises:
            UserError: the state is damaged, or belongs to another plan; it names the first field.
        """
        step, plan = state.get("next_step"), state.get("plan")
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"sampler state version {state.get('version')} cannot be read; this more_ds "
                f"reads version {_STATE_VERSION}; resume with the more_ds that wrote it"
            )
        if type(step) is not int or step < 0 or not isinstance(plan, Mapping):
            raise UserError(
                f"the sampler state is damaged; found next_step {step!r} and a plan of type "
                f"{type(plan).__name__}; resume from another checkpoint"
            )
        for field in sorted({*self._fields, *plan}):
            saved, ours = plan.get(field, "absent"), self._fields.get(field, "absent")
            if saved != ours:
                raise UserError(
                    f"the sampler state belongs to another plan: {field} is {saved!r} in the "
                    f"state and {ours!r} in this run; resume with the settings and data it began "
                    "with, or start a run in another output folder"
                )
        self.next_step = step
