"""Checkpoints as others leave them (`tests/data`): each is read and equals, or is refused by a sentence.

`TABLE` says which; the sentence says how it can be read. `docs/interop.md` holds the same table for readers.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from conftest import counted, visible
from data import make

import ckptmgr
from ckptmgr import HOST, CheckpointManager, interop
from ckptmgr.cli import facts, tables
from ckptmgr.cli.app import app
from ckptmgr.format import names
from ckptmgr.testing import assert_trees_equal

DATA = pathlib.Path(__file__).parent / "data"
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "interop.md"
ADAM = optax.adam(1e-3)


def plain_state(step):
    """Adam's state as it comes back without a template."""
    adam = make.state(step)[0]
    return [{"count": adam.count, "mu": adam.mu, "nu": adam.nu}, None]


def own_state(step):
    adam = make.state(step)[0]
    return ({"count": adam.count, "mu": adam.mu, "nu": adam.nu}, {})


@dataclasses.dataclass(frozen=True)
class Row:
    """`reads` gives the items of a step without a template, `fits` the same as templates."""

    file: str
    wrote: str
    here: str
    steps: tuple[int, ...] = (1, 2)
    reads: Callable[[int], dict[str, Any]] | None = None
    fits: Callable[[int], dict[str, Any]] | None = None
    refused: str = ""
    unread: tuple[str, ...] = ()
    saves: bool = True


def params(step):
    return {"params": make.params(step)}


def every_form(step):
    key = jax.random.key(3)
    return {
        "params": make.params(step), "array": jnp.arange(4.0), "number": 7, "jax_key": key,
        "old_key": jax.random.key_data(key), "numpy_key": make.MT19937, "numpy_dict": make.MT19937_DICT,
        "config": {"lr": 0.1},
    }  # fmt: skip


def own(step):
    extras = {"position": {"epoch": 2}, "blob": b"raw", "key": jax.random.key(3)}
    return {"params": make.params(step), "opt_state": own_state(step)} | extras


def own_leftovers(step):
    scale = {1: 1, 2: 22, 3: 33}[step]
    return own(1) if step == 1 else {"params": make.params(scale), "opt_state": own_state(scale)}


