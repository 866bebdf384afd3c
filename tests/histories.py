"""Random histories of a run directory: what we do, what strangers do and what happens, each beside `books`.

A history is a text, `save:3 reopen:8 rename:1`: each word is an operation and the seed of its choices. So one
that finds something can be cut down, kept, and played again:

    python tests/histories.py "save:3 reopen:8"        plays one, and says what it does
    python tests/histories.py FIRST COUNT              plays those of some seeds, and cuts down what fails
"""

import contextlib
import functools
import gc
import grp  # noqa: F401  # another user may not import it
import itertools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import books
import faults
import moments
import numpy as np

import ckptmgr

LIMIT_S = int(os.environ.get("HISTORY_LIMIT_S", "60"))
KEEPS = [
    [], [("latest", 1)], [("latest", 2)], [("latest", 3)], [("best", 1)], [("latest", 1), ("best", 2)],
    [("every_steps", 3), ("latest", 2)], [("every_seconds", 25)], [("every_seconds", 40), ("best", 1)],
]  # fmt: skip
POLICIES = {
    "latest": ckptmgr.latest, "every_steps": ckptmgr.every_steps, "every_seconds": ckptmgr.every_seconds,
    "best": functools.partial(ckptmgr.best, "loss"),
}  # fmt: skip
FAULTS = [
    "before arrays 2", "before description 1", "before file 3", "before file 9", "before sync 1",
    "before publish 1", "after publish 1", "before exchange 1", "after exchange 1", "before retain 1",
    "after choose 1", "before delete 1", "before rename 2", "before remove 1", "after remove 1",
    "fail arrays 1", "fail file 4", "short file 5", "full sync 1", "fail publish 1", "fail exchange 1",
    "fail delete 1", "fail remove 1", "fail choose 1",
]  # fmt: skip
NAMES = [
    "0",
    "3",
    "7",
    "11",
    "2024",
    "007",
    "-1",
    "notes",
    "5.bak",
    "old-5",
    "x.replaced",
    ".hidden",
    "tmp",
    "ü ☃",
]


def state(value, step):
    number = np.float32(value * 1000 + step)
    return {
        "params": {"w": np.arange(32, dtype=np.float32) + number, "n": value},
        "opt_state": {"m": np.full((3, 2), number)},
        "extras": {"position": {"value": value, "step": step}},
    }


def value_of(found):
    """What was saved as the step that was restored, which must be so bit for bit."""
    value = found.params["n"]
    wanted = state(value, found.step)
    assert set(found.params) == set(wanted["params"])
    assert found.params["w"].tobytes() == wanted["params"]["w"].tobytes(), found
    assert found.opt_state["m"].tobytes() == wanted["opt_state"]["m"].tobytes(), found
    assert found.extras == wanted["extras"], found
    return value


def claim(holds, what):
    """An assertion, also about an exception that was caught."""
    if not holds:
        raise AssertionError(what)


def policies(keep):
    return [POLICIES[name](n) for name, n in keep] or None


def content(path):
    """What is at a path: of a folder everything below it. Links are not followed."""
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return {each.name: content(each) for each in path.iterdir()}
    return path.read_bytes() if path.is_file() else path.exists()


# ---------------------------------------------------------------- a history


