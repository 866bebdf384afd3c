"""Entries that others put into the directory of a run: `KINDS` makes each, `seen` tells whether it is as it was.

The run has the steps 5, 10 and 15; the whole step that is copied from is 10.
"""

import io
import json
import os
import pickle
import shutil
import socket
import stat
import tarfile
from pathlib import Path

KINDS = {}
LIKE_OURS = {}
"""Kinds that cannot be told from a step that was damaged: they stay too, and restore() walks back past them."""


def named(*names, kinds=KINDS):
    def add(make):
        for name in names:
            what = f"{make.__name__} {ascii(name)[:40]}"
            assert what not in kinds
            kinds[what] = (name, make)
        return make

    return add


# ---------------------------------------------------------------- plain entries under every name


@named("1900", "0", "2024", "100000000000000000", "9999999999999999999", "1" * 30, "1" * 200)
def empty_folder(path, run):
    path.mkdir()


@named(
    "2025", "1", "7", "007", "0000015", "-3", "+3", "1e3", "1_000", "٣", "²", " 5", "5 ", "5.", "5~", ".5", "5.0",
    "5 (copy)", "Copy of 5", "run_9", "ckpt-9", "step=9", "5.orbax-checkpoint-tmp", "my.orbax-checkpoint-tmp",
    ".deleted-emails", ".deleted-4-17", "thesis.replaced", "5.replaced", "3.damaged-1", ".5.Xa81jd",
    ".snapshot", "@eaDir", "lost+found", ".ckptmgr-old", ".Trash-1000", "notes", "a\nb", "bell\a", "-rf", "*",
    "%d", "$HOME", "C:\\runs", "é", "e\u0301", "x" * 255, "\udcff\udcfe", "[bold]", "'",
)  # fmt: skip
def folder_with_a_file(path, run):
    path.mkdir()
    (path / "file").write_text("mine")


@named(
    "2026", "12", ".nfs000012", "11.tmp", ".journal", "manifest.json", "commit_success.txt", "PINNED", "lock",
    "journal.jsonl", "README.md", "a\tb", ".DS_Store", "events.out.tfevents.1764000000.host", "16.json",
    "17.orbax-checkpoint-tmp", "\udcfd",
)  # fmt: skip
def file(path, run):
    path.write_text("mine")


@named("2030", "checkpoint_9120.bin", "latest.fifo")
def fifo(path, run):
    os.mkfifo(path)


@named("2031", "s")
def unix_socket(path, run):
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a path of a socket is at most 107 bytes long
        made.bind(path.name)
        os.chdir(here)


@named("2032", "closed")
def folder_without_permissions(path, run):
    folder_with_a_file(path, run)
    path.chmod(0)


@named("2033", "data")
def deep_tree(path, run):
    below = path.joinpath(*"abcdefghijklmnopqrstuvwxyz")
    below.mkdir(parents=True)
    (below / "_METADATA").write_text("mine")


# ---------------------------------------------------------------- symlinks


@named("latest", "500", "best")
def symlink_to_a_step(path, run):
    path.symlink_to("5")  # which retention will delete


@named("current", "510")
def absolute_symlink_to_a_step(path, run):
    path.symlink_to(run / "10")


@named("501", "loop")
def symlink_to_itself(path, run):
    path.symlink_to(path.name)


@named("502", "gone")
def dangling_symlink(path, run):
    path.symlink_to("/nowhere/at/all")


@named("503", "scratch")
def symlink_to_files_elsewhere(path, run):
    elsewhere = _elsewhere(run) / path.name
    elsewhere.parent.mkdir(exist_ok=True)
    folder_with_a_file(elsewhere, run)
    path.symlink_to(elsewhere)


def _elsewhere(run):
    return run.parent / f"elsewhere of {run.name}"


@named("504")
def symlink_to_the_run_itself(path, run):
    path.symlink_to(".")


# ---------------------------------------------------------------- what other programs write