NAMES = "read; a new step is refused: save into another directory, or rename them"
TABLE = [
    Row("v0_standard", "`StandardSave`, `JsonSave` in a `Composite`", "read",
        reads=lambda n: {"params": make.tree(n), "opt_state": plain_state(n), "config": {"lr": 0.1}},
        fits=lambda n: {"params": make.tree(n), "opt_state": make.state(n), "config": None}),
    Row("v0_pytree", "`PyTreeSave` in a `Composite`", "read",
        reads=lambda n: {"params": make.tree(n), "opt_state": plain_state(n)},
        fits=lambda n: {"params": make.tree(n), "opt_state": make.state(n)}),
    Row("v0_single", "`CheckpointManager.save` of one tree without a name",
        "read as the extra `default`, Orbax's own name for it", reads=lambda n: {"default": make.params(n)}),
    Row("v0_every_form", "`ArraySave`, `JaxRandomKeySave`, `NumpyRandomKeySave`, `ProtoSave`",
        "read, but for the protocol buffer: named in `CheckpointInfo.unread`, an error if asked for",
        steps=(5,), reads=every_form, unread=("proto",)),
    Row("v0_own_handler", "an item of a `CheckpointHandler` of your own",
        "named in `CheckpointInfo.unread`, an error if asked for; the others are read",
        steps=(5,), reads=lambda n: params(1), unread=("blob",)),
    Row("v0_names_with_slashes", "items named as `ema/params` is", "read, as extras of these names",
        steps=(5,),
        reads=lambda n: params(n) | {"ema/params": make.params(2 * n), "data/position": {"epoch": 2}}),
    Row("v0_string_leaf", "a leaf that is a str", "read as a str; a template has a str in its place",
        steps=(5,), reads=lambda n: params(1) | {"notes": {"by": "me", "n": 3, "w": jnp.ones(2)}}),
    Row("v0_metrics", "metrics and custom_metadata", "read, as metrics and as metadata", reads=params),
    Row("v0_zarr2", "zarr2 in a database (OCDBT)", "read", reads=params),
    Row("v0_zarr3", "zarr3 in a database (OCDBT)", "read", reads=params),
    Row("v0_zarr2_no_ocdbt", "zarr2, a directory for each array", "read", reads=params),
    Row("v0_zarr3_no_ocdbt", "zarr3, a directory for each array", "read", reads=params),
    Row("v0_prefix", "`step_prefix` (`run_9`)", NAMES, steps=(9, 10), reads=params, saves=False),
    Row("v0_padded", "`step_format_fixed_length` (`000009`)", NAMES, steps=(9, 10), reads=params, saves=False),
    Row("v0_prefix_padded", "both (`step_00000009`)", NAMES, steps=(9, 10), reads=params, saves=False),
    Row("v0_straight", "`StandardCheckpointer.save(DIR/STEP, tree)`", "the tree is read as params",
        reads=lambda n: {"params": make.tree(n)}),
    Row("v0_straight_pytree", "`PyTreeCheckpointer.save(DIR/STEP, state)`",
        "the whole tree is read as params, also one that has a key `params`",
        reads=lambda n: {"params": params(n) | {"step": n}}),
    Row("v0_straight_array", "an `ArrayCheckpointHandler` straight in `DIR/STEP`", "read as the extra `default`",
        steps=(1,), reads=lambda n: {"default": jnp.arange(4.0)}),
    Row("v0_straight_json", "a `JsonCheckpointHandler` straight in `DIR/STEP`", "read as the extra `default`",
        steps=(1,), reads=lambda n: {"default": {"lr": 0.1}}),
    Row("v1_pytree", "v1 `save_pytree(DIR/STEP, tree)`", "read as the extra `state`, v1's own name for it",
        reads=lambda n: {"state": make.tree(n)}),
    Row("v1_string", "v1 `save_pytree` with a leaf that is a str", "read, the leaf as a str", steps=(1,),
        reads=lambda n: {"state": {"by": "me", "w": jnp.ones(2)}}),
    Row("v1_checkpointables", "v1 `save_checkpointables(DIR/STEP, ...)`", "read",
        reads=lambda n: params(n) | {"opt_state": plain_state(n), "config": {"lr": 0.1, "name": "adam"}},
        fits=lambda n: params(n) | {"opt_state": make.state(n), "config": {"lr": 0.1, "name": "adam"}}),
    Row("v1_json", "v1's `JsonHandler`", "read", steps=(1,),
        reads=lambda n: params(1) | {"config": {"lr": 0.1, "name": "adam"}}),
    Row("v1_training", "v1 `training.Checkpointer.save_pytree`", "read as the extra `state`, with its metrics",
        reads=lambda n: {"state": make.params(n)}),
    Row("v1_training_checkpointables", "v1 `training.Checkpointer.save_checkpointables`", "read",
        reads=lambda n: params(n) | {"config": {"lr": 0.1}}),
    Row("flax_msgpack", "flax `save_checkpoint`: a file `checkpoint_9`",
        "refused: `ckptmgr import NEW_RUN checkpoint_9 --step 9`", steps=(), refused="ckptmgr import NEW_RUN"),
    Row("flax_orbax", "flax `save_checkpoint` with Orbax: directories `checkpoint_9`",
        f"the whole state is params; {NAMES}",
        steps=(9, 10), reads=lambda n: {"params": params(n) | {"step": n}}, saves=False),
    Row("format1", "ckptmgr, format 1", "read", steps=(1, 2, 3), reads=own,
        fits=lambda n: own(n) | {"opt_state": make.state(n)}),
    Row("format1_leftovers", "the same, with replaced, pinned and damaged steps, and what was interrupted",
        "read; the next manager that writes tidies", steps=(1, 2, 3), reads=own_leftovers),
]  # fmt: skip
READ = [row for row in TABLE if not row.refused]
STOCK = [row for row in TABLE if not row.file.startswith("format1")]
by_file = functools.partial(pytest.mark.parametrize, ids=lambda row: row.file)


@functools.cache
def packed(file):
    with tarfile.open(DATA / f"{file}.tar.gz") as archive:
        return [
            (each, archive.extractfile(each).read() if each.isfile() else None) for each in archive.getmembers()
        ]


def unpack(file, directory):
    """The checkpoint, in a new directory."""
    directory.mkdir()
    for each, content in packed(file):
        path = directory / each.name
        path.mkdir() if content is None else path.write_bytes(content)
    return directory


@pytest.fixture
def run(row, tmp_path):
    return unpack(row.file, tmp_path / "run")


def parts(found):
    """The items of a restored checkpoint."""
    given = {"params": found.params, "opt_state": found.opt_state}
    return {name: value for name, value in given.items() if value is not None} | dict(found.extras)


