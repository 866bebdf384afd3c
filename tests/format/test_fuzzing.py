"""Manifests and the files of stock Orbax, changed in any place: every call answers, or raises an error of ours."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import odd_files
import pytest
from conftest import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from test_manifest import JSON, changed, places, sealed
from test_odd_files import STOCK, make

import ckptmgr
from ckptmgr import CheckpointManager

NUMBERS = st.sampled_from([10**400, -(10**400), 2**63, 1e308, -1, 0, True])
VALUES = JSON | NUMBERS


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """pytest keeps each line of the log until a test ends, and with it an error and its arrays."""
    log = logging.getLogger("ckptmgr")
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    with CheckpointManager(directory) as manager:
        for step in (1, 2):
            params = {"w": jnp.full((3, 2), step), "large": np.full(300_000, step), "n": step}
            manager.save(
                step, params, {"m": jnp.full(3, step)}, extras={"at": {"n": step}}, metrics={"loss": step}
            )
    return directory


def check(run, saved=None):
    """Every call answers, or raises an error of ours; what is restored is what was saved, where that is known."""
    reader = CheckpointManager(run, read_only=True)
    found = reader.restore(layout=ckptmgr.HOST)
    assert found.step == 1 or saved is None or odd_files.is_equal(saved, odd_files.plain(found)), (
        "another value was restored"
    )
    for look in (reader.restore, reader.verify, reader.info, lambda step: reader.diff(step, params={})):
        with contextlib.suppress(ckptmgr.CheckpointError):
            look(2)
    assert reader.infos()
    assert list(reader.watch(timeout_s=0))
    reader.best("loss")


def draw_body(data, body):
    """A change of one or two places; the places of what Orbax spells as JSON within JSON are places too."""
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([path for path in places(body) if path]))
        with contextlib.suppress(KeyError, IndexError, TypeError):
            body = changed(body, path, data.draw(VALUES))
    return body


@contextlib.contextmanager
def holding(path, content):
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(good)


@pytest.mark.soak
@settings(max_examples=counted(40, 10_000))
@given(st.data())
def test_a_manifest_with_the_right_checksum_that_says_anything(ours, data):
    path = ours / "2" / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["crc32"]
    with holding(path, sealed(draw_body(data, body))), contextlib.suppress(ckptmgr.NewerFormatError):
        check(ours)


@pytest.mark.soak
@settings(max_examples=counted(30, 10_000))
@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_a_manifest_of_any_bytes(ours, some, at):
    path = ours / "2" / "manifest.json"
    good = path.read_bytes()
    at %= len(good)
    with holding(path, good[:at] + some + good[at + len(some) :]):
        check(ours, odd_files.values(ours))


@pytest.fixture(scope="module", params=STOCK[: counted(2, full=len(STOCK))])
def theirs(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("stock") / "run", request.param)


@pytest.mark.soak
@settings(max_examples=counted(30, 2_000))
@given(st.data())
def test_files_of_stock_orbax_that_say_anything(theirs, data):
    """Nothing records what they were: it is no error to restore what they say now."""
    files = sorted(path for path in (theirs / "2").rglob("*") if path.is_file() and "d" not in path.parts[-2:-1])
    path = data.draw(st.sampled_from(files))
    good = path.read_bytes()
    try:
        body = json.loads(good)
    except ValueError:
        at, some = data.draw(st.integers(0, len(good))), data.draw(st.binary(max_size=20))
        content = good[:at] + some + good[at + len(some) :]
    else:
        content = json.dumps(draw_body(data, body)).encode()
    with holding(path, content):
        check(theirs)


@pytest.mark.soak
@pytest.mark.parametrize("form", sorted(STOCK, key="v0_zarr2_no_ocdbt".__ne__)[: counted(1, full=len(STOCK))])
def test_a_huge_number_in_a_file_of_stock_orbax_ends_no_process(form, tmp_path):
    script = Path(__file__).with_name("huge_numbers.py")
    done = subprocess.run(
        [sys.executable, script, form, tmp_path], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = done.stdout.splitlines()
    assert int(said.removeprefix("tried ")) > 20