@named("2040", ".git")
def git_repository(path, run):
    for name in ("objects/ab/cd", "refs/heads/main", "HEAD", "config"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("ref: refs/heads/main\n")


@named("2041", "params.pkl")
def a_pickle(path, run):
    path.write_bytes(pickle.dumps({"step": 99, "params": [1.0]}))


@named("2042", "5.tar")
def tarball(path, run):
    with tarfile.open(path, "w") as made:
        for name in ("99/manifest.json", "99/commit_success.txt"):
            made.addfile(tarfile.TarInfo(name), io.BytesIO())


@named("2043", "tensorboard")
def tensorboard_run(path, run):
    (path / "train").mkdir(parents=True)
    (path / "train" / "events.out.tfevents.1764000000.host.1.0").write_bytes(b"\x18\0\0\0\0\0\0\0\xa3")


@named("2044", "wandb")
def wandb_run(path, run):
    (path / "run-20261124_101010-abc" / "files").mkdir(parents=True)
    (path / "run-20261124_101010-abc" / "files" / "wandb-metadata.json").write_text("{}")
    (path / "latest-run").symlink_to("run-20261124_101010-abc")


@named("2045", ".ipynb_checkpoints")
def folder_with_a_lone_nfs_file(path, run):
    path.mkdir()
    (path / ".nfs00000000012345670000001a").write_bytes(b"")


@named("18.orbax-checkpoint-tmp", "19.orbax-checkpoint-tmp-1764000000")
def stock_save_that_was_interrupted(path, run):
    (path / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (path / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {}, "init_timestamp_nsecs": 17}')


@named("2046", "hf")
def transformers_checkpoint(path, run):
    path.mkdir()
    for name in ("config.json", "trainer_state.json", "model.safetensors.index.json", "_METADATA.json"):
        (path / name).write_text('{"step": 2046}')


@named("2047")
def metadata_of_somebody_else(path, run):
    path.mkdir()
    (path / "_METADATA").write_text('{"author": "me", "title": "my photos"}')
    (path / "album").mkdir()
    (path / "album" / "_METADATA").write_text('{"author": "me"}')


@named("2071")
def folders_of_a_step_without_any_file(path, run):
    """As `cp -r` leaves them that ends before the first file, of a step in which a folder is in a file's place."""
    (path / _ORBAX).mkdir(parents=True)


@named("2072")
def folders_of_an_item_without_any_file(path, run):
    (path / "params" / _ORBAX).mkdir(parents=True)


@named("2048")
def marker_of_somebody_else(path, run):
    path.mkdir()
    (path / "commit_success.txt").write_text("the job of 2048 was committed")


# ---------------------------------------------------------------- whole runs and copies of steps


@named("other_run", "2050", ".backup")
def another_run(path, run):
    shutil.copytree(run / "10", path / "100")
    shutil.copytree(run / "10", path / "10")
    (path / ".ckptmgr").mkdir()
    (path / ".ckptmgr" / "journal.jsonl").write_text("{}\n")


@named("2051")
def another_run_of_flax(path, run):
    shutil.copytree(run / "10" / "params", path / "checkpoint_9120")
    (path / "checkpoint_9120" / "_CHECKPOINT_METADATA").write_text('{"item_handlers": "standard"}')


@named("20", "8", "10.bak", "10-copy", "copy_10", "2052", "0010", "best_model", "2" * 19, "2" * 30)
def whole_copy_of_a_step(path, run):
    """20 is a number that the run comes to."""
    shutil.copytree(run / "10", path)


@named("2053", "params")
def copy_of_an_item(path, run):
    shutil.copytree(run / "10" / "params", path)


def _torn(path, run, last, *, half=False):
    """A copy of step 10 that was interrupted at a file, in the order in which `cp -r` or rsync goes."""
    path.mkdir()
    for name in last if isinstance(last, tuple) else (last,):
        source, copy = run / "10" / name, path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            data = source.read_bytes()
            copy.write_bytes(data[: len(data) // 2] if half else data)


_ORBAX, _MARK, _OURS = "_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json"
_TORN = {
    "21": ("params",), "22": ("step",), "23": ("metrics",), "24": ("params", "step", "metrics"),
    "25": (_MARK,), "26": (_ORBAX,), "27": (_ORBAX, _MARK), "28": (_MARK, "params"), "29": (_ORBAX, "params"),
    "30": (_ORBAX, _MARK, "params", "step", "metrics"), "31": ("params/_METADATA",), "32": ("params/d",),
    "33": ("params/manifest.ocdbt",), "34": ("params/array_metadatas", "params/_METADATA"), "35": (_OURS,),
    "36": (_OURS, _MARK), "37": (_OURS, _ORBAX), "38": (_OURS, "params"),
}  # fmt: skip


@named(*_TORN)
def half_made_copy_of_a_step(path, run):
    _torn(path, run, _TORN[path.name])


@named("39", "40")
def copy_with_half_a_manifest(path, run):
    shutil.copytree(run / "10", path)
    data = (run / "10" / _OURS).read_bytes()
    (path / _OURS).write_bytes(data[: len(data) // 2 if path.name == "39" else 40])


# ---------------------------------------------------------------- what cannot be told from damage


@named("50", kinds=LIKE_OURS)
def half_a_manifest_under_its_own_number(path, run):
    """As `cp -r /backup/50 .` leaves it: the manifest says 50."""
    path.mkdir()
    (path / _OURS).write_bytes((run / "10" / _OURS).read_bytes().replace(b'"step":10,', b'"step":50,')[:200])


@named("51", kinds=LIKE_OURS)
def all_but_the_manifest_under_its_own_number(path, run):
    _torn(path, run, (_ORBAX, "params"))
    (path / _MARK).write_text(f"Checkpoint commit was successful to {path}")


@named("52", kinds=LIKE_OURS)
def empty_metadata_of_orbax(path, run):
    path.mkdir()
    (path / _ORBAX).write_bytes(b"")


@named("53", kinds=LIKE_OURS)
def half_made_copy_of_a_stock_step(path, run):
    path.mkdir()
    (path / _ORBAX).write_text('{"item_handlers": {}}')


@named("54", kinds=LIKE_OURS)
def manifest_of_another_program(path, run):
    path.mkdir()
    (path / _OURS).write_text(json.dumps({"files": ["index.html"]}))


# ---------------------------------------------------------------- making them, and looking at them


def make(run, kinds):
    """Makes them in a run; what they are is recorded at once."""
    for name, make in kinds.values():
        make(Path(run) / name, Path(run))
    return seen(run, [name for name, _ in kinds.values()])


def seen(run, names):
    """What is to stay as it was: every file below, with mode, mtime and content; of a symlink its target."""
    roots = [Path(run) / name for name in names] + [each for each in [_elsewhere(Path(run))] if each.exists()]
    return {path: _look(path) for root in roots for path in _below(root)}


def _below(path):
    yield path
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from _below(entry)


def _look(path):
    found = os.lstat(path)
    content = None
    if stat.S_ISREG(found.st_mode):
        content = path.read_bytes()
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    return found.st_mode, found.st_ino, found.st_mtime_ns, found.st_size, content


# ---------------------------------------------------------------- objects of a bucket

OBJECTS = {
    "2024": {"/file": b"mine", "/manifest.json": b"{}", "/_METADATA": b'{"author": "me"}'},
    "2025": {"": b"an object that has the name of a step"},
    "2026": {"/": b""},  # as the consoles of both clouds make a folder
    "2027": {"/": b"", "/file": b"mine"},
    "2028": {"/commit_success.txt": b"the job of 2028 was committed"},
    "2029": {"/commit_success.txt/file": b"mine"},
    "007": {"/file": b"mine"},
    "-3": {"/file": b"mine"},
    "1e3": {"/file": b"mine"},
    "٣": {"/file": b"mine"},
    "5 ": {"/file": b"mine"},
    "5~": {"": b"mine"},
    "5.orbax-checkpoint-tmp": {"/params/_METADATA": b"mine"},
    "my.orbax-checkpoint-tmp": {"/file": b"mine"},
    ".deleted-emails": {"/file": b"mine"},
    "a b+c&d=e%20f": {"/file": b"mine"},
    "é": {"": b"mine"},
    "README.md": {"": b"mine"},
    "notes": {"/" + "/".join("abcdefghij"): b"mine"},
    "x" * 200: {"": b"mine"},
    "100000000000000000000": {"/file": b"mine"},
    "run_9": {"/file": b"mine"},
}
"""Under each name the ends of keys, and what the objects hold."""
COPIES = {
    "21": ("params",), "22": ("_CHECKPOINT_METADATA",), "23": ("commit_success.txt",), "24": ("manifest.json",),
    "25": ("",), "other_run/100": ("",), "2050/100": ("",), "7": ("manifest.json", "commit_success.txt"),
}  # fmt: skip
"""What of step 10 is copied, and where to."""


def put(client, run, *, copies=True):
    """Puts them all into a run in a bucket; `copies` if it has a step 10."""
    for name, objects in OBJECTS.items():
        for end, data in objects.items():
            client.pipe_file(f"{run}/{name}{end}", data)
    for name, parts in COPIES.items() if copies else ():
        for part in parts:
            source = f"{run}/10/{part}".rstrip("/")
            for key in client.find(source):
                client.pipe_file(f"{run}/{name}{key[len(f'{run}/10') :]}", client.cat_file(key))
    client.invalidate_cache()


def objects(client, run, *steps):
    """What is in a bucket beside these steps and what is ours, and when it was written."""
    client.invalidate_cache()
    ours = tuple(f"{run}/{name}/" for name in (".ckptmgr", *steps))
    found = client.find(run, detail=True, withdirs=False)
    return {
        key: (client.cat_file(key), told.get("LastModified") or told.get("updated"))
        for key, told in found.items()
        if not key.startswith(ours)
    }
