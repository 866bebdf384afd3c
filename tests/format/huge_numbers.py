"""Restores and verifies steps of stock Orbax whose files hold a huge number, and prints what goes wrong.

    python tests/format/huge_numbers.py FORM DIRECTORY

In a process of its own: TensorStore ends it if it is made to allocate more than there is.
"""

import contextlib
import functools
import json
import logging
import pathlib
import resource
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_manifest import changed, places
from test_odd_files import make

import ckptmgr

HUGE = [2**33, 2**40, 2**50, 2**62]
MEMORY_BYTES = 8 << 30
SLOW_S = 20


def files(step):
    """The files of a step that are JSON, and what is in them."""
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        with contextlib.suppress(ValueError):  # not JSON
            yield path, json.loads(path.read_bytes())


def numbers(body):
    for place in places(body):
        value = body
        for key in place:
            value = value[key]
        if isinstance(value, int) and not isinstance(value, bool):
            yield place


def too_late(*_):
    raise TimeoutError(f"no answer in {SLOW_S} s")


def problems(reader):
    """What is neither an answer nor an error of ours."""
    looks = (reader.restore, functools.partial(reader.restore, 2, layout=ckptmgr.HOST), lambda: reader.verify(2))
    for look in looks:
        signal.alarm(SLOW_S)
        try:
            look()
        except ckptmgr.CheckpointError:
            pass
        except Exception as problem:
            yield f"{type(problem).__name__}: {problem}"
        finally:
            signal.alarm(0)


def main(form, directory):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, too_late)
    logging.getLogger("ckptmgr").setLevel(logging.CRITICAL)
    run, tried = make(pathlib.Path(directory) / "run", form), 0
    for path, body in files(run / "2"):
        good = path.read_bytes()
        for place in numbers(body):
            for number in HUGE:
                case = f"{path.relative_to(run)} {place} {number}"
                print("trying", case, file=sys.stderr)  # the last one, if it ends the process
                path.write_text(json.dumps(changed(body, place, number)))
                tried += 1
                for problem in problems(ckptmgr.CheckpointManager(run, read_only=True)):
                    print(f"{case}: {problem}")
        path.write_bytes(good)
    print("tried", tried)


if __name__ == "__main__":
    main(*sys.argv[1:])
