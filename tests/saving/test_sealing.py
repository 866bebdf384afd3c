"""A manifest says what was saved: what somebody else did to the files meanwhile is a SaveError, or found later."""

import importlib
import itertools
import random
import shutil

import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import counted
from etils import epath

import ckptmgr
from ckptmgr import CheckpointManager
from ckptmgr.arrays import chunks, to_host
from ckptmgr.format import files, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.saving import sealing


def save(manager, step, value=None, **how):
    value = float(step if value is None else value)
    params = {"w": jnp.full((40, 30), value), "large": np.full(300_000, value), "key": jax.random.key(int(value))}
    ema = {"w": jnp.full((40, 30), value), "none": jnp.ones((0, 3))}
    extras = {"at": {"n": int(value)}, "ema": ema, "tiny": {"n": jnp.asarray(value)}}
    return manager.save(step, params, {"m": jnp.full(3000, value)}, extras=extras, metrics={"loss": value}, **how)


def _swap(path, draft):
    good = path.read_bytes()
    others = [each for each in files_of(draft) if each.read_bytes() != good]
    path.write_bytes(others[0].read_bytes() if others else b"x")


def _flipped(data):
    return data[:-1] + bytes([(data[-1] if data else 0) ^ 1])


HARMS = {
    "removed": lambda path, draft: path.unlink(),
    "emptied": lambda path, draft: path.write_bytes(b""),
    "changed": lambda path, draft: path.write_bytes(_flipped(path.read_bytes())),
    "replaced by another": _swap,
    "beside another": lambda path, draft: (path.parent / "stranger").write_bytes(b"x"),
    "with its folder removed": lambda path, draft: shutil.rmtree(path.parent),
    "with its folder emptied": lambda path, draft: [each.unlink() for each in files_of(path.parent)],
}


POINTS = ["arrays", "description", "file", "sync"]
"""Where in a save somebody else is at work; after "file" and "sync" some of it is sealed already."""


def do_at(point, act, put):
    """Has somebody else act whenever a save comes to a point, before it and after it."""
    module, _, name = faults.POINTS[point].partition(":")
    owner = importlib.import_module(module)
    real = getattr(owner, name)

    def disturbed(*args, **kwargs):
        act()
        result = real(*args, **kwargs)
        act()
        return result

    put(owner, name, disturbed)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drafts(run):
    return [path for path in (*run.iterdir(), *run.glob(".ckptmgr/*/*")) if "tmp" in path.name or path.name == "9"]


@pytest.mark.parametrize("point", POINTS)
def test_what_somebody_does_to_a_step_while_it_is_written_is_never_sealed_as_whole(point, tmp_path, monkeypatch):
    wrong, refused = [], 0
    with CheckpointManager(tmp_path) as manager:
        save(manager, 1).result()
        for number, (how, harm) in itertools.product(range(counted(1, full=60)), HARMS.items()):
            draw = random.Random(number)

            def act(harm=harm, draw=draw):
                found = [path for draft in drafts(tmp_path) for path in files_of(draft)]
                if found and draw.random() < 0.3:
                    path = draw.choice(found)
                    harm(path, next(each for each in path.parents if each in drafts(tmp_path)))

            with monkeypatch.context() as patch:
                do_at(point, act, patch.setattr)
                try:
                    save(manager, 9, on_exists="replace").result()
                except (ckptmgr.SaveError, OSError):
                    refused += 1
            with CheckpointManager(tmp_path, read_only=True) as reader:
                if 9 in reader.steps() and reader.verify(9):
                    is_right = (np.asarray(reader.restore(9).params["large"]) == 9).all()
                    wrong += [] if is_right and set(reader.info(9).items) == ITEMS else [(how, number)]
    assert wrong == []
    assert refused or point == "sync"  # by then it has been looked through: what is done later is found later
    assert CheckpointManager(tmp_path, read_only=True).restore(1).params


ITEMS = {"params", "opt_state", "step", "metrics", "at", "ema", "tiny"}


@pytest.mark.parametrize("how", HARMS)
def test_what_is_done_to_a_file_before_the_commit_is_refused_and_said(how, tmp_path):
    """The check by itself, over each file of a step: what was written is compared with what is there."""
    with CheckpointManager(tmp_path / "run") as manager:
        save(manager, 1)
    names = [path.relative_to(tmp_path / "run" / "1") for path in files_of(tmp_path / "run" / "1")]
    for name in names:
        if name.name == "manifest.json":
            continue
        shutil.copytree(tmp_path / "run" / "1", tmp_path / "draft")
        HARMS[how](tmp_path / "draft" / name, tmp_path / "draft")
        with pytest.raises((ckptmgr.SaveError, FileNotFoundError), match="draft"):
            check(tmp_path / "draft", tmp_path / "run" / "1")
        shutil.rmtree(tmp_path / "draft", ignore_errors=True)


def check(draft, wrote):
    """Looks a draft through as the commit does; it was meant to hold what `wrote` holds."""
    read = manifests.decode((wrote / "manifest.json").read_bytes(), step=1, path="")
    plans = {name: plan_of(item.tree) for name, item in read.items.items() if item.kind == "arrays"}
    texts = {
        name: (wrote / name).read_bytes() for name in read.files
        if "/d/" not in name and not name.endswith("manifest.ocdbt")
    }  # fmt: skip
    (draft / "manifest.json").unlink(missing_ok=True)
    sizes = files.walk(epath.Path(draft))[1]
    found = recorded.record_files(epath.Path(draft), sizes, recorded.checks_itself(epath.Path(draft)))
    sealing.check(1, epath.Path(draft), sealing.Meant(texts, {}, plans, None), found)


