"""numpy's .npz files: arrays by name, never objects."""

from __future__ import annotations

import math
import os
import pathlib
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from ckptmgr.interop import names
from ckptmgr.interop.replacing import replaced

_ALWAYS_BYTES = 64 << 20
_LARGEST = 100
"""An archive may become so many times larger than its file; up to 64 MiB are always allowed."""
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
}  # fmt: skip
_MARK = "|"
"""Separates a name from a dtype that numpy's format does not know: "w|bfloat16" holds raw bytes."""


def save(tree: Any, path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes a tree; the names are the paths of its leaves, joined by "/"."""
    path = pathlib.Path(path)
    arrays = dict(_stored(name, names.host(name, leaf)) for name, leaf in names.flatten(tree).items())
    with replaced(path) as part, open(part, "xb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():  # as numpy.savez, which has two arguments that a leaf may be called
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return [path]


def _stored(name: str, array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    if not hasattr(ml_dtypes, array.dtype.name):
        return name, array
    return f"{name}{_MARK}{array.dtype.name}", array.view(f"u{array.dtype.itemsize}")


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file as nested dicts of numpy arrays."""
    with zipfile.ZipFile(path) as archive:
        _check(archive, os.path.getsize(path))
    with np.load(path, allow_pickle=False) as found:
        return names.nest(dict(_restored(name, found[name]) for name in found.files))


def _check(archive: zipfile.ZipFile, size: int) -> None:
    """Refuses an archive that would need much more memory than its size, and members that are not arrays."""
    members = archive.infolist()
    wanted = sum(member.file_size for member in members)
    if wanted > max(_ALWAYS_BYTES, _LARGEST * size):
        raise ValueError(
            f"its {size} bytes would become {wanted}, so it may be made to fill the memory. If you trust it, "
            "load it with numpy, and write it with numpy.savez, which does not compress"
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename[:100]!r} has a compression that numpy does not use")
        _check_member(archive, member)


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Compares header and size: numpy allocates an array of the header's shape before it reads it."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename[:100]!r} has a version of numpy's format that is not known")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            return  # numpy refuses it: allow_pickle=False
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename[:100]!r} does not hold the array that its header describes")


def _restored(name: str, array: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    plain, mark, dtype = name.rpartition(_MARK)
    if not mark or not hasattr(ml_dtypes, dtype):
        return name, array
    return plain, array.view(getattr(ml_dtypes, dtype))
