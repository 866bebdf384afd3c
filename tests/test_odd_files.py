"""Whatever lies in the place of a file is an error that names it, and a walk-back; nothing hangs or dies."""

import contextlib
import functools
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import odd_files
import pytest
from conftest import counted

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.cli import facts
from ckptmgr.format import names

DATA = pathlib.Path(__file__).parent / "data"
STOCK = ["v0_zarr3", "v0_zarr3_no_ocdbt", "v0_zarr2", "v0_zarr2_no_ocdbt", "v1_training_checkpointables"]
OURS = {"plain": {}, "zstd": {"compression": "zstd"}}


def save(manager, step):
    params = {"w": jnp.full((40, 30), step), "large": np.full(400_000, float(step)), "key": jax.random.key(step)}
    extras = {"at": {"n": step}, "blob": b"raw", "ema": {"w": jnp.full((40, 30), step)}}
    manager.save(step, params, {"m": jnp.full(3000, step)}, extras=extras, metrics={"loss": step})


def make(directory, form):
    if form in OURS:
        with CheckpointManager(directory, **OURS[form]) as manager:
            for step in (1, 2):
                save(manager, step)
    else:
        with tarfile.open(DATA / f"{form}.tar.gz") as archive:
            archive.extractall(directory.parent / "extracted", filter="data")
        (found,) = [path.parent for path in (directory.parent / "extracted").rglob("2") if path.is_dir()]
        found.rename(directory)
    return directory


@pytest.fixture(scope="module", params=[*OURS, *STOCK])
def run(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("odd") / "run", request.param)


def below(step, *, folders):
    return sorted(path for path in step.rglob("*") if path.is_dir() == folders)


def test_anything_in_the_place_of_any_file_or_folder_is_said_and_walked_back_from(run):
    saved, step, problems = odd_files.values(run), run / "2", []
    cases = [(path, kind) for path in below(step, folders=False) for kind in odd_files.FILES]
    cases += [(path, kind) for path in below(step, folders=True) for kind in odd_files.FOLDERS]
    for path, kind in cases[:: counted(11, full=1)]:
        with odd_files.instead_of(path, odd_files.FILES[kind]):
            name = path.relative_to(step).as_posix()
            problems += [f"{kind} as {name}: {each}" for each in odd_files.wrong(run, path.name, saved)]
    assert problems == []
    assert ckptmgr.CheckpointManager(run, read_only=True).verify(2)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A library that makes the system refuse to read a file."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the library that refuses to read")
    source = tmp_path_factory.mktemp("shim") / "shim.c"
    source.write_text(odd_files.SHIM)
    library = source.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.soak
