"""Runs in buckets whose names other programs take for patterns: `a*`, `a?b`, `[1]`. No other run is touched."""

import os
import re
import uuid

import jax.numpy as jnp
import pytest
from conftest import ON_SERVERS, counted
from test_links import ODD_NAMES

import ckptmgr
from ckptmgr.cli import doctor
from ckptmgr.format import names, objects, paths
from ckptmgr.results import Damage, VerifyReport
from ckptmgr.run import verifying
from ckptmgr.saving import committing
from ckptmgr.testing import assert_trees_equal

pytestmark = ON_SERVERS
PATTERNS = [name for name in ODD_NAMES if re.search(r"[*?\[]", name)]
OTHERS = [name for name in ODD_NAMES if name not in PATTERNS]
CASES = [(place, name) for name in PATTERNS for place in ("gs", "s3")]
CASES += [(place, name) for name in OTHERS for place in ("gs", "s3")][:: counted(13, full=1)]
STATE = {"w": jnp.arange(6.0), "v": jnp.ones(3)}


def held(folder):
    """What the objects below a folder hold, by name."""
    store, start = objects.open_objects(folder), objects.key_of(folder)
    return store.read([f"{start}/{name}" for name in objects.below(folder)])


def sibling(name):
    """A name that `name` matches if it is taken for a pattern."""
    found = name.replace("*", "xyz").replace("?", "x").replace("[", "").replace("]", "")
    return found if found != name else f"{name}x"


NAMES = [*(f"{step}/{file}" for step in range(1, 6) for file in (names.COMMITTED, "manifest.json", names.PIN))]
NAMES += [names.REWINDING, f"{names.OURS}/doctor-{os.getpid()}"]


@pytest.fixture(params=CASES, ids=" ".join)
def folder(request, servers):
    """The folder of a run in a bucket. Another run, whose name is like it, must be unchanged after the test."""
    place, name = request.param
    home = paths.resolve(f"{place}://bucket/{uuid.uuid4().hex}")
    other = home / sibling(name)
    for each in NAMES:
        objects.write(other / each, each.encode())
    before = held(other)
    yield home / name
    assert held(other) == before


def test_a_run_may_have_any_name(folder):
    with ckptmgr.CheckpointManager(folder) as manager:
        for step in (1, 2, 3):
            manager.save(step, STATE).result()
        assert_trees_equal(manager.restore(3, params=STATE).params, STATE)
        assert all(manager.verify(step) for step in (1, 2, 3))
        manager.rewind(2)
        manager.rewind(3)
        manager.pin(3)
        manager.unpin(3)
        manager.distrust(3, "why")
        manager.trust(3)
        manager.delete(1)
        (data,) = (each for each in objects.below(folder / "3") if each.startswith("params/d/"))
        objects.write(folder / "3" / data, b"damaged")
        assert manager.restore(params=STATE).step == 2
        manager.save(3, STATE).result()
        assert manager.steps() == [2, 3]
        assert manager.verify(3)
    there = objects.below(folder)
    assert {name.split("/")[0] for name in there} == {"2", "3", names.OURS}
    aside = {"/".join(name.split("/")[:2]) for name in there if name.startswith(names.OURS)}
    assert aside == {names.DAMAGED}


def test_a_mirror_may_have_any_name(folder, tmp_path, monkeypatch, caplog):
    with ckptmgr.CheckpointManager(tmp_path / "run", mirror=folder) as manager:
        manager.wait()
        for name in (
            f"{names.SAVING}/3",
            "3/manifest.json",
            "3/params/left",
        ):  # a copy of another save, interrupted
            objects.write(folder / name, b"{}")
        manager.save(3, STATE).result()
        manager.wait()
        with monkeypatch.context() as patch:
            report = VerifyReport(step=4, damages=(Damage("params/_METADATA", "it is damaged"),))
            patch.setattr(verifying, "verify", lambda *_: report)
            manager.save(4, STATE).result()
            manager.wait()
        assert "the copy is damaged" in caplog.text
        assert {name.partition("/")[0] for name in objects.below(folder)} == {"3", names.OURS}
        manager.save(5, STATE).result()
        manager.wait()
    with ckptmgr.CheckpointManager(folder, read_only=True) as reader:
        assert reader.steps() == [3, 5]
        assert all(reader.verify(step) for step in (3, 5))
    assert "3/params/left" not in objects.below(folder)


def test_a_marker_that_is_taken_back_is_that_of_this_run(folder, monkeypatch):
    def lost():
        raise ckptmgr.SaveError("another process has the run", step=5)

    def check(self, draft, manifest, real=committing.Committer._check_in_time):
        assert names.COMMITTED in objects.below(draft)
        with monkeypatch.context() as patch:
            patch.setattr(self._shared, "hold", lost)
            try:
                real(self, draft, manifest)
            finally:
                assert names.COMMITTED not in objects.below(draft)

    monkeypatch.setattr(committing.Committer, "_check_in_time", check)
    with ckptmgr.CheckpointManager(folder) as manager:
        with pytest.raises(ckptmgr.SaveError, match="another process has the run"):
            manager.save(5, STATE).result()
        assert manager.steps() == []


def test_doctor_removes_its_own_file_alone(folder, monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_BYTES", 1 << 20)
    assert "error" not in doctor._storage(str(folder))
    assert not objects.below(folder)
