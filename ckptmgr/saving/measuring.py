"""Measures what the saves of a manager cost, for save policies that ask for it.

A save ends in the thread that writes. That thread only notes the time; everything else happens in the calls of
the caller, without a lock: if two threads call at once, a measurement may be lost, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ckptmgr import policies
from ckptmgr.cadence import Choice, overhead
from ckptmgr.clock import Clock
from ckptmgr.costs import Costs, Saving


class InFlight:
    """A save from its acceptance to its end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ended: float | None = None

    def end(self) -> None:
        """Called by the thread that writes."""
        self.ended = self._clock.now()


class Meter:
    """The measurements of one manager.

    `is_busy` tells whether a save would wait for an earlier one. `chosen` is called with a step and each notable
    choice of a policy.
    """

    def __init__(
        self,
        clock: Clock,
        save_every: Sequence[policies.SavePolicy],
        is_busy: Callable[[], bool],
        chosen: Callable[[int, Choice], object],
    ) -> None:
        self._clock, self._is_busy, self._chosen = clock, is_busy, chosen
        self._is_on = any(map(policies.asks_about_saving, save_every))
        self._overheads = [each for each in save_every if isinstance(each, overhead)]
        self._told: dict[overhead, Choice] = {}
        self._costs = Costs()
        self._flight = self._begun = InFlight(clock)
        self._waited_s = 0.0

    def now(self) -> float:
        """The time at the start of a call of `save`; 0 if no policy asks."""
        return self._clock.now() if self._is_on else 0.0

    def saving(self) -> Saving:
        """What the policies are told."""
        return Saving(in_progress=self._is_busy(), costs=self._costs)

    def called(self, step: int) -> None:
        """Notes a call of `save` or `should_save`."""
        if not self._is_on:
            return
        before = self._costs
        self._costs = before.called(step, self._clock.now(), self._flight.ended)
        if before.current is not None and self._costs.current is None:
            self._tell(step)

    def wait_for_values(self, *trees: Any) -> None:
        """Waits until the values are computed: that wait is part of the step, and not a cost of the save.

        The copy would wait for them all the same. What fails here fails there too, with a better message.
        """
        if not self._is_on:
            return
        began = self._clock.now()
        with contextlib.suppress(Exception):
            jax.block_until_ready(trees)
        self._waited_s = self._clock.now() - began

    def begin(self) -> InFlight:
        """A save that is about to be handed over. If that fails, it does not count."""
        self._begun = InFlight(self._clock)
        return self._begun

    def saved(self, step: int, began: float) -> None:
        """Notes that a call of `save` is about to return; it has started a save."""
        if self._is_on:
            self._flight = self._begun
            self._costs = self._costs.saved(step, began, self._clock.now(), self._waited_s)

    def _tell(self, step: int) -> None:
        for each in self._overheads:
            choice = each.choice(self._costs)
            if choice is not None and choice.differs(self._told.get(each)):
                self._told[each] = choice
                self._chosen(step, choice)