def assert_same(found, wanted):
    """Bits, dtypes and kinds; a str, which is no leaf that ckptmgr saves, by itself."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        texts = [leaf for leaf in jax.tree.leaves(found[name]) if isinstance(leaf, str)]
        assert texts == [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, str)]
        assert jax.tree.structure(found[name]) == jax.tree.structure(value)
        assert_trees_equal(without_text(found[name]), without_text(value))


def without_text(tree):
    return jax.tree.map(lambda leaf: None if isinstance(leaf, str | bytes) else leaf, tree)


def templates(items):
    return {
        "params": items.get("params"),
        "opt_state": items.get("opt_state"),
        "extras": {name: value for name, value in items.items() if name not in ("params", "opt_state")},
    }


# ---------------------------------------------------------------- the table


def test_every_kept_checkpoint_has_a_row():
    assert {row.file for row in TABLE} == {path.name.removesuffix(".tar.gz") for path in DATA.glob("*.tar.gz")}
    assert {row.file for row in TABLE} == set(make.FIXTURES)
    assert sum(path.stat().st_size for path in DATA.iterdir() if path.is_file()) < 600_000


@by_file("row", READ)
def test_it_is_listed_and_read_without_a_template(row, run):
    manager = CheckpointManager(run, read_only=True)
    assert manager.steps() == list(row.steps) == list(manager.watch(timeout_s=0))
    assert manager.latest() == row.steps[-1]
    for step in row.steps:
        found = manager.restore(step)
        assert_same(parts(found), row.reads(step))
        assert tuple(found.info.unread) == row.unread
        assert manager.verify(step)
    assert manager.restore().step == row.steps[-1]
    assert [info.step for info in manager.infos()] == list(row.steps)


@by_file("row", READ)
def test_it_is_read_into_templates_and_resumed_from(row, run):
    newest = row.steps[-1]
    wanted = (row.fits or row.reads)(newest)
    manager = CheckpointManager(run, read_only=True)
    found = manager.restore_or(**templates(wanted))
    assert found.resumed
    assert found.step == newest
    assert_same(parts(found), wanted | {name: row.reads(newest)[name] for name in wanted if wanted[name] is None})
    assert_same(parts(manager.restore(newest, layout=HOST, **templates(wanted))), row_on_host(row, newest))


def row_on_host(row, step):
    wanted = (row.fits or row.reads)(step)
    read = {name: row.reads(step)[name] if value is None else value for name, value in wanted.items()}
    return jax.tree.map(lambda leaf: np.asarray(leaf) if is_plain_array(leaf) else leaf, read)


def is_plain_array(leaf):
    return isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@by_file("row", STOCK)
def test_it_is_adopted_and_reads_as_before(row, run):
    if row.refused:
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match=row.refused):
            interop.adopt(run)
        return
    assert interop.adopt(run) == list(row.steps)
    manager = CheckpointManager(run, read_only=True)
    for step in row.steps:
        report = manager.verify(step)
        assert report
        assert [line.partition(":")[0] for line in report.unchecked] == list(row.unread)
        assert_same(parts(manager.restore(step)), row.reads(step))


@by_file("row", READ)
def test_after_it_is_adopted_every_file_is_watched(row, run):
    if row in STOCK:
        interop.adopt(run)
    newest = next(path for path in run.iterdir() if names.number(path.name) == row.steps[-1])
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    for path in random.Random(row.file).sample(files, min(len(files), counted(3, 100))):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not CheckpointManager(run, read_only=True).verify(), path
        path.write_bytes(whole)


@by_file("row", [row for row in TABLE if row.refused])
def test_it_is_refused_by_a_sentence_and_never_taken_for_an_empty_run(row, run):
    manager = CheckpointManager(run)
    calls = [
        manager.steps, manager.latest, manager.restore, manager.infos, manager.verify,
        lambda: manager.restore_or(params=make.params()), lambda: next(manager.watch(timeout_s=0)),
        lambda: manager.save(11, make.params()),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match=row.refused):
            call()
    manager.close()


def test_the_command_that_the_sentence_names_imports_it(tmp_path, monkeypatch, capsys):
    run = unpack("flax_msgpack", tmp_path / "run")
    with pytest.raises(ckptmgr.CheckpointNotFoundError) as caught:
        CheckpointManager(run, read_only=True).steps()
    command = str(caught.value).rpartition("ckptmgr ")[2].replace("NEW_RUN", str(tmp_path / "new")).split()
    monkeypatch.chdir(run)
    app(command, standalone_mode=False)
    assert capsys.readouterr().out.startswith("step 10 saved")
    found = CheckpointManager(tmp_path / "new", read_only=True).restore(10).params
    assert_trees_equal(found, jax.tree.map(np.asarray, make.params(10)))


@by_file("row", TABLE)
def test_a_training_that_goes_on_adds_a_step_or_is_told_why_not(row, run):
    before = visible(run)
    if row.refused:
        return
    with CheckpointManager(run) as manager:
        resumed = manager.restore_or()
        if row.saves:
            manager.save(resumed.step + 1, make.params(7))
            manager.wait()
            assert manager.latest() == resumed.step + 1
            assert_same(parts(manager.restore()), {"params": make.params(7)})
            return
        for step in (resumed.step, resumed.step + 1):
            with pytest.raises(ckptmgr.SaveError, match="Save into another directory"):
                manager.save(step, make.params(7), on_exists="replace")
    assert visible(run) == before


@by_file("row", TABLE)
def test_the_command_line_shows_it(row, run, capsys):
    if row.refused:
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match=row.refused):
            facts.reader(run)
        return
    manager = facts.reader(run)
    listed = facts.run(manager)
    assert [step["step"] for step in listed["steps"] if not step["damaged"]] == list(row.steps)
    shown = facts.checkpoint(manager, facts.chosen(manager, None))
    assert set(shown["items"]) >= set(row.reads(row.steps[-1]))
    assert set(shown["unread"]) == set(row.unread)
    json.dumps([listed, shown])
    for table in (tables.run(listed), tables.checkpoint(shown)):
        assert table is not None
    same = [(manager, row.steps[-1])] * 2
    assert facts.difference(*same, values=True)["equal"]


@by_file("row", [row for row in TABLE if row.unread])
def test_an_item_that_is_not_read_is_said_and_is_an_error_if_asked_for(row, run, caplog):
    manager = CheckpointManager(run, read_only=True)
    manager.restore()
    for name in row.unread:
        assert any(f"{name} is not restored" in record.getMessage() for record in caplog.records)
        for how in ({}, {"partial": True}):
            with pytest.raises(ckptmgr.UnsupportedLeafError, match=f"{name} is not restored") as caught:
                manager.restore(extras={name: None}, **how)
            assert caught.value.leaf == name


def test_the_page_for_readers_says_the_same():
    lines = [f"| {row.wrote} | {row.here} |" for row in TABLE]
    text = DOCS.read_text()
    missing = [line for line in lines if line not in text]
    assert not missing, "\n".join(["docs/interop.md lacks:", *missing])


@pytest.mark.parametrize(
    ("file", "name"), [("v0_single", "default"), ("v1_pytree", "state"), ("v1_training", "state")]
)
def test_params_that_have_another_name_are_refused_by_a_sentence_that_says_it(file, name, tmp_path):
    manager = CheckpointManager(unpack(file, tmp_path / "run"), read_only=True)
    with pytest.raises(ckptmgr.StructureMismatchError, match=f"no params; .*extras={{'{name}': template}}"):
        manager.restore_or(params=make.params())


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("form", ["ckpt-{}", "step{}", "epoch={:04}", "my_run_{}"])
def test_names_of_any_prefix_are_read_but_not_what_is_being_written_or_was_set_aside(form, tmp_path):
    run = unpack("v0_padded", tmp_path / "run")
    (run / "000009").rename(run / form.format(9))
    (run / "000010").rename(run / form.format(10))
    for aside in ("3.damaged-1795523595307022770", "run_11.orbax-checkpoint-tmp-11", ".deleted-2-17"):
        shutil.copytree(run / form.format(9), run / aside)
    manager = CheckpointManager(run, read_only=True)
    assert manager.steps() == [9, 10]
    assert manager.restore().step == 10


NAMED = {
    "two runs": (("v0_prefix", "run_9"), ("v0_prefix_padded", "step_00000010"), "these are two runs"),
    "one step twice": (
        ("v0_padded", "000009"),
        ("v0_prefix", "0009"),
        "one step under several names: 000009 and 0009",
    ),
}


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_names_that_leave_open_which_run_it_is_are_refused(case, tmp_path):
    *given, said = NAMED[case]
    run = tmp_path / "run"
    run.mkdir()
    for place, (file, name) in enumerate(given):
        found = unpack(file, tmp_path / str(place))
        shutil.copytree(found / "run_9" if name == "0009" else found / name, run / name)
    for call in (CheckpointManager(run).steps, CheckpointManager(run, read_only=True).restore_or):
        with pytest.raises(ckptmgr.CheckpointNotFoundError, match=said):
            call()


def test_the_directory_of_one_checkpoint_is_no_empty_run(tmp_path):
    run = unpack("v0_straight", tmp_path / "run")
    with pytest.raises(ckptmgr.CheckpointNotFoundError, match=f"open its parent, {run}"):
        CheckpointManager(run / "1").restore_or(params=make.params())


@pytest.mark.parametrize("what", ["nothing", "notes.txt", "below/notes.txt", ".nfs0001", "metadata", "step_9"])
def test_a_directory_that_nobody_of_us_wrote_is_no_step_and_is_left_alone(what, tmp_path):
    (tmp_path / "2024" / what).parent.mkdir(parents=True)
    if what != "nothing":
        (tmp_path / "2024" / what).write_text("mine")
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.steps() == []
        assert not manager.restore_or(params=make.params()).resumed
        for step in (1, 2):
            manager.save(step, make.params(step))
            manager.wait()
        assert manager.steps() == [2]
        assert manager.latest() == manager.restore().step == 2
        if what != "nothing":
            with pytest.raises(ckptmgr.SaveError, match="2024 exists and is not a checkpoint"):
                manager.save(2024, make.params(), on_exists="replace")
    assert (tmp_path / "2024" / what).exists() or what == "nothing"
    assert (tmp_path / "2024").is_dir()


def test_a_step_with_nothing_that_is_known_is_never_whole(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {}}')
    manager = CheckpointManager(tmp_path, read_only=True)
    assert not manager.verify(3)
    for call in (manager.restore, lambda: interop.adopt(tmp_path)):
        with pytest.raises(ckptmgr.CorruptCheckpointError, match="holds nothing that ckptmgr or Orbax writes"):
            call()


# ---------------------------------------------------------------- damage


def damages(file):
    """Every way in which one small file of a checkpoint may be spoilt: what Orbax's own files do not survive."""
    names = [each.name for each, content in packed(file) if content is not None]
    return [(file, name, how) for name in names for how in ("empty", "half", "bit", "folder", "gone")]