class World:
    def __init__(self, root, helper, tell=lambda line: None):
        self.run, self.away, self.elsewhere = root / "run", root / "away", root / "elsewhere"
        self.elsewhere.mkdir()
        (self.elsewhere / "precious").write_bytes(b"precious")
        self.helper, self.tell = helper, tell
        self.books = books.Books()
        self.now, self.made = 1000.0, 0
        self.flying = None  # the save that was not waited for: step, value, the books before it
        self.theirs = {}  # what strangers have put, by path
        self.parked = {}  # steps that they have renamed: path -> step, its values, whether it was whole and pinned
        self.came_back, self.unseen = set(), None  # steps renamed back; one of them, saved without a look at it
        self.unclear = set()  # harmed steps under another number: they may pass for a damaged step of that number
        self.aside = {}  # what a rewind has set aside: step -> the values that it may bring back
        self.harmed_aside, self.pinned_aside = set(), set()  # steps; steps with their values
        self.aside_gone = set()  # strangers have removed what was set aside of these
        self.draw = random.Random(0)
        self.open([], mirrored=False)
        self.reader = ckptmgr.CheckpointManager(self.run, read_only=True)

    def play(self, history):
        for word in history.split():
            name, _, seed = word.partition(":")
            self.draw = random.Random(f"{name}{seed}")
            self.now += 10
            self.tell(f"--- {word}")
            OPERATIONS[name][1](self)
            self.check()

    def check(self):
        """Nothing of a stranger's is gone; what must be there is listed."""
        for path, before in self.theirs.items():
            assert content(path) == before, f"{path} was {before!r}, is {content(path)!r}"
        assert content(self.elsewhere / "precious") == b"precious"
        if self.flying is None:
            self.books.see(self.reader.steps())

    # ------------------------------------------------------------ managers

    def open(self, keep, *, mirrored):
        self.tell(f"open keep={keep} mirrored={mirrored}")
        self.keep, self.mirrored, self.committed = keep, mirrored, None
        self.manager = self.make(keep, mirrored)
        if mirrored:  # what an earlier process has not copied is copied, then retention follows
            self.books.release(keep)
            self.settle()

    def make(self, keep, mirrored=False):
        return ckptmgr.CheckpointManager(
            self.run, keep=policies(keep), mirror=self.away if mirrored else None,
            clock=lambda: self.now, timeout_s=LIMIT_S / 2,
        )  # fmt: skip

    def close(self):
        self.settle()
        self.manager.close()

    def reopen(self):
        self.close()
        self.open(self.draw.choice(KEEPS), mirrored=self.draw.random() < 0.3)
        self.settle()

    def settle(self):
        """Waits for what is being written."""
        with self.may_fail_to_save():
            self.manager.wait()
        self.flying = None

    @contextlib.contextmanager
    def may_fail_to_save(self):
        """A save that was accepted may fail, and say so, if something has come into its place, which then stays.

        The call of `save` does not look whether a step above every step that it has seen is there. So it may also
        be a step that a stranger has renamed back: the save fails, and takes nothing with it (guarantee 6).
        """
        try:
            yield
        except ckptmgr.SaveError as problem:
            if self.flying is None or problem.step != self.flying[0]:
                raise
            step, value, before = self.flying
            before.about = self.books.about  # what a value is holds whether the save has failed or not
            self.flying, self.books = None, before
            self.books.ever[step].add(value)
            self.tell(f"failed: {problem}")
            claim(self.place(step) == "other" or step == self.unseen, problem)

    # ------------------------------------------------------------ saving

    def place(self, step):
        """What has the name of a step: nothing, a good step, or something else."""
        if step in self.books.must:
            return "good"
        return "other" if os.path.lexists(self.run / str(step)) else "free"

    def free_steps(self, count):
        later = itertools.count(max(self.books.may, default=0) + 1)
        return list(itertools.islice((step for step in later if self.place(step) == "free"), count))

    def some_step(self):
        newest = max(self.books.may, default=0)
        kind = self.draw.random()
        if kind < 0.6:
            return newest + self.draw.randint(1, 3)
        if kind < 0.8 and self.books.may:
            return self.draw.choice(sorted(self.books.may))
        return self.draw.randrange(12)

    def value(self):
        self.made += 1
        loss = self.draw.choice([None, float("nan"), float("inf"), 0.1 * self.draw.randrange(10)])
        self.books.about[self.made] = self.now, loss
        return self.made

    def metrics(self, value):
        loss = self.books.about[value][1]
        return {} if loss is None else {"loss": loss}

    def save(self):
        self.save_by(self.manager, self.keep)
        saved = self.flying
        if saved:
            self.committed = saved[0]
        if self.draw.random() < 0.7:
            self.settle()
            if saved and self.committed in self.books.must:
                self.see_what_was_deleted()

    def see_what_was_deleted(self):
        """Where nothing is harmed, what no policy keeps is gone after a save.

        Where it is unclear which step is the newest good one, nothing is deleted (guarantee 7).
        """
        others = [path for path in self.unclear if path.name.isdecimal() and os.path.lexists(path)]
        is_unclear = self.books.harmed or others
        if self.keep and not self.mirrored and not is_unclear:
            left = set(self.reader.steps()) & set(self.books.may) - self.books.must
            assert not left, f"no policy keeps {left}"

    def save_by(self, manager, keep):
        step, value = self.some_step(), self.value()
        on_exists = self.draw.choice(["error", "error", "skip", "replace"])
        if self.flying:
            self.settle()
        place = self.place(step)
        self.tell(f"save {step} as {value}, {on_exists}, where there is {place}")
        before = books.copy.deepcopy(self.books)
        try:
            result = manager.save(step, **state(value, step), metrics=self.metrics(value), on_exists=on_exists)
        except ckptmgr.CheckpointExistsError:
            claim(on_exists == "error" and place != "free", (step, place))
        except ckptmgr.SaveError as problem:
            self.tell(f"refused: {problem}")
            claim(place == "other", problem)
        else:
            assert result or (on_exists == "skip" and place != "free"), result
            if result:
                self.unseen = step if on_exists == "error" and step in self.came_back else None
                claim(place != "good" or on_exists == "replace" or step == self.unseen, (step, place, on_exists))
                self.accept(step, value, keep, before)

    def accept(self, step, value, keep, before):
        self.flying = step, value, before
        self.books.accept(step, value, keep)
        if self.theirs.get(self.run / str(step)) == {}:  # an empty folder may be taken
            del self.theirs[self.run / str(step)]

    def threads(self):
        """Several save at once: in which order is not known."""
        self.settle()
        given = {step: self.value() for step in self.draw.sample(self.free_steps(5), 3)}
        self.tell(f"three threads save {given}")
        results = {}

        def save(step, value):
            results[step] = self.manager.save(step, **state(value, step), metrics=self.metrics(value))

        running = [threading.Thread(target=save, args=each) for each in given.items()]
        for each in running:
            each.start()
        for each in running:
            each.join()
        assert all(results[step] for step in given), results
        before = self.books
        for order in itertools.permutations(given.items()):
            after = books.copy.deepcopy(before)
            for step, value in order:
                after.accept(step, value, self.keep)
            if self.books is not before:
                after.must &= self.books.must
            self.books = after
        self.settle()

    def two(self):
        """Two managers of one run in one process, each with a `keep` of its own."""
        self.settle()
        keep = self.draw.choice(KEEPS)
        self.tell(f"a second manager, keep={keep}")
        try:
            second = self.make(keep)
        except ckptmgr.SaveError:
            return
        for manager, its in [(second, keep), (self.manager, self.keep), (second, keep)]:
            self.save_by(manager, its)
            with self.may_fail_to_save():
                manager.wait()
            self.flying = None
            self.check()  # what is deleted by now is not counted by the next
        second.close()
        if self.mirrored:  # the first has not been told of the last save, and copies it when it is opened again
            self.close()
            self.open(self.keep, mirrored=True)

    def interrupt(self):
        """KeyboardInterrupt at some moment of a call; the manager goes on after it."""
        self.settle()
        step, value = self.some_step(), self.value()
        listed = self.draw.choice(sorted(self.books.may) or [0])
        what, change = self.draw.choice([
            ("save", lambda: self.manager.save(step, **state(value, step), metrics=self.metrics(value),
                                               on_exists="replace")),
            ("save", lambda: self.manager.save(step, **state(value, step), metrics=self.metrics(value),
                                               on_exists="replace").result()),
            ("restore", lambda: self.manager.restore(layout=ckptmgr.HOST)),
            ("delete", lambda: self.manager.delete(listed)),
            ("pin", lambda: (self.run / str(listed)).is_symlink() or self.manager.pin(listed)),
            ("close", lambda: self.manager.close()),
        ])  # fmt: skip
        moment = int(2 ** self.draw.uniform(0, 12))
        self.tell(f"{what} ({step} as {value}, or of {listed}), interrupted at its moment {moment}")
        with (
            contextlib.suppress(ckptmgr.CheckpointError, KeyboardInterrupt),
            moments.Interrupt(moment, KeyboardInterrupt),
        ):
            change()
        if what == "save":
            self.books.attempt(step, value, self.keep)
            if self.theirs.get(self.run / str(step)) == {}:
                del self.theirs[self.run / str(step)]
        if what == "delete":
            self.books.must.discard(listed)
            if not os.path.lexists(self.run / str(listed)):  # all of it, also of a harmed step that was not listed
                self.books.delete(listed)
        if what == "pin":
            is_pinned = (self.run / str(listed) / "PINNED").exists()  # nobody knows
            (self.books.pinned.add if is_pinned else self.books.pinned.discard)(listed)
        with contextlib.suppress(ckptmgr.SaveError):
            self.manager.wait()
        if what == "close":
            self.manager.close()
            self.open(self.keep, mirrored=self.mirrored)
        self.look_at({step, listed} & set(self.books.may))

    def look_at(self, steps):
        """Settles by reading what nobody knew."""
        listed = set(self.reader.steps())
        self.books.see(listed)
        for step in sorted(steps & set(self.books.may) & listed):
            if step in self.books.harmed and len(self.books.may[step]) == 1:
                continue
            try:
                value = value_of(self.reader.restore(step, layout=ckptmgr.HOST))
            except ckptmgr.CheckpointError as problem:
                claim(step in self.books.harmed, problem)
                continue
            self.books.read(step, value)
            self.books.may[step] = {value}
            self.books.must.add(step)
            self.books.harmed.discard(step)

    def delete(self):
        self.settle()
        step = self.draw.choice(sorted(self.books.may) or [1])
        self.tell(f"delete {step}")
        try:
            self.manager.delete(step)
            self.books.delete(step)
        except ckptmgr.CheckpointNotFoundError as problem:
            self.books.fails(step, problem)

    def rewind(self):
        """Back to a step, or to one that was set aside by it before."""
        self.settle()
        self.check()
        step, known = self.draw.choice(sorted({*self.books.may, *self.aside}) or [1]), self.books
        before = set(self.reader.steps())
        if self.mirrored:  # retention follows it
            known.release(self.keep, step)
        self.tell(f"rewind to {step}; set aside: {self.aside}")
        try:
            self.manager.rewind(step)
        except ckptmgr.CheckpointNotFoundError as problem:
            is_aside = self.aside.get(step) and step not in self.aside_gone
            claim(step not in known.must and not is_aside, problem)
        except ckptmgr.CorruptCheckpointError as problem:
            known.fails(step, problem)
        except ckptmgr.SaveError as problem:
            claim((self.mirrored and not self.away.is_dir()) or self.is_in_the_way(problem.step), problem)
            assert set(self.reader.steps()) == before
        else:
            self.settle()
            self.after_rewind(step, before, set(self.reader.steps()))

    def is_in_the_way(self, step):
        """Whether what a stranger has put there keeps a step from coming back, here or in the mirror."""
        return self.place(step) == "other" or (self.mirrored and self.away / str(step) in self.theirs)

    def after_rewind(self, step, before, listed):
        """What is listed is of the branch that the step is of; all else is set aside."""
        known = self.books
        is_away = self.mirrored and max(listed, default=0) <= step  # else it is in the mirror alone
        assert is_away or max(listed) == step, listed
        for each in before - listed:
            assert each > step or each not in known.must or step not in before, f"{each} is gone"
            self.set_aside(each)
        for each in listed:
            try:
                value = value_of(self.reader.restore(each, layout=ckptmgr.HOST))
            except ckptmgr.CheckpointError as problem:
                if each in self.harmed_aside:
                    self.set_aside(each)
                    known.may[each] = self.aside[each]
                    known.harm(each)
                    self.pin_again(each)
                known.fails(each, problem)
                continue
            if value not in known.may.get(each, ()):
                assert value in self.aside.get(each, ()), (each, value, self.aside)
                self.set_aside(each)
                self.aside[each].discard(value)
                known.may[each] = {value}
                known.must.add(each)
                self.pin_again(each)
        self.committed = step

    def set_aside(self, step):
        """A pin is a file of its step: it is set aside, and comes back, with it."""
        values = self.books.may.get(step, ())
        if step in self.books.harmed:
            self.harmed_aside.add(step)
        if step in self.books.pinned:
            self.pinned_aside |= {(step, value) for value in values}
        self.aside.setdefault(step, set()).update(values)
        self.aside_gone.discard(step)
        self.books.delete(step)

    def pin_again(self, step):
        """Pins a step that has come back if it was pinned when it was set aside."""
        back = {(step, value) for value in self.books.may[step]}
        if back & self.pinned_aside:
            self.books.pinned.add(step)
        self.pinned_aside -= back

    def pin(self):
        self.settle()
        step, pins = self.draw.choice(sorted(self.books.may) or [1]), self.draw.random() < 0.6
        self.tell(f"{'pin' if pins else 'unpin'} {step}")
        try:
            (self.manager.pin if pins else self.manager.unpin)(step)
        except ckptmgr.CheckpointNotFoundError as problem:
            self.books.fails(step, problem)
        except ckptmgr.SaveError:
            assert (self.run / str(step)).is_symlink()  # nothing is written through it
        else:
            (self.books.pinned.add if pins else self.books.pinned.discard)(step)
        if self.mirrored:  # the mirror is looked at, then retention
            self.books.release(self.keep, self.committed)
            self.settle()

    def clock(self):
        self.now += self.draw.choice([-1, 1]) * self.draw.choice([15, 3600, 1e6])
        self.tell(f"the clock shows {self.now}")

    # ------------------------------------------------------------ reading

    def restore(self):
        if self.flying and self.draw.random() < 0.5:
            return self.read_while_saving()
        self.settle()
        manager = self.draw.choice([self.manager, self.reader])
        step = self.draw.choice([None, None, "best", *sorted(self.books.may)])
        self.tell(f"{'the reader' if manager is self.reader else 'the manager'} restores {step}")
        self.read(manager, step, mirrored=self.mirrored and manager is self.manager)

    def read(self, manager, step, *, mirrored=False):
        try:
            found = manager.restore(step, layout=ckptmgr.HOST)
        except ValueError:
            assert step == "best"
        except ckptmgr.CheckpointError as problem:
            claim(step is not None or not self.books.must, problem)
            if step != "best":
                self.books.fails(step, problem)
        else:
            self.books.read(found.step, value_of(found), mirrored=mirrored)
            assert step is not None or found.step >= max(self.books.must, default=-1), found.step

    def read_while_saving(self):
        """A reader finds the step that is being written, or what was there before."""
        before = self.flying[2]
        self.tell("the reader restores while a step is written")
        try:
            found = self.reader.restore(layout=ckptmgr.HOST)
        except ckptmgr.CheckpointError as problem:
            claim(not before.must, problem)
        else:
            (before if value_of(found) in before.may.get(found.step, ()) else self.books).read(
                found.step, value_of(found)
            )

    def resume(self):
        self.settle()
        self.tell("restore_or")
        try:
            found = self.manager.restore_or(**state(0, 0), layout=ckptmgr.HOST)
        except ckptmgr.CheckpointError as problem:
            claim(not self.books.must, problem)
        else:
            assert found.resumed or not self.books.must
            if found.resumed:
                self.books.read(found.step, value_of(found), mirrored=self.mirrored)

    def look(self):
        """Everything that only looks."""
        self.settle()
        manager = self.draw.choice([self.manager, self.reader])
        infos = {info.step: info for info in manager.infos()}
        assert self.books.must <= set(infos), infos
        for step in self.books.must:
            assert infos[step].distrusted is None, infos[step]
            assert manager.info(step).pinned == (step in self.books.pinned), step
            assert manager.verify(step), manager.verify(step)
        for step in set(self.books.may) - self.books.must:
            with contextlib.suppress(ckptmgr.CheckpointNotFoundError):
                manager.verify(step)

    # ------------------------------------------------------------ other processes

    def task(self, saves, fault="", kill_after_s=None):
        return {"run": str(self.run), "keep": self.keep, "now": self.now, "fault": fault, "kill": kill_after_s,
                "saves": [(step, value, self.books.about[value][1]) for step, value in saves]}  # fmt: skip

    def killed(self):
        """Another process saves, and is killed, or its disk fails; then this one goes on."""
        self.close()
        saves = [(self.some_step(), self.value()) for _ in range(self.draw.randint(1, 3))]
        fault = self.draw.choice(FAULTS)
        task = (
            self.task(saves, fault)
            if self.draw.random() < 0.7
            else self.task(saves, "", self.draw.uniform(0, 0.4))
        )
        self.tell(f"another process saves {saves} with {task['fault'] or task['kill']}")
        said = self.helper.do(task)
        self.tell(f"it said {said}")
        for step, value in saves:
            if ["durable", value] in said:
                self.books.accept(step, value, self.keep)
            else:
                self.books.attempt(step, value, self.keep)
            if self.theirs.get(self.run / str(step)) == {}:
                del self.theirs[self.run / str(step)]
        self.open(self.keep, mirrored=False)
        self.look_at({step for step, _ in saves})

    def beside(self):
        """Another process saves while this one reads."""
        self.close()
        saves = [(step, self.value()) for step in self.free_steps(3)]
        self.tell(f"another process saves {saves} while this one reads")
        before = books.copy.deepcopy(self.books)
        for step, value in saves:
            self.books.accept(step, value, self.keep)
        self.helper.begin(self.task(saves))
        while not self.helper.is_done():
            if before.must:
                found = self.reader.restore(layout=ckptmgr.HOST)
                self.books.read(found.step, value_of(found))
        said = self.helper.end()
        assert all(["durable", value] in said for _, value in saves), said
        self.open(self.keep, mirrored=self.mirrored)

    def closed(self):
        """Another user, to whom the run belongs, saves beside a step that may not be looked into for a while."""
        if os.geteuid() != 0:
            return
        self.close()
        step, value, closed = self.some_step(), self.value(), self.their_step()
        path = self.run / str(closed)
        if closed in (None, step) or path.is_symlink() or self.place(step) == "other":
            return self.open(self.keep, mirrored=False)
        self.tell(f"step {closed} is closed, and somebody else saves {step} as {value}")
        for each in [self.run, *self.run.rglob("*")]:
            os.chown(each, 65534, 65534, follow_symlinks=False)
        mode = path.stat().st_mode
        path.chmod(0)
        said = self.helper.do(self.task([(step, value)]) | {"user": 65534})
        path.chmod(mode)
        self.tell(f"it said {said}")
        assert ["durable", value] in said, said
        was_there = closed in self.books.must
        self.books.must.discard(
            closed
        )  # retention does not count it, and does not delete it either (guarantee 11)
        self.books.attempt(step, value, self.keep)
        if was_there:
            self.books.must.add(closed)
        self.open(self.keep, mirrored=False)
        self.look_at({step})
        assert self.books.may[step] == {value}

    def second_writer(self):
        self.settle()
        has_lock = (self.run / ".ckptmgr" / "lock").exists()
        said = self.helper.do(self.task([]))
        self.tell(f"a second writer is told {said}")
        assert not has_lock or "is being written to by process" in str(said), said

    # ------------------------------------------------------------ the mirror

    def mirror_goes(self):
        """It is away, with a file in its place, or comes back."""
        self.settle()
        gone = self.away.with_name("away.gone")
        if gone.exists():
            self.tell("the mirror is back")
            self.away.unlink()
            gone.rename(self.away)
            self.rebase(gone, self.away)
            if self.mirrored:  # it is looked at when a run is opened, and after a save
                self.close()
                self.open(self.keep, mirrored=True)
        elif self.away.exists():
            self.tell("the mirror is gone")
            self.away.rename(gone)
            self.away.write_bytes(b"")
            self.rebase(self.away, gone)

    def rebase(self, old, new):
        for path in [path for path in self.theirs if path.is_relative_to(old)]:
            self.theirs[new / path.relative_to(old)] = self.theirs.pop(path)

    # ------------------------------------------------------------ strangers

    def before_strangers(self):
        """Mostly they come when nothing is being written."""
        if self.draw.random() < 0.8:
            self.settle()

    def all_books(self):
        """Those that hold now, and those that hold if the save that is being written fails."""
        return [self.books, self.flying[2]] if self.flying else [self.books]

    def before_retention(self):
        """The save that is being written is followed by retention: it counts what strangers have left by then."""
        if self.flying:
            self.books.release(self.keep, self.flying[0])

    def their_step(self):
        """A step that they do something to: not the one that is being written, nor one that they put there."""
        flying = self.flying and self.flying[0]
        places = {step: self.run / str(step) for step in self.books.may if step != flying}
        there = [step for step, path in places.items() if path.is_dir() and path not in self.theirs]
        return self.draw.choice(sorted(there)) if there else None

    def note(self, path):
        self.theirs[path] = content(path)

    def put(self):
        """A file, a folder, empty or not, a symlink, of any name, here or in the mirror."""
        self.before_strangers()
        home = self.draw.choice([self.run, self.run, self.run, self.away])
        path = home / self.draw.choice(NAMES)
        if not home.is_dir() or os.path.lexists(path):
            return
        kind = self.draw.choice(["file", "folder", "full", "link", "loop", "sibling", "dangling", "fifo"])
        self.tell(f"a stranger puts a {kind} at {path}")
        if self.flying and path.name == str(self.flying[0]) and home is self.run:
            self.settle()
        if os.path.lexists(path):
            return
        {
            "file": lambda: path.write_bytes(b"theirs"),
            "folder": path.mkdir,
            "full": lambda: (path.mkdir(), (path / "notes.txt").write_bytes(b"theirs")),
            "link": lambda: path.symlink_to(self.elsewhere),
            "loop": lambda: path.symlink_to(path.name),
            "sibling": lambda: path.symlink_to("1"),
            "dangling": lambda: path.symlink_to("nowhere"),
            "fifo": lambda: os.mkfifo(path),
        }[kind]()
        self.note(path)

    def copy(self):
        """`cp -r` of a step, to another number or name, interrupted somewhere or not."""
        self.before_strangers()
        step, target = self.their_step(), self.run / self.draw.choice([*NAMES, "4", "9", "50"])
        if step is None or os.path.lexists(target) or (self.flying and target.name == str(self.flying[0])):
            return
        left = self.draw.choice([0, 1, 3, 6, 9, 99])
        self.tell(f"a stranger copies {step} to {target.name}, {left} files of it")

        def copy(source, to):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return shutil.copy2(source, to)

        with contextlib.suppress(KeyboardInterrupt, shutil.Error, FileNotFoundError):
            shutil.copytree(self.run / str(step), target, copy_function=copy)
        if target.exists():  # a copy without a manifest may pass for a step
            self.unclear.add(target) if step in self.books.harmed else self.note(target)

    def remove(self):
        """`rm -r` of a step, interrupted somewhere or not."""
        self.before_strangers()
        step = self.their_step()
        if step is None:
            return
        files = [path for path in (self.run / str(step)).rglob("*") if path.is_file()]
        self.draw.shuffle(files)
        files = files[: self.draw.choice([1, 3, 99])]
        self.tell(f"a stranger removes {len(files)} files of {step}")
        for path in files:
            path.unlink(missing_ok=True)
        if not self.flying and self.draw.random() < 0.3:
            path = self.run / str(step)
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        for known in self.all_books():
            known.harm(step)
            if not (self.run / str(step) / "PINNED").exists():  # they have removed the pin, too
                known.pinned.discard(step)
        self.before_retention()

    def spoil(self):
        """A file of a step is cut, or a bit of it flips, or something else is in its place."""
        self.before_strangers()
        step = self.their_step()
        if step is None:
            return
        files = sorted(
            path for path in (self.run / str(step)).rglob("*") if path.is_file() and path.name != "PINNED"
        )
        if not files:
            return
        path, how = self.draw.choice(files), self.draw.choice(["cut", "empty", "bit", "fifo", "folder", "link"])
        self.tell(f"a stranger spoils {path.relative_to(self.run)}: {how}")
        for known in self.all_books():
            known.harm(step)
        self.before_retention()
        with contextlib.suppress(FileNotFoundError):
            whole = path.read_bytes()
            at = self.draw.randrange(len(whole)) if whole else 0
            flipped = bytes(byte ^ 4 for byte in whole[at : at + 1])
            path.unlink()
            {
                "cut": lambda: path.write_bytes(whole[:at]),
                "empty": lambda: path.write_bytes(b""),
                "bit": lambda: path.write_bytes(whole[:at] + flipped + whole[at + 1 :]),
                "fifo": lambda: os.mkfifo(path),
                "folder": path.mkdir,
                "link": lambda: path.symlink_to(self.elsewhere / "precious"),
            }[how]()  # fmt: skip

    def rename(self):
        """`mv` of a step to another name or number; back again another time."""
        self.before_strangers()
        back = sorted(self.parked)
        if back and self.draw.random() < 0.5:
            return self.rename_back(self.draw.choice(back))
        step, target = self.their_step(), self.run / self.draw.choice(["50", "x", "5.bak", "4"])
        if step is None or os.path.lexists(target) or (self.flying and target.name == str(self.flying[0])):
            return
        self.tell(f"a stranger renames {step} to {target.name}")
        known = self.books
        try:
            (self.run / str(step)).rename(target)
        except FileNotFoundError:
            return
        self.parked[target] = step, known.may[step], step in known.must, step in known.pinned
        # One without a manifest may pass for the step that it is named as.
        self.unclear.add(target) if step in self.books.harmed else self.note(target)
        for known in self.all_books():
            known.delete(step)
        self.before_retention()

    def rename_back(self, path):
        step, values, was_whole, was_pinned = self.parked[path]
        home = self.run / str(step)
        if os.path.lexists(home) or not os.path.lexists(path) or (self.flying and self.flying[0] == step):
            return
        self.tell(f"a stranger renames {path.name} back to {step}")
        path.rename(home)
        del self.parked[path]
        self.came_back.add(step)
        self.theirs.pop(path, None)
        for known in self.all_books():
            known.may[step] = set(values)
            (known.must if was_whole else known.harmed).add(step)
            if was_pinned:
                known.pinned.add(step)
        self.before_retention()
        if self.mirrored:  # it is copied when the run is opened, or after a save
            self.close()
            self.open(self.keep, mirrored=True)

    def other_disk(self):
        """A step is moved to another disk, and a symlink put in its place."""
        self.settle()
        step = self.their_step()
        if step is None or (self.run / str(step)).is_symlink():
            return
        self.tell(f"a stranger moves {step} elsewhere, and links to it")
        there = self.elsewhere / f"{step}-{self.made}" / str(step)
        there.parent.mkdir(exist_ok=True)
        shutil.move(self.run / str(step), there)
        (self.run / str(step)).symlink_to(there)

    def touch(self):
        self.before_strangers()
        step = self.their_step()
        if step is not None:
            self.tell(f"a stranger touches {step}")
            for path in [self.run / str(step), *(self.run / str(step)).rglob("*")]:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)

    def add_to(self):
        """A note in a step's own folder: it goes with the step."""
        self.before_strangers()
        step = self.their_step()
        if step is not None:
            self.tell(f"a stranger puts a note into {step}")
            with contextlib.suppress(FileNotFoundError):
                (self.run / str(step) / "notes.txt").write_bytes(b"a good one")

    def ours_goes(self):
        """Something of `.ckptmgr`, or all of it, is removed."""
        self.before_strangers()
        ours = self.run / ".ckptmgr"
        there = [ours, *ours.iterdir()] if ours.exists() else []
        if there and not self.flying:
            path = self.draw.choice(sorted(there))
            self.tell(f"a stranger removes {path.relative_to(self.run)}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            if path in (ours, ours / "abandoned"):
                self.aside_gone.update(self.aside)

    def version_1(self):
        """Leftovers as version 1 had them beside the steps: after `ours_goes` they are taken for such."""
        self.close()
        step, name = (
            self.some_step(),
            self.draw.choice(["{}.orbax-checkpoint-tmp", ".deleted-{}-17", "{}.damaged-3"]),
        )
        path = self.run / name.format(step)
        self.tell(f"version 1 has left {path.name}")
        if not path.exists():
            path.mkdir()
            (path / "half").write_bytes(b"half")
        self.open(self.keep, mirrored=self.mirrored)

    # ------------------------------------------------------------ the end

    def finish(self):
        """Whoever comes next opens the run, and finds what must be there, and no lock, and no leftovers."""
        self.close()
        assert not (self.run / ".ckptmgr" / "lock").exists()
        if self.mirrored and self.away.is_dir():
            self.see_the_copies()
        with ckptmgr.CheckpointManager(self.run) as manager:
            ours = self.run / ".ckptmgr"
            left = [path for name in ("saving", "deleting", "replaced") for path in (ours / name).glob("*")]
            assert not left, left
            listed = manager.steps()
            self.books.see(listed)
            for step in listed:
                self.read(manager, step)
            pinned = {info.step for info in manager.infos() if info.pinned}
            assert pinned & self.books.must == self.books.pinned & self.books.must, (pinned, self.books.pinned)
            self.read(manager, None)
            self.check()

    def see_the_copies(self):
        away = ckptmgr.CheckpointManager(self.away, read_only=True)
        for step in away.steps():
            self.books.read(step, value_of(away.restore(step, layout=ckptmgr.HOST)), mirrored=True)
        not_blocked = {step for step in self.books.must if self.away / str(step) not in self.theirs}
        assert not_blocked <= set(away.steps()), (not_blocked, away.steps())
        for step in not_blocked:
            self.books.read(step, value_of(away.restore(step, layout=ckptmgr.HOST)))


OPERATIONS = {
    name: (often, getattr(World, name))
    for name, often in {
        "save": 12, "reopen": 2, "delete": 1, "pin": 1.5, "rewind": 1, "clock": 1, "restore": 3, "resume": 0.7,
        "look": 1, "threads": 0.5, "two": 0.7, "interrupt": 2, "killed": 0.5, "beside": 0.15, "closed": 0.15,
        "second_writer": 0.1, "mirror_goes": 0.7,
        "put": 2.5, "copy": 1, "remove": 0.7, "spoil": 1, "rename": 1.5, "other_disk": 0.4, "touch": 0.5,
        "add_to": 0.3, "ours_goes": 0.5, "version_1": 0.3,
    }.items()
}  # fmt: skip


def history(seed):
    draw = random.Random(seed)
    names, weights = list(OPERATIONS), [often for often, _ in OPERATIONS.values()]
    chosen = ["save", *draw.choices(names, weights, k=draw.randint(10, 22))]
    return " ".join(f"{name}:{draw.randrange(1000)}" for name in chosen)


class TooLong(BaseException):
    pass


@contextlib.contextmanager
def time_limit():
    """A history that hangs is one that has found something."""

    def end(number, frame):
        stacks = sys._current_frames()
        others = "".join(
            f"\n--- {each.name}\n{''.join(traceback.format_stack(stacks[each.ident]))}"
            for each in threading.enumerate()
            if each.ident in stacks
        )
        raise TooLong(f"more than {LIMIT_S} s{others}")

    before, left = signal.signal(signal.SIGALRM, end), signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)  # that of pytest


