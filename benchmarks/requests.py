"""How many requests each call makes to a bucket, with few and with many steps: `python -m benchmarks.requests`.

The buckets are servers on this machine, each behind a proxy that counts (`counting`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from benchmarks import counting

os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Counts(TypedDict):
    """The requests of one call."""

    caller: dict[str, int]
    """How many of each kind the caller waits for."""
    background: dict[str, int]
    in_turn: int
    """How many of all came one after the other."""


KINDS = ("list", "read", "write", "copy", "delete")
READS_ALL = ("infos, the first", "first save with retention")
"""These calls read a small file of each step, once for each process."""
_PATIENCE_S = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.requests", description=__doc__)
    parser.add_argument("--steps", default="3,30,300", help="how many steps the run has; default: %(default)s")
    parser.add_argument("--schemes", default="s3,gs", help="default: %(default)s")
    parser.add_argument(
        "--delay-ms", type=float, default=0, help="added to each request, so that `in turn` is true"
    )
    parser.add_argument("--json", action="store_true", help="prints every count, by scheme, steps, call and act")
    parser.add_argument("--targets", metavar="CALL", help="also prints each request of this call")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.steps.split(",")]
    found: dict[str, dict[int, dict[str, Counts]]] = {}
    with counting.servers(options.delay_ms / 1000) as proxies:
        for scheme in options.schemes.split(","):
            found[scheme] = {count: dict(_measure(scheme, proxies[scheme], count, options)) for count in counts}
    print(json.dumps(found) if options.json else table(found))
    return 0


# ---------------------------------------------------------------- what is measured


def _measure(
    scheme: str, proxy: counting.Proxy, count: int, options: argparse.Namespace
) -> Iterator[tuple[str, Counts]]:
    """The requests of each call on a run with this many steps."""
    import jax.numpy as jnp

    import ckptmgr

    run = f"{scheme}://bucket/{uuid.uuid4().hex}/run"
    params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
    state = {"mu": params, "nu": params}
    with ckptmgr.CheckpointManager(run) as filling:
        for step in range(1, count + 1):
            filling.save(step, params, state, metrics={"loss": 1 / step})
    managers: list[Any] = []

    def counted(what: str, call: Callable[[], object]) -> tuple[str, Counts]:
        with proxy.call(_PATIENCE_S if "save" in what or "declined" in what else 0.0):
            call()
        for manager in managers:
            manager.wait()
        if options.targets == what:
            print(what, *proxy.targets, sep="\n  ", file=sys.stderr)
        return what, {
            "caller": dict(proxy.before),
            "background": dict(proxy.after),
            "in_turn": proxy.in_turn(),
        }

    def opened(**given: Any) -> Callable[[], object]:
        return lambda: managers.append(ckptmgr.CheckpointManager(run, **given))

    last = count
    yield counted("opening, read-only", opened(read_only=True))
    reader = managers.pop()
    yield counted("steps()", reader.steps)
    yield counted("infos, the first", reader.infos)
    yield counted("infos, again", reader.infos)
    yield counted("restore of params", lambda: reader.restore(params=params))

    yield counted("opening", opened(save_every=ckptmgr.every_steps(1000)))
    yield counted("declined: every_steps", lambda: managers[0].save(last + 1, params, state))
    yield counted("first save", lambda: managers[0].save(last + 1, params, state, force=True))
    yield counted("save", lambda: managers[0].save(last + 2, params, state, force=True))
    yield counted("deletion", lambda: managers[0].delete(last + 1))
    managers.pop().close()
    last += 2

    yield counted("opening, by a clock", opened(save_every=ckptmgr.every_seconds(3600)))
    yield counted("declined: every_seconds", lambda: managers[0].save(last + 1, params, state))
    managers.pop().close()

    yield counted("opening, with retention", opened(keep=count))
    yield counted("first save with retention", lambda: managers[0].save(last + 1, params, state))
    yield counted("save, one step is deleted", lambda: managers[0].save(last + 2, params, state))
    yield counted("save, one step is deleted, again", lambda: managers[0].save(last + 3, params, state))
    yield counted("close", managers.pop().close)


# ---------------------------------------------------------------- the table


def table(found: Mapping[str, Mapping[int, Mapping[str, Counts]]]) -> str:
    """For each scheme a table: a line for each call, a column for each number of steps."""
    return "\n\n".join(f"{scheme}://\n{_table(by_count)}" for scheme, by_count in found.items())


def _table(by_count: Mapping[int, Mapping[str, Counts]]) -> str:
    calls = list(next(iter(by_count.values())))
    head = ["| call |", *(f" {count} steps |" for count in by_count)]
    lines = ["".join(head), "|---|" + "---|" * len(by_count)]
    for call in calls:
        lines.append("".join([f"| {call} |", *(f" {_cell(found[call])} |" for found in by_count.values())]))
    return "\n".join(lines)


def _cell(counts: Counts) -> str:
    """For example "0 + 4, 2 in turn: 1 list, 3 write": of the caller's thread, behind it, all by kind."""
    whole = Counter(counts["caller"]) + Counter(counts["background"])
    kinds = ", ".join(f"{whole[each]} {each}" for each in KINDS if whole[each])
    said = " + ".join(str(sum(each.values())) for each in (counts["caller"], counts["background"]))
    said += f", {counts['in_turn']} in turn" if counts["in_turn"] else ""
    return f"{said}: {kinds}" if kinds else said


if __name__ == "__main__":
    sys.exit(main())
