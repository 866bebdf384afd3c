"""Claims on runs in a bucket: one writer, whichever way another one ends. The servers run on this machine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import holder
import jax
import pytest
import trainer
from conftest import ON_SERVERS, counted
from etils import epath

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.format import names, objects
from ckptmgr.run import claim

pytestmark = ON_SERVERS
LEASE_S = 3.0


@pytest.fixture(params=["gs", "s3"])
def run(request, servers):
    return f"{request.param}://bucket/{uuid.uuid4().hex}/run"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_said_at_once(scheme, servers):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"no such bucket.*'typo-bucket'"):
        CheckpointManager(f"{scheme}://typo-bucket/run", timeout_s=60)
    assert time.monotonic() - started < 30


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setenv(claim.LEASE_VARIABLE, str(LEASE_S))


class Holder:
    """Another process that writes into a run."""

    def __init__(self, run, *machine):
        command = [sys.executable, holder.__file__, run, *machine]
        self.run = run
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        assert self.hear() == "open"

    def hear(self):
        return self.process.stdout.readline().strip()

    def tell(self, line, *, hears):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        if hears:
            return self.hear()
        return None

    def stop(self):
        """On gs:// between two renewals: stopped within one, it would take the claim back when it goes on.

        (The server for gs:// knows no conditions.)
        """
        if self.run.startswith("gs://"):
            first = last = held(self.run)["written"]
            while last == first or time.time() - last < LEASE_S / 10:
                time.sleep(0.05)
                last = held(self.run)["written"]
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def another(run):
    with contextlib.ExitStack() as started:

        def start(*machine):
            found = Holder(run, *machine)
            started.callback(found.kill)
            return found

        yield start


def values(manager, step):
    found = manager.restore(step, params=trainer.state(0))
    return trainer.step_of(found.params)


def held(run):
    """What the claim says now. (epath would ask twice, and fail if the claim is renewed in between.)"""
    found = objects.open_objects(epath.Path(run)).fetch(objects.key_of(epath.Path(run) / names.LOCK))
    return json.loads(found.data) if found else None


def test_a_second_writer_is_told_who_writes_and_a_reader_needs_no_claim(run, another):
    first = another()
    who = f"is being written to by process {first.process.pid} on {socket.gethostname()} since .*; a run has one"
    for _ in range(2):
        with pytest.raises(ckptmgr.SaveError, match=who):
            CheckpointManager(run)
    assert CheckpointManager(run, read_only=True).steps() == [1]
    assert first.tell("save 2", hears=True) == "saved 2"
    assert first.tell("close", hears=True) == "closed"
    with CheckpointManager(run) as manager:
        assert manager.steps() == [1, 2]
        with CheckpointManager(run) as beside:  # the managers of one process share the claim
            assert beside.steps() == [1, 2]
        assert held(run)["pid"] == os.getpid()
    assert held(run) is None


def test_a_second_writer_on_another_machine_is_refused_once_the_first_renews_its_claim(run, another):
    first = another("another machine")
    with pytest.raises(ckptmgr.SaveError, match=f"is being written to by process {first.process.pid} on "):
        CheckpointManager(run)
    assert first.tell("save 2", hears=True) == "saved 2"


@pytest.mark.soak
@pytest.mark.parametrize("run", ["s3", "gs"][: counted(1, full=2)], indirect=True)
def test_a_claim_is_renewed_as_long_as_its_process_lives(run, another):
    first = another()
    time.sleep(2 * LEASE_S + 1)
    with pytest.raises(ckptmgr.SaveError, match=f"is being written to by process {first.process.pid} on "):
        CheckpointManager(run)
    assert first.tell("save 2", hears=True) == "saved 2"


@pytest.mark.soak
@pytest.mark.parametrize("run", ["s3", "gs"][: counted(1, full=2)], indirect=True)
@pytest.mark.parametrize("machine", [(), ("another machine",)], ids=["this machine", "another machine"])
def test_the_holder_is_killed_in_a_save_and_the_next_one_goes_on_without_what_it_left(run, another, machine):
    first = another(*machine)
    first.tell("pause seal", hears=True)
    assert first.tell("save 2", hears=True) == "paused"
    first.kill()
    with CheckpointManager(run) as manager:
        assert manager.steps() == [1]
        assert not (epath.Path(run) / "2").exists()
        manager.save(2, trainer.state(7)).result()
        assert values(manager, 2) == 7
        assert manager.verify(2)
    assert names_below(run) == {"1", "2"}


@pytest.mark.soak
@pytest.mark.parametrize("run", ["s3", "gs"][: counted(1, full=2)], indirect=True)
@pytest.mark.parametrize("point", list(holder.POINTS))
def test_a_holder_that_was_stopped_beyond_its_lease_does_not_commit(run, another, point):
    first = another("another machine")
    first.tell(f"pause {point}", hears=True)
    assert first.tell("save 2", hears=True) == "paused"
    first.stop()
    with CheckpointManager(run) as manager:
        assert manager.steps() == [1]
        manager.save(2, trainer.state(7)).result()
        first.go_on()
        said = first.tell("", hears=True)
        assert said.startswith("refused: step 2 could not be saved: "), said
        assert "does not write into" in said or "was written by another process meanwhile" in said, said
        assert manager.steps() == [1, 2]
        assert values(manager, 2) == 7
        assert manager.verify(2)
        said = first.tell("save 3", hears=True)
        assert said.startswith(f"refused: this process does not write into {run} any more: "), said
        assert f"process {os.getpid()} on {socket.gethostname()} " in said
        manager.save(3, trainer.state(8)).result()
        first.tell("close", hears=True)
        assert held(run)["pid"] == os.getpid()
        assert [values(manager, step) for step in manager.steps()] == [1, 7, 8]


def test_a_holder_that_was_stopped_and_not_replaced_goes_on(run, another):
    first = another()
    first.stop()
    time.sleep(LEASE_S + 1)
    first.go_on()
    assert first.tell("save 2", hears=True) == "saved 2"


def test_a_process_that_has_lost_its_claim_opens_the_run_anew_once_its_managers_are_closed(run):
    place = epath.Path(run) / names.LOCK
    manager = CheckpointManager(run)
    objects.write(place, json.dumps(held(run) | {"machine": "another", "pid": 1, "token": "x"}).encode())
    for call in (lambda: manager.save(1, trainer.state(1)).result(), lambda: CheckpointManager(run)):
        with pytest.raises(ckptmgr.SaveError, match=r"does not write into .* any more: .* Close every manager"):
            call()
    manager.close()
    with pytest.raises(ckptmgr.SaveError, match="process 1"):
        CheckpointManager(run, timeout_s=0.5)
    objects.delete(place)
    with CheckpointManager(run) as manager:
        manager.save(1, trainer.state(1)).result()


def test_a_claim_that_somebody_removed_is_made_again(run, another):
    with CheckpointManager(run) as manager:
        (epath.Path(run) / names.LOCK).unlink()
        manager.save(1, trainer.state(1)).result()
        assert held(run)["pid"] == os.getpid()


@pytest.mark.parametrize("found", [b"", b"{", b"[1]", b'{"pid": "x", "machine": 1, "lease_s": "y"}'], ids=repr)
def test_what_is_no_claim_is_waited_for_and_replaced(run, found, monkeypatch):
    monkeypatch.setattr(claim, "_LEASE_S", LEASE_S)
    (epath.Path(run) / names.LOCK).write_bytes(found)
    with CheckpointManager(run):
        assert held(run)["pid"] == os.getpid()


def test_a_renewal_that_an_earlier_one_of_this_process_overtakes_is_made_again(servers):
    """On s3://, where the server refuses it: a request that was given up may arrive in the middle of the next."""
    run = epath.Path(f"s3://bucket/{uuid.uuid4().hex}/run")
    mine = claim.Claim(run)
    mine.take(5)
    real, late = mine._objects.replace, [1, 1]

    def replace(key, data, tag):
        if late and late.pop():
            real(key, data + b" ", tag)
        return real(key, data, tag)

    mine._objects.replace = replace
    mine.renew()
    assert not late
    assert mine.is_in_time()
    late += [1, 1, 1]
    with pytest.raises(OSError, match="the server has refused it"):
        mine.renew()
    mine.renew()
    objects.write(run / names.LOCK, json.dumps(held(str(run)) | {"token": "x", "machine": "another"}).encode())
    with pytest.raises(ckptmgr.SaveError, match="has taken it"):
        mine.renew()
    mine.release()


def test_what_a_process_uploads_after_its_save_was_given_up_blocks_no_number(run):
    late = epath.Path(run) / "2" / "params" / "ocdbt.process_1" / "d" / "00ff"
    bad = {"w": jax.numpy.full(3, jax.numpy.nan)}
    with CheckpointManager(run, nonfinite="refuse") as manager:
        manager.save(1, trainer.state(1)).result()
        with pytest.raises(ckptmgr.SaveError, match="refuse"):
            manager.save(2, bad).result()
        objects.write(late, b"late")
        manager.save(2, trainer.state(2)).result()
        assert not late.exists()
        with pytest.raises(ckptmgr.SaveError, match="refuse"):
            manager.save(3, bad).result()
        objects.write(epath.Path(str(late).replace("/2/", "/3/")), b"late")
    with CheckpointManager(run) as manager:
        manager.save(3, trainer.state(3)).result()
        assert manager.steps() == [1, 2, 3]
        assert manager.verify()


def test_only_one_of_two_that_want_the_same_claim_gets_it(servers):
    """On s3://: the server for gs:// knows no conditions."""
    store = objects.open_objects(epath.Path("s3://bucket/claims"))
    key = f"claims/{uuid.uuid4().hex}"
    first = store.create(key, b"one")
    assert first is not None
    assert store.create(key, b"two") is None
    second = store.replace(key, b"two", first)
    assert second is not None
    assert store.replace(key, b"three", first) is None
    store.remove(key, first)
    assert store.fetch(key).data == b"two"
    store.remove(key, second)
    assert store.fetch(key) is None
    assert store.replace(key, b"four", second) is None


def test_a_file_of_a_step_that_another_process_has_written_is_not_written_over(servers):
    """On s3://: the server for gs:// knows no conditions."""
    from ckptmgr.format import files

    path = epath.Path(f"s3://bucket/{uuid.uuid4().hex}/manifest.json")
    files.write(path, b"one")
    files.write(path, b"one")  # an answer may be lost, and the client sends it again
    with pytest.raises(FileExistsError, match="was written by another process meanwhile"):
        files.write(path, b"two")
    assert path.read_bytes() == b"one"


def names_below(run):
    return {entry.name for entry in epath.Path(run).iterdir() if entry.name != names.OURS}
