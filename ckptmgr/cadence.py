"""Save as often as it pays: two save policies that go by what saving costs. Pure, as `policies` are.

They keep no state. What they go by is measured by the manager (`saving/measuring`), collected in a frozen value
(`costs`), and passed in with each question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptmgr.costs import Costs, Saving
from ckptmgr.policies import Record
from ckptmgr.units import format_s

_NOTABLE = 1.25
"""An interval that changes by this factor is worth a line in the log."""


@dataclass(frozen=True)
class as_often_as_possible:  # noqa: N801 - reads as a word of the option it is passed to
    """Saves as soon as the save before is durable, and the work after its commit is done.

    So no call of `save` waits for the save before. At least `min_seconds` pass between two saves.
    """

    min_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not _is_number(self.min_seconds) or not 0 <= self.min_seconds < math.inf:
            raise ValueError(f"as_often_as_possible takes min_seconds of 0 or more, not {self.min_seconds!r}")

    def should_save(self, step: int, *, now: float, last: Record | None, saving: Saving | None = None) -> bool:
        if saving is not None and saving.in_progress:
            return False
        return last is None or now - last.time >= self.min_seconds


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `overhead` has chosen, and the measurements that it rests on. All times in seconds."""

    share: float
    interval_s: float
    """The time between two saves."""
    cost_s: float
    """What a save costs: `blocked_s` and `slowed_s`."""
    blocked_s: float
    slowed_s: float
    step_s: float
    """How long a step takes without a save."""

    def differs(self, other: Choice | None) -> bool:
        """Whether the interval differs enough to be worth a word."""
        if other is None:
            return True
        most, least = max(self.interval_s, other.interval_s), min(self.interval_s, other.interval_s)
        return most > least * _NOTABLE

    def __str__(self) -> str:
        times = (self.interval_s, self.cost_s, self.blocked_s, self.slowed_s, self.step_s)
        interval, cost, blocked, slowed, step = map(format_s, times)
        return (
            f"overhead({self.share:g}) saves about every {interval}, because a save costs {cost}: the caller "
            f"waits {blocked}, and the steps beside it are slower by {slowed}. A step takes {step}"
        )


@dataclass(frozen=True)
class overhead:  # noqa: N801
    """Saves as often as possible, while saving costs at most a share of the run's time.

    A save costs the time that its caller waits, and the time by which steps are slower while it is being written.
    If the steps differ much, as on a busy machine, this cost is estimated too high rather than too low. The loop
    must wait for each step, with `float(loss)` or `jax.block_until_ready`: else only a part of the cost is seen.

    The first step offered is saved, to learn from it. After that the newest eight saves are remembered: a step is
    saved if their cost, divided by the time since the first of them began, is at most `share`. So the interval
    follows a disk that becomes slower or faster with the next save. Saves by force, preemption and other policies
    count too.

    No save begins while another is being written, nor before a step has passed without a save: with such steps
    those beside a save are compared.
    """

    share: float

    def __post_init__(self) -> None:
        if not _is_number(self.share) or not 0 < self.share < 1:
            raise ValueError(f"overhead takes a share between 0 and 1, for example 0.02, not {self.share!r}")

    def should_save(self, step: int, *, now: float, last: Record | None, saving: Saving | None = None) -> bool:
        if saving is None:
            return last is None
        costs = saving.costs
        if saving.in_progress or costs.current is not None:
            return False
        if not costs.saves:
            return True
        return costs.has_rested and self._is_paid(costs, now)

    def _is_paid(self, costs: Costs, now: float) -> bool:
        """Whether the time since the saves makes up for their cost.

        After a pause much time has passed at once. So that no burst of saves follows, they are at least half an
        interval apart.
        """
        is_apart = now - costs.saves[-1].began >= self.interval_s(costs) / 2
        return is_apart and costs.share(now) <= self.share

    def interval_s(self, costs: Costs) -> float:
        """The time between two saves that these costs allow."""
        return costs.cost_s / self.share

    def choice(self, costs: Costs) -> Choice | None:
        """What is chosen, and why; None as long as it is not known what a save costs."""
        if not costs.saves or not costs.is_step_known:
            return None
        return Choice(
            share=self.share,
            interval_s=self.interval_s(costs),
            cost_s=costs.cost_s,
            blocked_s=costs.blocked_s,
            slowed_s=costs.slowed_s,
            step_s=costs.step_s,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
