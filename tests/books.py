"""What a run directory must hold, may hold, and must never give: kept by hand, with no code of the package.

A step that `must` be there was accepted, and no policy, caller or stranger has taken it since. Others `may` be
there: no policy keeps it, a process was killed while it was saved, or a stranger has harmed it. Whatever
is read of a step is one of the values that `may` has for it; from a mirror also an earlier one (`ever`).
"""

import collections
import copy
import itertools
import math

_MOST_LISTINGS = 4096


class Books:
    def __init__(self):
        self.must = set()
        self.may = {}  # step -> the values that it may have
        self.ever = collections.defaultdict(set)
        self.about = {}  # value -> (time, loss)
        self.pinned, self.harmed = set(), set()

    def accept(self, step, value, keep):
        """A step was committed, then what no policy keeps was deleted."""
        self.ever[step].add(value)
        self.may[step] = {value}
        self.must.add(step)
        self.harmed.discard(step)
        self.release(keep, step)

    def attempt(self, step, value, keep):
        """A save that nobody knows the end of: a step that must be there stays there, old or new."""
        after = copy.deepcopy(self)
        after.accept(step, value, keep)
        self.ever[step].add(value)
        self.may.setdefault(step, set()).add(value)
        self.must &= after.must | {step}

    def delete(self, step):
        self.must.discard(step)
        self.may.pop(step, None)
        self.pinned.discard(step)
        self.harmed.discard(step)

    def harm(self, step):
        self.must.discard(step)
        if step in self.may:
            self.harmed.add(step)

    def release(self, keep, committed=None):
        """Retention may delete what it would not keep, whichever of the doubtful steps and values it counts.

        A step has one value at a time: it counts with the metrics and the time of that one.
        """
        if not keep:
            return
        found = [
            [(step, value) for value in values] + [None] * (step not in self.must)
            for step, values in self.may.items()
        ]
        if math.prod(map(len, found)) > _MOST_LISTINGS:  # sure is only what retention never deletes (guarantee 7)
            self.must &= {committed, max(self.may)} | self.pinned
            return
        for listing in itertools.product(*found):
            self.must &= self.kept(keep, list(filter(None, listing)), committed)

    def kept(self, keep, counted, committed):
        times = {step: self.about[value][0] for step, value in counted}
        losses = {step: self.about[value][1] for step, value in counted}
        found = {committed, max(times, default=None)} | self.pinned  # what was saved last before a restart may go
        for name, n in keep:
            found |= set(CHOICES[name](n, sorted(times), times, losses))
        return found

    def see(self, listed):
        """Raises if a step that must be there is not listed. What is gone is not to come back."""
        lost = self.must - set(listed)
        assert not lost, f"lost: {sorted(lost)} of {sorted(self.must)}; listed: {sorted(listed)}"
        for step in set(self.may) - set(listed) - self.harmed:  # one without its manifest is not listed
            self.delete(step)
        self.must |= set(self.may) - self.harmed

    def read(self, step, value, *, mirrored=False):
        """Raises if a step cannot have this value."""
        allowed = self.ever[step] if mirrored else self.may.get(step, set())
        assert value in allowed, f"step {step} reads as {value}, and may be {sorted(allowed)}"

    def fails(self, step, problem):
        """Raises if a step must be readable."""
        assert step not in self.must, f"step {step} must be there: {problem}"


def _latest(n, steps, times, losses):
    return steps[-n:]


def _every_steps(n, steps, times, losses):
    return [step for step in steps if step % n == 0]


def _every_seconds(s, steps, times, losses):
    kept, last = [], -math.inf
    for step in sorted(steps, key=lambda step: (times[step], step)):
        if times[step] - last >= s:
            kept, last = [*kept, step], times[step]
    return kept


def _lowest(n, steps, times, losses):
    scored = [(losses[step], -step) for step in steps if losses[step] is not None and losses[step] == losses[step]]
    return [-step for _, step in sorted(scored)[:n]]


CHOICES = {"latest": _latest, "every_steps": _every_steps, "every_seconds": _every_seconds, "best": _lowest}
