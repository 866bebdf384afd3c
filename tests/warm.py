"""Scripts that begin at once: forks of a process that has imported the libraries, and started nothing.

    process = warm.start([SCRIPT, "word"], env=...)     as subprocess.Popen([sys.executable, SCRIPT, "word"])
    done = warm.run(["-c", CODE, "word"])               as subprocess.run([sys.executable, "-c", CODE, "word"])

The imports take a second, which is most of what a short script takes. A fork has a process, signals, an
environment and devices of its own, and ends as an interpreter ends. Of Python's options there are `-c` and
`-W error`. What JAX reads when it is imported cannot be given: such a script needs `subprocess`.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings


def start(words, env=None, cwd=None):
    return Process(list(map(str, words)), dict(env or os.environ), str(cwd or os.getcwd()))


def run(words, env=None, cwd=None, timeout=120):
    process = start(words, env, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


class Process:
    """What tests use of a `subprocess.Popen` with a pipe for what it says, and a file for its errors.

    A pipe fills up if nobody reads it, and then the process stands still.
    """

    def __init__(self, words, env, cwd):
        self.args, self.returncode = words, None
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, out_end = os.pipe()
        self.stdout = os.fdopen(out)
        request = json.dumps({"words": words, "env": env, "cwd": cwd}).encode()
        with tempfile.NamedTemporaryFile() as errors:
            self.stderr = open(errors.name)  # noqa: SIM115  (whoever reads it closes it)
            socket.send_fds(_server(), [request], [out_end, errors.fileno(), status.fileno()])
        status.close()
        os.close(out_end)
        self.pid = int(self._status.recv(32))

    def poll(self):
        return self.returncode if self._has_ended(0) else None

    def wait(self, timeout=None):
        if not self._has_ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _has_ended(self, timeout):
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.recv(32))
            self._status.close()
        return self.returncode is not None

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it may have ended since
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """All that it says to its end."""
        said, started = [], time.monotonic()
        reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not said:
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if timeout is None else max(started + timeout - time.monotonic(), 0))
        with self.stdout, self.stderr:
            return said[0], self.stderr.read()


def say(*words):
    """Prints a line in one piece, also where Python does not buffer: it is there whole, or not at all."""
    print(" ".join(map(str, words)) + "\n", end="", flush=True)


@functools.cache
def _server():
    """One for this process, and to its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


# ---------------------------------------------------------------- the process that forks


def serve(channel):
    """Forks for each request; returns it in the fork."""
    while True:
        request, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        reap()
        if not request:
            sys.exit()
        if not os.fork():
            channel.close()
            become(*files)
            return json.loads(request)
        for each in files:
            os.close(each)


def reap():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become(out, err, status):
    """Forks again: one process runs the request, and the other waits to tell how it ended."""
    child = os.fork()
    if child:
        os.close(out)
        os.close(err)
        os.write(status, b"%d" % child)
        os.write(status, b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.close(status)
    for given, place in ((out, 1), (err, 2)):
        os.dup2(given, place)
        os.close(given)


def play(words, env, cwd):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if words[:2] == ["-W", "error"]:
        warnings.simplefilter("error")
        words = words[2:]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import ml_dtypes  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pytest  # noqa: F401
    import tensorstore  # noqa: F401

    import ckptmgr  # noqa: F401

    gc.collect()
    gc.freeze()  # no fork looks through it again, which would take longer than most scripts
    play(**serve(socket.socket(fileno=int(sys.argv[1]))))
