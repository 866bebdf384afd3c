"""Whether a machine is fit for checkpoints: versions, devices, storage."""

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
from ckptmgr.format import files, names, paths
from ckptmgr.manager import CheckpointManager

_PROBE_BYTES = 64 << 20
_EXTRAS = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3"), "safetensors": ("safetensors", "interop")}


def examine(directory: str) -> dict[str, Any]:
    """Everything that is known, and `warnings`: what is to be mended."""
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
    """What is no checkpoint; None if the directory is no run."""
    try:
        steps = CheckpointManager(directory, read_only=True).steps()
        return left_alone(directory) if steps or (directory / names.OURS).exists() else None
    except (CheckpointError, OSError) as problem:
        warnings.append(str(problem))
        return None


def _versions() -> tuple[dict[str, str], list[str]]:
    """The libraries ckptmgr needs, and those outside of the range it was tested with."""
    found, warnings = {"ckptmgr": importlib.metadata.version("ckptmgr")}, []
    for line in importlib.metadata.requires("ckptmgr") or ():
        needed = Requirement(line)
        if needed.marker is not None:
            continue  # of an extra
        version = found[needed.name] = importlib.metadata.version(needed.name)
        if not needed.specifier.contains(version, prereleases=True):
            warnings.append(
                f"{needed.name} {version} is outside of what ckptmgr is tested with: {needed.specifier}"
            )
    return found, warnings


def _devices() -> list[str] | str:
    """What JAX sees, asked in a process of its own: it must not take the memory of a GPU that trains."""
    program = "import jax; print(*[f'{d.platform} {d.device_kind}' for d in jax.devices()], sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout.splitlines() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def _storage(directory: str) -> dict[str, Any]:
    """How fast a file is written, flushed, and read back; the file is removed."""
    where = paths.resolve(directory)
    ours = where / names.OURS
    probe, data = ours / f"doctor-{os.getpid()}", os.urandom(1 << 20) * (_PROBE_BYTES >> 20)
    is_run = ours.exists()
    try:
        paths.refuse_link(ours)
        ours.mkdir(parents=True, exist_ok=True)
        written_s = _timed(lambda: files.write(probe, data))
        read_s = _timed(probe.read_bytes)
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
    with contextlib.suppress(OSError):  # it was not written, or a training job has put something beside it
        probe.unlink(missing_ok=True)
        if not is_run and paths.is_local(ours):
            os.rmdir(ours)


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _not_installed() -> dict[str, str]:
    """What would need an extra, and the command that installs it."""
    missing = {
        what: extra for what, (module, extra) in _EXTRAS.items() if importlib.util.find_spec(module) is None
    }
    return {what: f"pip install 'ckptmgr[{extra}]'" for what, extra in missing.items()}