def spoil(path, how, seed):
    whole = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "bit" and whole:
        bit = random.Random(seed).randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
    elif how != "gone":
        path.write_bytes(whole[: len(whole) // 2 if how == "half" else 0])
    return whole


def restore_whole(path, whole):
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(whole)


@pytest.mark.soak
@by_file("row", STOCK)
def test_a_spoilt_file_of_others_is_an_error_of_ours(row, run, monkeypatch):
    cases = damages(row.file)
    chosen = random.Random(row.file).sample(cases, min(len(cases), counted(12, len(cases))))
    for _, name, how in chosen:
        whole = spoil(run / name, how, f"{name} {how}")
        manager = CheckpointManager(run, read_only=True)
        calls = [manager.restore, manager.infos, *(functools.partial(manager.verify, step) for step in row.steps)]
        for call in calls:
            with contextlib.suppress(ckptmgr.CheckpointError):
                call()
        restore_whole(run / name, whole)


LOST = {  # a file of step 2, and what is said of it when it is cut to half or is empty
    "v0_standard": ["params/_METADATA", "params/array_metadatas/process_0", "config/metadata"],
    "v0_straight": ["_METADATA", "array_metadatas/process_0"],
    "v0_metrics": ["metrics/metrics"],
    "v1_checkpointables": ["params/_METADATA", "config/_strings.json"],
}


@pytest.mark.parametrize("size", [0, 9])
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in LOST.items() for name in names])
def test_a_cut_file_is_named_and_the_step_before_is_restored(file, name, size, tmp_path):
    run = unpack(file, tmp_path / "run")
    path = run / "2" / name
    path.write_bytes(path.read_bytes()[:size])
    manager = CheckpointManager(run, read_only=True)
    found = manager.restore()
    assert found.step == 1
    assert name.rpartition("/")[2] in found.skipped[2]
    report = manager.verify(2)
    assert not report
    assert name.rpartition("/")[2] in str(report)
    with pytest.raises(ckptmgr.CorruptCheckpointError, match=name.rpartition("/")[2]):
        manager.restore(2)


