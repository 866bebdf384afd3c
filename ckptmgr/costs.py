"""What saving costs a run, measured from the times of its calls: a frozen value, without clocks, threads or JAX.

A save costs the time that its caller waits, and what the steps beside it take longer than steps without a save.
A step takes the time from one call of `save` or `should_save` to the next call with a higher step. Where a call
skips steps, each of them takes an equal part.

A pause, for example for an evaluation, is no step: a time far above the typical one counts as `_OUTLIER` times
the typical one.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ckptmgr.specs import fit_line

_STEPS = 32
"""Of so many steps, with and without a save beside them, the times are remembered."""
_SAVES = 8
"""Of so many saves the costs are remembered."""
_ENOUGH = 3
"""From so many steps without a save it is known how long a step takes."""
_MANY = 8
"""From so many steps beside saves it is known how long these typically take."""
_OUTLIER = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one save has cost, in seconds."""

    began: float
    """When `save` was called."""
    blocked_s: float
    """The caller waited so long, without the wait for values that were still being computed."""
    slowed_s: float = 0.0
    """So much longer took the steps beside it. Below zero if they happened to be faster."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What is known of the steps and the saves of a run. Each method returns the next value."""

    step: int | None = None
    """The step of the newest call."""
    at: float = 0.0
    """When the time of the step after it began."""
    quiet: tuple[float, ...] = ()
    """Seconds of the newest steps without a save beside them."""
    beside: tuple[float, ...] = ()
    """Seconds of the newest steps beside a save."""
    current: Cost | None = None
    """The save that is being written, or whose last step is not over."""
    saves: tuple[Cost, ...] = ()
    """The newest saves that are over, the oldest first."""
    has_rested: bool = False
    """Whether a step without a save has come after the newest save."""

    def __repr__(self) -> str:
        parts = [f"saves={len(self.saves)}", f"blocked_s={self.blocked_s:.3g}", f"slowed_s={self.slowed_s:.3g}"]
        return fit_line("Costs", *parts, *([f"step_s={self.step_s:.3g}"] if self.quiet else []))

    # ------------------------------------------------------------ what happens in a run

    def called(self, step: int, now: float, ended: float | None = None) -> Costs:
        """A call with a step. `ended`: when the current save was over; None: it is still being written."""
        if step == self.step:
            return self
        found = self._end() if ended is not None and ended <= self.at else self
        if found.step is not None and step > found.step:
            steps = step - found.step
            found = found._add((now - found.at) / steps, steps)
        found = found._end() if ended is not None else found
        return dataclasses.replace(found, step=step, at=now)

    def saved(self, step: int, began: float, returned: float, waited_s: float = 0.0) -> Costs:
        """A call of `save` that has started a save. For `waited_s` it waited for values that were not computed."""
        current = Cost(began=began, blocked_s=max(0.0, returned - began - waited_s))
        before = self._end()
        return dataclasses.replace(before, step=step, at=returned, current=current, has_rested=False)

    def _end(self) -> Costs:
        if self.current is None:
            return self
        return dataclasses.replace(self, current=None, saves=(*self.saves, self.current)[-_SAVES:])

    def _add(self, seconds: float, steps: int) -> Costs:
        if self.current is None:
            return dataclasses.replace(self, quiet=(*self.quiet, seconds)[-_STEPS:], has_rested=True)
        found = dataclasses.replace(self, beside=(*self.beside, seconds)[-_STEPS:])
        if not self.is_step_known:
            return found
        slowed_s = steps * (min(seconds, _OUTLIER * found._typical_s) - self.step_s)
        current = dataclasses.replace(self.current, slowed_s=self.current.slowed_s + slowed_s)
        return dataclasses.replace(found, current=current)

    # ------------------------------------------------------------ what is known

    @property
    def is_step_known(self) -> bool:
        """Whether enough steps without a save were seen to know how long a step takes."""
        return len(self.quiet) >= _ENOUGH

    @functools.cached_property
    def step_s(self) -> float:
        """The mean time of a step without a save; pauses count as outliers."""
        most = _OUTLIER * statistics.median(self.quiet)
        return statistics.fmean(min(each, most) for each in self.quiet)

    @property
    def _typical_s(self) -> float:
        """The typical time of a step beside a save. A slow disk may make it many times that of other steps."""
        known = [self.quiet, self.beside] if len(self.beside) >= _MANY else [self.quiet]
        return max(map(statistics.median, known))

    @property
    def blocked_s(self) -> float:
        """The mean time that the caller waited for one of the remembered saves."""
        return _mean([each.blocked_s for each in self.saves])

    @property
    def slowed_s(self) -> float:
        """The mean time that the steps beside a save have lost; 0 if they were not slower."""
        return max(0.0, _mean([each.slowed_s for each in self.saves]))

    @property
    def cost_s(self) -> float:
        """The mean cost of one of the remembered saves."""
        return self.blocked_s + self.slowed_s

    def share(self, now: float) -> float:
        """What the remembered saves have cost, divided by the time since the first of them began."""
        passed_s = now - self.saves[0].began if self.saves else 0.0
        return self.cost_s * len(self.saves) / passed_s if passed_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a save policy is told about saving, if its `should_save` has a parameter `saving`."""

    in_progress: bool
    """Whether a call of `save` would wait: for a save that is being written, or for the callbacks after it."""
    costs: Costs = Costs()


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
