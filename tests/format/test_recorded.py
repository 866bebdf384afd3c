"""Sizes and checksums of the files of a step: what is changed, short or missing is named."""

import zlib

import pytest
from etils import epath

from ckptmgr import CorruptCheckpointError
from ckptmgr.format import manifest, recorded


@pytest.fixture
def saved(tmp_path):
    """A directory of files and a manifest that records them; `params/d/x` checks itself."""
    for name, data in {"a": b"top", "params/b": b"small", "params/d/x": b"array", "opt_state/c": b"other"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    sizes = {
        path.relative_to(tmp_path).as_posix(): path.stat().st_size
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    files = recorded.record_files(epath.Path(tmp_path), sizes, lambda name, size: "/d/" in name)
    return tmp_path, manifest.Manifest(
        step=12,
        time=0.0,
        items={},
        files=files,
    )


@pytest.mark.parametrize("name", ["a", "params/b"])
def test_a_changed_file_is_named(saved, name):
    directory, wrote = saved
    recorded.check_files(wrote, epath.Path(directory), ["params"])
    data = bytearray((directory / name).read_bytes())
    data[1] ^= 4
    (directory / name).write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="checksum") as caught:
        recorded.check_files(wrote, epath.Path(directory), ["params"])
    assert caught.value.path == name
    assert caught.value.step == 12


@pytest.mark.parametrize("name", ["a", "params/b", "params/d/x"])
def test_a_short_or_missing_file_is_named(saved, name):
    directory, wrote = saved
    (directory / name).write_bytes(b"x")
    with pytest.raises(CorruptCheckpointError, match="1 bytes instead of") as caught:
        recorded.check_files(wrote, epath.Path(directory), ["params"])
    assert caught.value.path == name
    (directory / name).unlink()
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        recorded.check_files(wrote, epath.Path(directory), ["params"])


def test_items_that_are_not_read_are_not_looked_at(saved):
    directory, wrote = saved
    (directory / "opt_state/c").unlink()
    recorded.check_files(wrote, epath.Path(directory), ["params"])
    with pytest.raises(CorruptCheckpointError, match="opt_state/c"):
        recorded.check_files(wrote, epath.Path(directory), ["params", "opt_state"])


PARTS = [f"params/{part}{n}/d/x" for part in ("ocdbt.process_", "process_") for n in range(7)]
PARTS += [f"mine/process_{n}.json" for n in range(7)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_of_what_each_process_has_written_each_file_is_checked_by_one_and_all_else_by_all(count, tmp_path):
    shared = ["manifest.ocdbt", "params/d/x", "params/array_metadatas/process_0", "mine/metadata"]
    for name in PARTS + shared:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    sizes = {name: len(name) for name in PARTS + shared}
    files = recorded.record_files(epath.Path(tmp_path), sizes, lambda name, size: False)
    whole = manifest.Manifest(step=12, time=0.0, items={}, files=files)

    def finds(process):
        try:
            recorded.check_files(whole, epath.Path(tmp_path), ["params", "mine"], share=(process, count))
        except CorruptCheckpointError:
            return True
        return False

    assert not any(finds(process) for process in range(count))
    for name in PARTS + shared:
        (tmp_path / name).write_bytes(b"x" * len(name))
        assert sum(map(finds, range(count))) == (count if name in shared else 1), name
        (tmp_path / name).write_bytes(name.encode())


def test_a_file_that_its_writer_has_told_of_is_not_read_again_unless_its_size_has_changed(tmp_path):
    for name in ("told", "grown", "new"):
        (tmp_path / name).write_bytes(b"1234")
    told = {"told": manifest.File(4, 7), "grown": manifest.File(3, 7)}
    found = recorded.record_files(epath.Path(tmp_path), dict.fromkeys(("told", "grown", "new"), 4),
                                  lambda name, size: False, told)  # fmt: skip
    seen = manifest.File(4, zlib.crc32(b"1234"))
    assert found == {"told": manifest.File(4, 7), "grown": seen, "new": seen}