@pytest.mark.parametrize("size", [0, 9, None])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("v0_standard", "_CHECKPOINT_METADATA"),
        ("v0_straight", "_CHECKPOINT_METADATA"),
        ("v0_standard", "params/_sharding"),
    ],
)
def test_what_orbax_restores_without_is_restored_and_named(file, name, size, tmp_path):
    run = unpack(file, tmp_path / "run")
    path = run / "2" / name
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    manager = CheckpointManager(run, read_only=True)
    row = next(row for row in TABLE if row.file == file)
    assert_same(parts(manager.restore(2)), row.reads(2))
    report = manager.verify(2)
    assert bool(report) == (size is None)
    assert size is None or name in str(report)


def test_what_an_older_orbax_wrote_without_metadata_and_markers_is_read(tmp_path):
    run = unpack("v0_standard", tmp_path / "run")
    (run / "2" / "config").rename(run / "2" / "step")  # a name that ckptmgr gives to an item of its own
    (run / "2" / "_CHECKPOINT_METADATA").unlink()
    for path in run.rglob("commit_success.txt"):
        path.unlink()
    for path in run.rglob("_METADATA"):
        told = json.loads(path.read_text())
        del told["store_array_data_equal_to_fill_value"]  # which came later than the file beside the items
        path.write_text(json.dumps(told))
    found = CheckpointManager(run, read_only=True).restore(2)
    assert_same(parts(found), {"params": make.tree(2), "opt_state": plain_state(2)})
    assert found.info.items == ("opt_state", "params", "step")


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("ocdbt", [True, False])
def test_chunks_of_zeros_that_an_older_orbax_did_not_store_are_zeros(ocdbt, tmp_path):
    """It left them out, and did not write the key that says so. With the key a missing chunk is damage."""
    tree = {"w": jnp.arange(6.0), "mu": jnp.zeros((4, 3)), "count": np.zeros(2, np.int32)}
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt))
    with ocp.CheckpointManager(tmp_path, saver) as stock:
        stock.save(1, tree)
    (metadata,) = tmp_path.rglob("_METADATA")
    spec = {"driver": "file", "path": f"{metadata.parent}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": spec} if ocdbt else spec).result()
    chunks = [key for key in store.list().result() if re.search(rb"^(mu|count)/[0-9.]+$", key)]
    assert len(chunks) == 2
    for key in chunks:
        store.write(key, None).result()
    with pytest.raises(ckptmgr.CorruptCheckpointError, match=r"\['(mu|count)'\] cannot be read: .* is missing"):
        CheckpointManager(tmp_path, read_only=True).restore()
    told = json.loads(metadata.read_text())
    del told["store_array_data_equal_to_fill_value"]
    metadata.write_text(json.dumps(told))
    with ocp.CheckpointManager(tmp_path, ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as stock:
        assert_trees_equal(jax.tree.map(np.asarray, stock.restore(1)), jax.tree.map(np.asarray, tree))
    for _ in ("as it is", "adopted"):
        manager = CheckpointManager(tmp_path, read_only=True)
        assert_trees_equal(manager.restore().extras["default"], tree)
        assert manager.verify(1)
        interop.adopt(tmp_path)
    assert (tmp_path / "1" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("dtype", "back"),
    [
        (jnp.bfloat16, (0.25, 1000.0)),
        (np.float16, (0.25, 1000.0)),
        (np.int16, (0, 1000)),
        (np.bool_, (True, True)),
    ],
)
def test_a_number_that_orbax_stored_in_another_type_is_of_that_type(dtype, back, tmp_path):
    tree = {"scale": 0.25, "step": 1000}
    how = jax.tree.map(lambda _: ocp.SaveArgs(dtype=np.dtype(dtype)), tree)
    with ocp.CheckpointManager(tmp_path) as stock:
        stock.save(1, args=ocp.args.PyTreeSave(tree, save_args=how))
    found = CheckpointManager(tmp_path, read_only=True).restore().extras["default"]
    assert (found["scale"], found["step"]) == back
    assert [type(each) for each in found.values()] == [type(each) for each in back]


def test_a_step_of_ours_without_its_two_own_files_is_not_taken_for_one_of_orbax(tmp_path):
    run = unpack("format1", tmp_path / "run")
    for name in ("manifest.json", "_CHECKPOINT_METADATA"):
        (run / "3" / name).unlink()
    found = CheckpointManager(run, read_only=True).restore()
    assert found.step == 2
    assert "manifest.json is missing" in found.skipped[3]
