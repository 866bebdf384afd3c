"""The version before this one: its commit, checked out, and processes that import it.

Two versions of one package do not fit into one process. So the earlier one runs in processes of its own, with its
checkout first on the path, and does there what the other peers do here, when it is its turn. A server imports it
once, and forks for each process that is asked for, as that of `fresh` does.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import fresh

COMMIT = "d827a38"  # the last one before the house was rearranged
ROOT = Path(__file__).parents[1]


class UnavailableError(RuntimeError):
    """There is no git, or no such commit; the message says which."""


def checkout(commit: str, directory: Path, repository: Path = ROOT) -> Path:
    """Puts the package of that commit into `directory`; raises UnavailableError."""
    files = _git(repository, "archive", commit, "ckptmgr")
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(directory, filter="data")
    return directory.resolve()


def full_name(commit: str, repository: Path = ROOT) -> str:
    """All forty digits of a commit; raises UnavailableError."""
    return _git(repository, "rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()


def _git(repository: Path, *words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=repository, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise UnavailableError("git is not installed") from None
    except subprocess.CalledProcessError as problem:
        raise UnavailableError(problem.stderr.decode().strip().splitlines()[-1]) from None


class Server:
    """Forks processes in which `ckptmgr` is the checkout's, until it is closed or this process ends."""

    def __init__(self, checkout: Path) -> None:
        self._directory = tempfile.mkdtemp(
            prefix="ckptmgr-before-"
        )  # short: a socket's address has 107 characters
        self.address = os.path.join(self._directory, "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.address)
            listening.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from benchmarks import before; before.serve({listening.fileno()})"],
                cwd=checkout,  # Python puts the working directory before PYTHONPATH
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT)])},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
            )

    def close(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._directory)


class Process:
    """Calls functions of `benchmarks` in one process of a server."""

    def __init__(self, address: str, devices: int = 1) -> None:
        with socket.socket(socket.AF_UNIX) as connecting:
            connecting.connect(address)
            self._file = connecting.makefile("rwb")
        self.call(_set_environment, fresh.environment(devices))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returned there; raises `fresh.FailedError`."""
        what = f"{function.__module__}.{function.__name__}"
        try:
            _send(self._file, (function, args))
            succeeded, value = pickle.load(self._file)
        except (EOFError, OSError):
            raise fresh.FailedError(f"{what}: its process died") from None
        if not succeeded:
            raise fresh.FailedError(f"{what} failed\n{value}")
        return value

    def close(self) -> None:
        """The process ends when it finds nobody to listen to."""
        self._file.close()


def call(address: str, function: Callable[..., Any], *args: Any, devices: int = 1) -> Any:
    """`function(*args)` in a process of the server that does nothing else."""
    process = Process(address, devices)
    try:
        return process.call(function, *args)
    finally:
        process.close()


# ---------------------------------------------------------------- in the server


def serve(listening: int) -> None:
    """Forks for each that connects; ends when the process that started it does."""
    from benchmarks import preload  # noqa: F401  what every measured process has imported

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who forks need not wait for each
    with socket.socket(fileno=listening) as server:
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            with server.accept()[0] as accepted:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _answer(accepted.makefile("rwb"))
                    os._exit(0)


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def _answer(file: Any) -> None:
    """Calls what is sent, and sends back what came of it, until nobody is there."""
    while True:
        try:
            function, args = pickle.load(file)
        except EOFError:
            return
        try:
            outcome = (True, function(*args))
        except Exception:
            outcome = (False, traceback.format_exc())
        _send(file, outcome)


def _send(file: Any, message: Any) -> None:
    pickle.dump(message, file)
    file.flush()