@pytest.mark.parametrize("form", ["plain", "v0_zarr2_no_ocdbt"][: counted(1, full=2)])
@pytest.mark.parametrize("how", ["EIO", "ESTALE", "EACCES"][:: counted(2, full=1)])
def test_a_file_that_the_system_refuses_is_said_and_walked_back_from(how, form, tmp_path, shim):
    if how == "EACCES" and os.getuid() != 0:
        pytest.skip("to lay down its rights takes root")
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    make(tmp_path / "run", form)
    done = subprocess.run(
        [sys.executable, odd_files.__file__, tmp_path / "run", how],
        env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_a_process_that_may_open_no_more_files_says_so_and_passes_nothing_over(tmp_path):
    make(tmp_path / "run", "plain")
    run, held = CheckpointManager(tmp_path / "run", read_only=True), []
    run.restore()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        said = []
        for _ in range(8):
            calls = {
                "restore": run.restore, "infos": lambda: len(run.infos()), "verify": lambda: bool(run.verify()),
                "watch": lambda: list(run.watch(timeout_s=0)),
            }  # fmt: skip
            said += [(name, outcome(call)) for name, call in calls.items()]
            os.close(held.pop())
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    good = {"restore": 2, "infos": 2, "verify": True, "watch": [1, 2]}
    assert [(name, what) for name, what in said if what not in ("ulimit", good[name])] == []
    assert {what for _, what in said if isinstance(what, str)} == {"ulimit"}
    assert run.restore().step == 2


def outcome(call):
    """What a call gives, in short."""
    try:
        found = call()
    except ckptmgr.CheckpointError as problem:
        return "ulimit" if "ulimit" in str(problem) else repr(problem)
    return getattr(found, "step", found)


ODD = [
    ("manifest.json", "a FIFO"), ("manifest.json", "what gives an I/O error"), ("step/metadata", "a directory"),
    ("params/manifest.ocdbt", "a FIFO"), ("PINNED", "a symlink to itself"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), ODD)
def test_retention_goes_on_beside_a_step_that_cannot_be_read_and_leaves_it_alone(name, kind, tmp_path):
    make(tmp_path, "plain")
    with CheckpointManager(tmp_path, keep=1) as manager:
        path = tmp_path / "2" / name
        path.unlink(missing_ok=True)
        odd_files.FILES[kind](path)
        assert manager.restore().step == (2 if name == "PINNED" else 1)
        for step in (3, 4):
            save(manager, step)
        manager.wait()
        assert manager.steps() == [2, 4]
        assert manager.restore().step == 4


@pytest.mark.parametrize("name", [names.LOCK, names.JOURNAL, names.TOKEN])
def test_a_fifo_in_the_place_of_a_file_of_the_run_holds_up_nobody(name, tmp_path):
    make(tmp_path, "plain")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert facts.run(CheckpointManager(tmp_path, read_only=True))["steps"]
    if name == names.LOCK:
        with pytest.raises(OSError, match="not a regular file"):
            CheckpointManager(tmp_path)
    else:
        with CheckpointManager(tmp_path) as manager:
            save(manager, 3)


def test_a_step_may_lie_elsewhere_and_a_file_of_it_too(tmp_path):
    """What a cache of downloads does: symlinks to whole files are read."""
    make(tmp_path / "run", "plain")
    for number, path in enumerate(below(tmp_path / "run" / "2", folders=False)):
        aside = tmp_path / f"aside-{number}"
        path.rename(aside)
        path.symlink_to(aside)
    (tmp_path / "run" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "1").symlink_to(tmp_path / "elsewhere")
    run = CheckpointManager(tmp_path / "run", read_only=True)
    assert (run.restore().step, run.restore(1).step) == (2, 1)
    assert run.verify(1)
    assert run.verify(2)


def _filled(path):
    make(path, "plain")
    shutil.rmtree(path)


RUNS = {
    name: odd_files.FILES[name]
    for name in ("nothing", "an empty file", "a FIFO", "a socket", "a symlink to itself", "a dangling symlink")
} | {"a device": odd_files.FILES["a device without an end"], "a run that was deleted": _filled}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_no_directory_is_an_error_that_names_it(kind, tmp_path):
    (tmp_path / "2").mkdir()
    RUNS[kind](tmp_path / "2" / "run")
    for place in ("run", "run/below"):
        check_no_run(CheckpointManager(tmp_path / "2" / place, read_only=True), tmp_path / "2" / place)


def test_a_run_that_goes_while_it_is_read_is_an_error_that_names_it(tmp_path):
    run = CheckpointManager(make(tmp_path / "run", "plain"), read_only=True)
    assert run.restore().step == 2
    shutil.rmtree(tmp_path / "run")
    check_no_run(run, tmp_path / "run")
    (tmp_path / "run").touch()
    check_no_run(run, tmp_path / "run")


def check_no_run(run, directory):
    numbered = [run.restore, run.verify, run.info, lambda step: run.diff(step, params={})]
    for call in (run.restore, run.verify, *[functools.partial(each, 2) for each in numbered]):
        with pytest.raises(ckptmgr.CheckpointError, match=directory.name):
            call()
    for look in (run.steps, run.latest, run.infos, lambda: run.best("loss"), lambda: list(run.watch(timeout_s=0))):
        with contextlib.suppress(ckptmgr.CheckpointError):
            assert not look()
