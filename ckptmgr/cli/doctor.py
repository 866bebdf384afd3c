"""Examines a machine: versions of libraries, devices, speed of storage."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import time
from typing import Any

from etils import epath
from packaging.requirements import Requirement

from ckptmgr.cli.facts import Facts, free_bytes, left_alone
from ckptmgr.errors import CheckpointError
from ckptmgr.format import files, names, objects, paths
from ckptmgr.manager import CheckpointManager

_PROBE_BYTES = 64 << 20
_DEVICES_S = 120
_EXTRAS = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3"), "safetensors": ("safetensors", "interop")}


def examine(directory: str) -> dict[str, Any]:
    """All results, and under `warnings` what should be repaired."""
    versions, warnings = _versions()
    storage = _storage(directory)
    if "error" in storage:
        warnings.append(f"{directory} cannot be written to: {storage['error']}")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs",
        "versions": versions,
        "devices": _devices(),
        "storage": storage,
        "not_installed": _not_installed(),
        "left_alone": _left_alone(paths.resolve(directory), warnings),
        "warnings": warnings,
    }


def _left_alone(directory: epath.Path, warnings: list[str]) -> Facts | None:
    """Names of what is not a checkpoint; None if the directory is not a run."""
    try:
        steps = CheckpointManager(directory, read_only=True).steps()
        return left_alone(directory) if steps or (directory / names.OURS).exists() else None
    except (CheckpointError, OSError) as problem:
        warnings.append(str(problem))
        return None


def _versions() -> tuple[dict[str, str], list[str]]:
    """Versions of the libraries that ckptmgr needs, and a warning for each version it was not tested with."""
    found, warnings = {"ckptmgr": importlib.metadata.version("ckptmgr")}, []
    for line in importlib.metadata.requires("ckptmgr") or ():
        needed = Requirement(line)
        if needed.marker is not None:
            continue  # needed by an extra only
        version = found[needed.name] = importlib.metadata.version(needed.name)
        if not needed.specifier.contains(version, prereleases=True):
            warnings.append(f"ckptmgr is not tested with {needed.name} {version}, only with {needed.specifier}")
    return found, warnings


def _devices() -> list[str] | str:
    """The devices of JAX, found by another process, so that this one takes no memory of a GPU."""
    program = "import jax; print(*[f'{d.platform} {d.device_kind}' for d in jax.devices()], sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_DEVICES_S)
    except subprocess.TimeoutExpired:
        return f"JAX has found no devices within {_DEVICES_S} s; in a job it waits for the other processes"
    said = [*done.stderr.strip().splitlines(), f"JAX has ended with exit status {done.returncode}"]
    return done.stdout.splitlines() if done.returncode == 0 else said[-2 if len(said) > 1 else 0]


def _storage(directory: str) -> dict[str, Any]:
    """The speed of writing (with a flush) and reading a file, which is then removed."""
    where = paths.resolve(directory)
    ours = where / names.OURS
    probe, data = ours / f"doctor-{os.getpid()}", os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
    is_run = ours.exists()
    try:
        paths.refuse_link(ours)
        if paths.is_local(ours):
            ours.mkdir(parents=True, exist_ok=True)
        written_s = _timed(lambda: files.write(probe, data))
        read_s = _timed(lambda: paths.read_bytes(probe))
    except OSError as problem:
        return {"directory": str(where), "error": str(problem)}
    finally:
        _remove(probe, ours, is_run)
    return {
        "directory": str(where),
        "write_bytes_per_s": round(_PROBE_BYTES / written_s),
        "read_bytes_per_s": round(_PROBE_BYTES / read_s),
        "free_bytes": free_bytes(where) if paths.is_local(where) else None,
    }


def _remove(probe: epath.Path, ours: epath.Path, is_run: bool) -> None:
    with contextlib.suppress(OSError):  # the file was not written, or the folder holds something else
        if not paths.is_local(probe):
            objects.delete(probe)
            return
        probe.unlink(missing_ok=True)
        if not is_run:
            os.rmdir(ours)


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _not_installed() -> dict[str, str]:
    """What is not installed, and the command that installs it."""
    missing = {
        what: extra for what, (module, extra) in _EXTRAS.items() if importlib.util.find_spec(module) is None
    }
    return {what: f"pip install 'ckptmgr[{extra}]'" for what, extra in missing.items()}
