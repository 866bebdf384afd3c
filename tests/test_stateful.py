"""Any order of saves, replacements, deletions, pins, crashes, damage and restarts, against a dict."""

import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import counted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ckptmgr

STEPS = st.integers(0, 9)
KEEP = 3


class Run(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.values = {}  # what each listed step holds
        self.damaged, self.pinned = set(), set()
        self.passed_over = set()  # damaged, and this manager knows
        self.made = 0
        self.open()

    def open(self):
        self.manager = ckptmgr.CheckpointManager(self.directory, keep=KEEP)
        self.passed_over = set()

    def teardown(self):
        self.manager.close()
        shutil.rmtree(self.directory)

    def params(self, value):
        return {"w": np.full((8, 16), value), "n": value}

    def gone(self, step):
        self.values.pop(step, None)
        for marks in (self.damaged, self.pinned, self.passed_over):
            marks.discard(step)

    def saved(self, step, on_exists):
        self.made += 1
        self.manager.save(step, self.params(self.made), on_exists=on_exists).result()
        self.manager.wait()
        if step in self.passed_over:
            self.gone(step)
        self.damaged.discard(step)
        self.values[step] = self.made
        counted_in = set(self.values) - self.passed_over
        for old in counted_in - set(sorted(counted_in)[-KEEP:]) - self.pinned - {step}:  # it was just saved
            self.gone(old)

    @rule(step=STEPS)
    def save(self, step):
        if step in self.values and step not in self.passed_over:
            with pytest.raises(ckptmgr.CheckpointExistsError):
                self.manager.save(step, self.params(0))
        else:
            self.saved(step, "error")

    @rule(step=STEPS)
    def replace(self, step):
        self.saved(step, "replace")

    @rule(step=STEPS)
    def delete(self, step):
        if step in self.values:
            self.manager.delete(step)
            self.gone(step)
        else:
            with pytest.raises(ckptmgr.CheckpointNotFoundError):
                self.manager.delete(step)

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def pin(self, data):
        step = data.draw(st.sampled_from(sorted(self.values)))
        self.manager.pin(step)
        self.pinned.add(step)

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def unpin(self, data):
        step = data.draw(st.sampled_from(sorted(self.values)))
        self.manager.unpin(step)
        self.pinned.discard(step)

    @precondition(lambda self: set(self.values) - self.damaged)
    @rule(data=st.data(), seed=st.integers(0, 2**32))
    def damage(self, data, seed):
        """A bit of the arrays: what a manifest cannot know, and a restore finds."""
        step = data.draw(st.sampled_from(sorted(set(self.values) - self.damaged)))
        draw = random.Random(seed)
        chosen = draw.choice(sorted((self.directory / str(step) / "params").rglob("d/*")))
        content = bytearray(chosen.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        chosen.write_bytes(content)
        self.damaged.add(step)

    @rule(step=STEPS)
    def crash(self, step):
        """What a process that was killed in a save leaves behind; and the next one starts."""
        self.manager.close()
        left = self.directory / ".ckptmgr" / "saving" / str(step)
        (left / "params").mkdir(parents=True)
        (left / "params" / "half").write_bytes(b"half")
        self.open()
        assert not left.exists()

    @rule()
    def restart(self):
        self.manager.close()
        self.open()

    @rule()
    def restore(self):
        good = sorted(set(self.values) - self.damaged)
        if not self.values:
            with pytest.raises(ckptmgr.CheckpointNotFoundError):
                self.manager.restore(params=self.params(0))
        elif not good:
            with pytest.raises(ckptmgr.CorruptCheckpointError):
                self.manager.restore(params=self.params(0))
        else:
            found = self.manager.restore(params=self.params(0))
            assert found.step == good[-1]
            assert found.params["n"] == self.values[good[-1]]
            assert (found.params["w"] == self.values[good[-1]]).all()
            newer = {step for step in self.values if step > good[-1]}
            assert set(found.skipped) == newer
            self.passed_over |= newer

    @rule(step=STEPS)
    def restore_one(self, step):
        if step not in self.values:
            with pytest.raises(ckptmgr.CheckpointNotFoundError):
                self.manager.restore(step, params=self.params(0))
        elif step in self.damaged:
            with pytest.raises(ckptmgr.CorruptCheckpointError):
                self.manager.restore(step, params=self.params(0))
        else:
            assert self.manager.restore(step, params=self.params(0)).params["n"] == self.values[step]

    @invariant()
    def what_is_listed_is_what_is_there(self):
        assert self.manager.steps() == sorted(self.values)
        assert self.manager.latest() == max(self.values, default=None)


TestRun = pytest.mark.soak(Run.TestCase)
TestRun.settings = settings(max_examples=counted(15, full=500), stateful_step_count=20)
