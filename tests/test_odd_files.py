"""Whatever lies in the place of a file is an error that names it, and a walk-back; nothing hangs or dies."""

import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import odd_files
import pytest
from conftest import counted

import ckptmgr
from ckptmgr import CheckpointManager

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
