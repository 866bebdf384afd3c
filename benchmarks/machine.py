"""What the figures were taken on: without it they mean nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jax

_LIBRARIES = (
    "ckptmgr", "jax", "jaxlib", "optax", "orbax-checkpoint", "tensorstore", "numpy", "safetensors", "torch",
)  # fmt: skip


def facts(directory: Path) -> dict[str, Any]:
    """The machine, and the file system that `directory` is on."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(directory),
        "load_at_start": os.getloadavg()[0],
    }


def versions() -> dict[str, str | None]:
    """Of Python and of each library; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def occasion(arguments: list[str], module: str = "benchmarks") -> dict[str, str]:
    """When and how the run was started, and on which commit."""
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def devices() -> str:
    """What JAX computes on; in a process of its own, because asking takes the devices."""
    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def available_bytes() -> int:
    return int(_field("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _file_system(directory: Path) -> str:
    """The type of the mount that holds the directory (proc_pid_mountinfo(5))."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    here = directory.resolve()
    mounts = [(fields[4], fields[fields.index("-") + 1]) for fields in lines]
    holding = [(point, kind) for point, kind in mounts if here.is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def _commit() -> str:
    """The commit of the ckptmgr that was measured, with "+ changes" where its files differ from it."""
    found = importlib.util.find_spec("ckptmgr")
    if found is None or found.origin is None:
        return "unknown"
    where = Path(found.origin).parent

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