def play(text, helper, tell=lambda line: None):
    """Plays a history in a directory of its own; raises what it finds."""
    with tempfile.TemporaryDirectory() as root, time_limit():
        os.chmod(root, 0o755)  # other users come too
        world = World(pathlib.Path(root), helper, tell)
        try:
            world.play(text)
            world.finish()
        finally:
            helper.forget()
            with contextlib.suppress(ckptmgr.CheckpointError):
                world.manager.close()


# ---------------------------------------------------------------- a process beside, warm


class Helper:
    """Forks a process for each task from one that has imported everything, and started nothing."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._is_busy = False

    def begin(self, task):
        self._is_busy = True
        self._server.stdin.write(json.dumps(task).encode() + b"\n")
        self._server.stdin.flush()

    def is_done(self):
        return bool(select.select([self._server.stdout], [], [], 0)[0])

    def end(self):
        """What the process has said."""
        said = json.loads(self._server.stdout.readline())
        self._is_busy = False
        return said

    def do(self, task):
        self.begin(task)
        return self.end()

    def forget(self):
        if self._is_busy:
            self.end()

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def serve():
    gc.freeze()  # no fork looks through the libraries again
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            serve_one(json.loads(line), write)
        os.close(write)
        with os.fdopen(read, "rb") as told:
            said = [json.loads(each) for each in told if each.endswith(b"\n")]
        os.waitpid(child, 0)
        print(json.dumps(said), flush=True)


def serve_one(task, write):
    def say(*what):
        os.write(write, json.dumps(what).encode() + b"\n")

    signal.alarm(LIMIT_S)
    try:
        os.setuid(task.get("user", os.getuid()))
        faults.install(task["fault"])
        if task["kill"] is not None:
            threading.Timer(task["kill"], os.kill, [os.getpid(), signal.SIGKILL]).start()
        with ckptmgr.CheckpointManager(
            task["run"], keep=policies(task["keep"]), clock=lambda: task["now"]
        ) as manager:
            for step, value, loss in task["saves"]:
                metrics = {} if loss is None else {"loss": loss}
                try:
                    manager.save(step, **state(value, step), metrics=metrics, on_exists="replace").result()
                    say("durable", value)
                except ckptmgr.SaveError as problem:
                    say("failed", value, str(problem))
    except BaseException as problem:
        say("raised", type(problem).__name__, str(problem))
    finally:
        time.sleep(0)
        os._exit(0)


# ---------------------------------------------------------------- hunting


def finds(text, helper):
    """What a history finds; None if it holds."""
    try:
        play(text, helper)
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt) and "interrupt:" not in text:
            raise
        return f"{type(problem).__name__}: {problem}"
    return None


def cut_down(text, helper):
    """The same without each operation that it does not need."""
    words = text.split()
    for size in (8, 4, 2, 1, 1):
        at = len(words)
        while at > 0:
            at -= size
            fewer = words[: max(at, 0)] + words[max(at, 0) + size :]
            if fewer != words and finds(" ".join(fewer), helper):
                words = fewer
    return " ".join(words)


def main(*args):
    helper = Helper()
    if len(args) == 1:
        play(args[0], helper, print)
    else:
        first, count = map(int, args)
        for seed in range(first, first + count):
            if problem := finds(history(seed), helper):
                print(f"{seed}: {cut_down(history(seed), helper)}\n    {problem[:3000]}", flush=True)
        print(f"{count} from {first} played", flush=True)
    helper.close()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(*sys.argv[1:])