def test_what_other_processes_have_written_is_what_they_have_reported_and_nothing_else(tmp_path):
    draft = epath.Path(tmp_path)
    part, text = "params/ocdbt.process_1", "mine/process_1.json"
    for name in (f"{part}/manifest.ocdbt", f"{part}/d/{'0' * 32}", text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    told = sealing.unpack([None, sealing.pack(sealing.own_files(draft, [text], [part, "opt_state/none"]))])
    assert set(told) == set(files.walk(draft)[1])

    def look(reported):
        found = recorded.record_files(draft, files.walk(draft)[1], recorded.checks_itself(draft))
        sealing.check(
            1, draft, sealing.Meant({}, reported, {"params": to_host.Plan(None, (), (), ())}, None), found
        )

    look(told)
    for name, file in told.items():
        rest = {each: facts for each, facts in told.items() if each != name}
        for wrong in (
            rest,
            told | {name: manifests.File(file.size, 7)},
            told | {name: manifests.File(9, file.crc32)},
        ):
            with pytest.raises(ckptmgr.SaveError, match=name):
                look(wrong)
    with pytest.raises(ckptmgr.SaveError, match=r"params/d/x is missing"):
        look(told | {"params/d/x": manifests.File(1, 1)})
    folders = files.walk(draft)[0]
    assert set(folders) - set(sealing.without_parts(draft, folders, told)) == {draft / part, draft / part / "d"}


def plan_of(tree):
    shapes = [leaf.shape + (2,) * (leaf.kind == "key") for leaf in tree.leaves]
    dtypes = ["uint32" if leaf.kind == "key" else leaf.dtype for leaf in tree.leaves]
    stored = tuple(
        chunks.Stored(shape, dtype, leaf.chunks or chunks.whole(shape))
        for leaf, shape, dtype in zip(tree.leaves, shapes, dtypes, strict=True)
    )
    return to_host.Plan(tree, stored, (None,) * len(stored), ())


# ---------------------------------------------------------------- mixtures


def test_any_file_swapped_with_one_of_another_save_is_found(tmp_path):
    """Two saves of one step, and two steps: all files have the same names, but for those of the arrays."""
    others = [("again", 1, 5), ("later", 2, 5), ("third", 1, 11), ("fourth", 1, 4.5)]
    for run, step, value in [("one", 1, 3), *others]:
        with CheckpointManager(tmp_path / run) as manager:
            save(manager, step, value).result()
    missed = []
    for other, *_ in others:
        theirs = {kind(path): path for path in files_of(tmp_path / other) if path.parent.name != other}
        for path in files_of(tmp_path / "one" / "1"):
            good, swapped = path.read_bytes(), theirs[kind(path)].read_bytes()
            path.write_bytes(swapped)
            if swapped != good and CheckpointManager(tmp_path / "one", read_only=True).verify(1):
                missed.append(str(path.relative_to(tmp_path)))
            path.write_bytes(good)
    assert missed == []
    assert CheckpointManager(tmp_path / "one", read_only=True).verify(1)


def kind(path):
    """The file of another step that takes the place of this one."""
    place = path.parts[-3:] if path.parent.name in ("d", "array_metadatas") else path.parts[-2:]
    return ("d", place[0]) if path.parent.name == "d" else place if place[0] not in "12" else place[1:]


def test_a_database_of_another_save_that_has_the_same_size_is_found(tmp_path):
    """Values of few bytes lie in the nodes of the database, which are whole by themselves."""
    databases = {}
    for value in range(30):
        with CheckpointManager(tmp_path / str(value)) as manager:
            manager.save(1, {"n": jnp.asarray(1000.123 * value, jnp.float32)})
        (database,) = (tmp_path / str(value) / "1" / "params" / "d").iterdir()
        databases.setdefault(database.stat().st_size, []).append(database)
    one, other = next(equal for equal in databases.values() if len(equal) > 1)[:2]
    one.write_bytes(other.read_bytes())
    run = CheckpointManager(one.parents[3], read_only=True)
    assert not run.verify(1)
    with pytest.raises(ckptmgr.CorruptCheckpointError, match=one.name):
        run.restore(1)


def test_a_file_of_values_of_another_save_is_found(tmp_path):
    """An item that is written in several transactions has files that hold values alone."""
    for name, value in (("one", 1.0), ("other", 2.0)):
        with CheckpointManager(tmp_path / name) as manager:
            manager.save(1, {f"w{i:02}": np.full(260_000, value, np.float32) for i in range(12)})
    one, other = (
        sorted((tmp_path / name / "1/params/d").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for name in ("one", "other")
    )
    assert len(one) > 2
    run = CheckpointManager(tmp_path / "one", read_only=True)
    for path, theirs in zip(one, other, strict=True):
        good = path.read_bytes()
        path.write_bytes(theirs.read_bytes())
        assert not run.verify(1)
        with pytest.raises(ckptmgr.CorruptCheckpointError):
            run.restore(1)
        path.write_bytes(good)
    assert run.verify(1)
