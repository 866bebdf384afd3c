"""safetensors files, in one piece or in shards as Hugging Face lays them out."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.interop import names

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NUMPY = {code: np.dtype(getattr(ml_dtypes, name, None) or name) for name, code in _DTYPES.items()}
_ALONE = "model.safetensors"


def save(tree: Any, path: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> list[pathlib.Path]:
    """Writes a tree; the names are the paths of its leaves, joined by "/".

    Args:
      tree: arrays and numbers.
      path: FILE.safetensors, or a directory. A tree larger than `max_shard_bytes` makes several files and an
        index beside them, in the directory or in that of the file.

    Raises UnsupportedLeafError for a leaf that safetensors has no type for; then nothing is written.
    """
    arrays = {name: names.host(name, leaf) for name, leaf in names.flatten(tree).items()}
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise UnsupportedLeafError(f"{name} is {array.dtype}, which safetensors has no type for", leaf=name)
    path = pathlib.Path(path)
    folder, stem = (path.parent, path.stem) if path.suffix == ".safetensors" else (path, "model")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(arrays, max_shard_bytes)
    if len(shards) == 1:
        return [_write(folder / f"{stem}.safetensors", shards[0])]
    files = [f"{stem}-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    written = [_write(folder / file, shard) for file, shard in zip(files, shards, strict=True)]
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    return [*written, _replace(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2).encode())]


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


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> pathlib.Path:
    _library()
    from safetensors.numpy import save_file

    unfinished = path.with_name(f"{path.name}.part")
    save_file(dict(arrays), str(unfinished), {"format": "pt"})
    os.replace(unfinished, path)
    return path


def _replace(path: pathlib.Path, data: bytes) -> pathlib.Path:
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
    return path


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a file, an index, or a directory that holds one of them, as nested dicts of numpy arrays."""
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / INDEX if (path / INDEX).exists() else path / _ALONE
    files: Iterable[pathlib.Path] = [path]
    if path.suffix == ".json":
        files = [
            path.parent / _inside(name)
            for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))
        ]
    return names.nest({name: array for file in files for name, array in _read(file)})


def _inside(name: str) -> str:
    if pathlib.PurePath(name).name != name:
        raise ValueError(f"the index names {name!r}, which is not a file beside it")
    return name


def _read(path: pathlib.Path) -> Iterable[tuple[str, np.ndarray[Any, Any]]]:
    for name, found in _library().deserialize(path.read_bytes()):
        yield name, np.frombuffer(found["data"], _NUMPY[found["dtype"]]).reshape(found["shape"])


def _library() -> Any:
    try:
        import safetensors
    except ImportError:
        raise ImportError("safetensors files need safetensors: pip install 'ckptmgr[interop]'") from None
    return safetensors
