"""safetensors: one file, or shards with an index as Hugging Face writes them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.interop import names
from ckptmgr.interop.replacing import replaced

_JSON = ".index.json"
_INDEX_ENDING = f".safetensors{_JSON}"
INDEX = f"model{_INDEX_ENDING}"
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NUMPY = {code: np.dtype(getattr(ml_dtypes, name, None) or name) for name, code in _DTYPES.items()}
_ALONE = "model.safetensors"
_OURS = {"written_by": "ckptmgr"}
"""In the metadata of each file, so that the next export knows which files it may remove."""
Arrays = Mapping[str, np.ndarray[Any, Any]]


def save(tree: Any, path: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> list[pathlib.Path]:
    """Writes a tree; the names are the paths of its leaves, joined by "/".

    Args:
      tree: arrays and numbers.
      path: FILE.safetensors, or a directory. A tree larger than `max_shard_bytes` makes several files and an
        index beside them, in the directory or in that of the file.

    Files of older exports to this place are removed. A reader gets the old files, the new ones, or an error, and
    never a mixture.

    Raises UnsupportedLeafError for a dtype that safetensors does not have, and FileExistsError for a file of
    others that would be read instead of the new ones; in both cases nothing is written.
    """
    arrays = {name: names.host(name, leaf) for name, leaf in names.flatten(tree).items()}
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise UnsupportedLeafError(f"{name} has dtype {array.dtype}, unknown to safetensors", leaf=name)
    path = pathlib.Path(path)
    folder, stem = (path.parent, path.stem) if path.suffix == ".safetensors" else (path, "model")
    shards = _shards(arrays, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_files_of_others(folder, stem, len(shards))
    written = _write_one(folder, stem, shards[0]) if len(shards) == 1 else _write_shards(folder, stem, shards)
    for older in _files(folder, stem):
        if older not in written and _is_ours(older):
            older.unlink()
    return written


def _write_one(folder: pathlib.Path, stem: str, arrays: Arrays) -> list[pathlib.Path]:
    path = folder / f"{stem}.safetensors"
    with replaced(path) as part:
        _write(part, arrays)
    return [path]


def _write_shards(folder: pathlib.Path, stem: str, shards: Sequence[Arrays]) -> list[pathlib.Path]:
    """Writes the shards, then their index. At no moment does an index name shards of two exports."""
    files = [folder / name for name in _shard_names(stem, len(shards))]
    index = folder / f"{stem}{_INDEX_ENDING}"
    with contextlib.ExitStack() as unfinished:
        part_of_index, *parts = (unfinished.enter_context(replaced(path)) for path in (index, *files))
        for part, shard in zip(parts, shards, strict=True):
            _write(part, shard)
        with open(part_of_index, "xb") as file:
            file.write(_index({path.name: shard for path, shard in zip(files, shards, strict=True)}))
        index.unlink(missing_ok=True)
    return [*files, index]  # the stack unwinds in reverse: the index gets its name last


def _index(shards: Mapping[str, Arrays]) -> bytes:
    size = sum(array.nbytes for shard in shards.values() for array in shard.values())
    found = {
        "metadata": {"total_size": size, **_OURS},
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    return json.dumps(found, indent=2).encode()


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]


def _files(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Files of older exports with this name; the index first, so that no index names removed files."""
    pattern = re.compile(re.escape(stem) + r"-\d{5,}-of-\d{5,}\.safetensors")
    shards = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    return [
        path for path in (folder / f"{stem}{_INDEX_ENDING}", folder / f"{stem}.safetensors") if _is_there(path)
    ] + shards


