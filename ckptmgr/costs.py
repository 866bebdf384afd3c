"""What saving costs a run, measured from the times of its calls: a frozen value, without clocks, threads or JAX.

A save costs the time that its caller waits, and what the steps beside it take longer than steps without a save:
the mean of the ones is compared with the mean of those before and after. A step takes the time from one call of
`save` or `should_save` to the next call with a higher step. Where a call skips steps, each of them takes an equal
part.

A pause, for example for an evaluation, is no step: a time far above the longest usual one counts as `_OUTLIER`
times that. Beside a save many steps may be short and a few long, so what is usual there is told by the longest
step of each save. The bound is the same beside saves and without: what has nothing to do with saving cancels out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ckptmgr.specs import fit_line

_STEPS = 32
"""Of so many steps without a save the times are remembered, to know what is usual."""
_SAVES = 8
"""Of so many saves the costs are remembered."""
_ENOUGH = 3
"""From so many steps it is known how long a step usually takes; from so many saves, the longest beside each."""
_OUTLIER = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One save, the steps beside it, and the steps after it up to the next save. All times in seconds."""

    began: float
    """When `save` was called."""
    blocked_s: float
    """The caller waited so long, without the wait for values that were still being computed."""
    steps_beside: int = 0
    beside_s: float = 0.0
    """The time of these steps; pauses count as outliers."""
    longest_s: float = 0.0
    """The longest of these steps."""
    steps_after: int = 0
    after_s: float = 0.0

    def __repr__(self) -> str:
        return fit_line("Cost", *(f"{name}={value:.3g}" for name, value in dataclasses.asdict(self).items()))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What is known of the steps and the saves of a run. Each method returns the next value."""

    step: int | None = None
    """The step of the newest call."""
    at: float = 0.0
    """When the time of the step after it began."""
    quiet: tuple[float, ...] = ()
    """Seconds of the newest steps without a save beside them."""
    current: Cost | None = None
    """The save that is being written, or whose last step is not over."""
    saves: tuple[Cost, ...] = ()
    """The newest saves that are over, the oldest first."""

    def __repr__(self) -> str:
        parts = [f"saves={len(self.saves)}", f"blocked_s={self.blocked_s:.3g}", f"slowed_s={self.slowed_s:.3g}"]
        return fit_line("Costs", *parts, *([f"step_s={self.step_s:.3g}"] if self.is_step_known else []))

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
        return dataclasses.replace(self._end(), step=step, at=returned, current=current)

    def _end(self) -> Costs:
        if self.current is None:
            return self
        return dataclasses.replace(self, current=None, saves=(*self.saves, self.current)[-_SAVES:])

    def _add(self, seconds: float, steps: int) -> Costs:
        """Steps of so many seconds each. As long as it is not known what is usual, none counts."""
        if self.current is not None:
            return dataclasses.replace(self, current=self._beside(self.current, seconds, steps))
        found = dataclasses.replace(self, quiet=(*self.quiet, seconds)[-_STEPS:])
        if not self.saves or not found._is_usual_known:
            return found
        newest, total_s = self.saves[-1], steps * min(seconds, found._most_s)
        after = dataclasses.replace(
            newest, steps_after=newest.steps_after + steps, after_s=newest.after_s + total_s
        )
        return dataclasses.replace(found, saves=(*self.saves[:-1], after))

    def _beside(self, save: Cost, seconds: float, steps: int) -> Cost:
        if not self._is_usual_known:
            return save
        return dataclasses.replace(
            save,
            steps_beside=save.steps_beside + steps,
            beside_s=save.beside_s + steps * min(seconds, self._most_s),
            longest_s=max(save.longest_s, seconds),
        )

    # ------------------------------------------------------------ what is known

    @property
    def _is_usual_known(self) -> bool:
        return len(self.quiet) >= _ENOUGH

    @property
    def _most_s(self) -> float:
        """The longest time that a step may count with."""
        usual = [statistics.median(self.quiet)]
        if len(self.saves) >= _ENOUGH:
            usual.append(statistics.median(each.longest_s for each in self.saves))
        return _OUTLIER * max(usual)

    @property
    def has_rested(self) -> bool:
        """Whether a step without a save has come after the newest save."""
        return self.current is None and bool(self.saves) and self.saves[-1].steps_after > 0

    @property
    def is_step_known(self) -> bool:
        """Whether it is known how long a step takes without a save."""
        return any(each.steps_after for each in self.saves)

    @property
    def step_s(self) -> float:
        """The mean time of a step without a save."""
        steps = sum(each.steps_after for each in self.saves)
        return sum(each.after_s for each in self.saves) / steps if steps else 0.0

    @property
    def blocked_s(self) -> float:
        """The mean time that the caller waited for one of the remembered saves."""
        return _mean([each.blocked_s for each in self.saves])

    @functools.cached_property
    def slowed_s(self) -> float:
        """What the steps beside a save have lost: the mean of the saves, and its standard error.

        So what is not known well, on a busy machine say, is taken to cost more.
        """
        lost = [each for each in map(self._lost_s, range(len(self.saves))) if each is not None]
        return max(0.0, _mean(lost) + _error(lost))

    def _lost_s(self, place: int) -> float | None:
        """By how much the steps beside a save took longer than those just before and just after it."""
        save, near = self.saves[place], self.saves[max(0, place - 1) : place + 1]
        steps = sum(each.steps_after for each in near)
        return save.beside_s - save.steps_beside * sum(each.after_s for each in near) / steps if steps else None

    @functools.cached_property
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


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean, from successive differences: a disk that becomes slower once is no noise.

    von Neumann 1941, "Distribution of the ratio of the mean square successive difference to the variance".
    """
    squares = [(one - other) ** 2 for one, other in itertools.pairwise(values)]
    return math.sqrt(_mean(squares) / 2 / len(values)) if squares else 0.0


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
