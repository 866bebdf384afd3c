"""Commands typed at a real terminal, or run with pipes: each is a process, forked from one that has imported all.

done = terminal.typed("ls", run, columns=60)        at a terminal of 60 columns: done.code, done.screen
done = terminal.typed("rm", run, 1, types="y\n")    types it when the question is there
done = terminal.piped("ls", run)                    without a terminal: done.code, done.out, done.err
done = terminal.piped("ls", run, is_closed=True)    whoever should read has gone
"""

import atexit
import contextlib
import fcntl
import functools
import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

QUESTION = "[y/N] "
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def typed(*words, columns=80, types="", after=QUESTION, env=None, cwd=None):
    return _ask(words=words, columns=columns, types=types, after=after, env=env, cwd=cwd)


def piped(*words, is_closed=False, env=None, cwd=None):
    return _ask(words=words, columns=None, is_closed=is_closed, env=env, cwd=cwd)


def here(*words):
    """A command in this process, which takes milliseconds: its exit code, and what it prints."""
    from ckptmgr.cli import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.outcome(list(map(str, words)))
    return code, out.getvalue(), err.getvalue()


def plain(screen):
    """What a person reads: without colours."""
    return _ESCAPES.sub("", screen)


def _ask(words, env, cwd, **case):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm-256color"} | (env or {})
    request = case | {"words": list(map(str, words)), "env": environment, "cwd": str(cwd or os.getcwd())}
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return SimpleNamespace(**json.loads(server.stdout.readline()))


@functools.cache
def _server():
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(lambda: (server.stdin.close(), server.wait(), server.stdout.close()))
    return server


# ---------------------------------------------------------------- the process that forks


def serve():
    for line in sys.stdin:
        case = json.loads(line)
        found = _with_pipes(case) if case["columns"] is None else _at_terminal(case)
        print(json.dumps(found), flush=True)


def _at_terminal(case):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, case["columns"], 0, 0))
    pid = os.fork()
    if not pid:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        _become(case, theirs, theirs, theirs)
    os.close(theirs)
    said, has_typed = b"", False
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while read := os.read(ours, 4096):
            said += read
            if case["types"] and not has_typed and case["after"].encode() in said:
                has_typed = True
                time.sleep(0.02)  # it now waits for an answer
                os.write(ours, case["types"].encode())
    os.close(ours)
    return {"code": _code(pid), "screen": said.decode(errors="replace").replace("\r\n", "\n")}


def _with_pipes(case):
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(out)
        _become(case, os.open(os.devnull, os.O_RDONLY), out_end, err_end)
    os.close(out_end)
    os.close(err_end)
    if case["is_closed"]:
        os.close(out)
    said = {err: b""} if case["is_closed"] else {out: b"", err: b""}
    is_open = set(said)
    while is_open:
        for each in select.select(list(is_open), [], [])[0]:
            read = os.read(each, 1 << 16)
            said[each] += read
            if not read:
                is_open.discard(each)
    for each in said:
        os.close(each)
    return {"code": _code(pid), "out": said.get(out, b"").decode(), "err": said[err].decode()}


def _code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(case, *files):
    """Runs the command in this fork, and ends it."""
    for given, place in zip(files, (0, 1, 2), strict=True):
        os.dup2(given, place)
    os.closerange(3, 64)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, (0, 1, 2), "rww")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(case["env"])
    os.chdir(case["cwd"])
    sys.argv = ["ckptmgr", *case["words"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(_ended(code))


def _ended(code):
    """Runs what Python runs at its end."""
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import ckptmgr.cli.app  # noqa: F401
    from ckptmgr.cli import main

    serve()