def older(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of an older export to FILE.safetensors, which the next one replaces or removes."""
    return [each for each in _files(path.parent, path.stem) if _is_ours(each)] if path.parent.is_dir() else []


def _is_there(path: pathlib.Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(path: pathlib.Path) -> bool:
    """Whether an export of ckptmgr wrote a file."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            said = json.loads(path.read_bytes())["metadata"]
        else:
            with _library().safe_open(path, framework="numpy") as file:
                said = file.metadata()
        return bool(said["written_by"] == _OURS["written_by"])
    except Exception:  # a file of others may hold anything
        return False


def _refuse_files_of_others(folder: pathlib.Path, stem: str, count: int) -> None:
    """Raises FileExistsError for a file of others that would be read instead of the new files."""
    index, single = folder / f"{stem}{_INDEX_ENDING}", folder / f"{stem}.safetensors"
    shards = [folder / name for name in _shard_names(stem, count)]
    for path in [index] if count == 1 else [index, single, *shards]:
        if _is_there(path) and not _is_ours(path):
            raise FileExistsError(
                f"{path} is in the way, and ckptmgr did not write it; remove it, or export to another place"
            )


def _shards(arrays: Mapping[str, np.ndarray[Any, Any]], bound: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    shards: list[dict[str, np.ndarray[Any, Any]]] = [{}]
    held = 0
    for name, array in arrays.items():
        if shards[-1] and held + array.nbytes > bound:
            shards.append({})
            held = 0
        shards[-1][name] = array
        held += array.nbytes
    return shards


def _write(path: pathlib.Path, arrays: Arrays) -> None:
    _library()
    from safetensors.numpy import save_file

    save_file(dict(arrays), str(path), {"format": "pt", **_OURS})


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file, an index, or a directory that holds one of them, as nested dicts of numpy arrays."""
    path = found(pathlib.Path(path))
    return names.nest(_of_index(path) if path.suffix == ".json" else dict(_read(path)))


def found(path: pathlib.Path) -> pathlib.Path:
    """The file or the index to read: a large export to FILE.safetensors has only an index of that name."""
    single, index = (
        (path / _ALONE, path / INDEX) if path.is_dir() else (path, path.with_name(f"{path.name}{_JSON}"))
    )
    first, then = (index, single) if path.is_dir() else (single, index)
    if first.exists() or then.exists():
        return first if first.exists() else then
    raise FileNotFoundError(
        f"{path} has neither {_ALONE} nor {INDEX}. Name a file, or export again if an export was interrupted"
    )


def _of_index(index: pathlib.Path) -> dict[str, Any]:
    """The tensors of all shards; they must be exactly those of the index."""
    promised = _weight_map(index)
    there: dict[tuple[str, str], Any] = {}
    for file in sorted(set(promised.values())):
        if not (index.parent / file).exists():
            raise ValueError(f"{index.name} names {file}, which is missing")
        there |= {(name, file): array for name, array in _read(index.parent / file)}
    for name, file in promised.items():
        if (name, file) not in there:
            raise ValueError(f"{index.name} names {name!r} in {file}, which lacks it")
    for name, file in there:
        if promised.get(name) != file:
            raise ValueError(f"{file} has {name!r}, which {index.name} does not name: they are of two exports")
    return {name: array for (name, _), array in there.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{index.name} is not an index of safetensors files") from None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(
            f"{index.name} is not an index of safetensors files: its weight_map is not a dict of file names"
        )
    for file in found.values():
        if pathlib.PurePath(file).name != file or file == ".." or "\0" in file:
            raise ValueError(f"the index names {file!r}, which is not in its directory")
    return found


def _read(path: pathlib.Path) -> Iterable[tuple[str, np.ndarray[Any, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    for name, found in _library().deserialize(path.read_bytes()):
        if found["dtype"] not in _NUMPY:
            raise ValueError(f"{name[:100]!r} has dtype {found['dtype']}, which numpy does not have")
        yield name, np.frombuffer(found["data"], _NUMPY[found["dtype"]]).reshape(found["shape"])


def _library() -> Any:
    try:
        import safetensors
    except ImportError:
        raise ImportError("safetensors files need safetensors: pip install 'ckptmgr[interop]'") from None
    return safetensors
