"""The options of a CheckpointManager: frozen, keyword-only, checked at construction."""

from __future__ import annotations

import dataclasses
import json
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath

from ckptmgr import cadence, policies
from ckptmgr.format import paths
from ckptmgr.orbax.policies import adapt_keep, adapt_save
from ckptmgr.results import CheckpointInfo

Check = Callable[[str, Any], Any]
Adapt = Callable[[Any], Any]
_LONGEST_S = 3e8  # ten years: threads cannot wait for longer
_KINDS = {
    policies.SavePolicy: "a save policy (every_steps, every_seconds, at_steps, overhead, as_often_as_possible)",
    policies.KeepPolicy: "a keep policy (latest, best, every_steps, every_seconds, params_only)",
}


def _policies(name: str, value: Any, number: Callable[[int], Any], kind: Any, adapt: Adapt) -> Any:
    is_one = isinstance(adapt(value), kind)  # a named tuple may be a policy
    values = value if isinstance(value, list | tuple) and not is_one else [value]
    if not values:
        raise ValueError(f"{name}=[] has no policy; leave {name} out to get the default")
    return tuple(_policy(name, each, number, kind, adapt) for each in values)


def _policy(name: str, value: Any, number: Callable[[int], Any], kind: Any, adapt: Adapt) -> Any:
    if hasattr(value, "__index__") and not isinstance(value, bool | type):
        if operator.index(value) < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
        return number(operator.index(value))
    adapted = adapt(value)
    fits = isinstance(adapted, kind)
    if isinstance(value, type) and fits:
        raise TypeError(f"{name} takes a policy, not its class: call it, as in {value.__name__}(...)")
    if isinstance(value, type) or not fits:
        raise TypeError(f"{name} takes a whole number, {_KINDS[kind]}, or a list of these, not {value!r}")
    return adapted


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} takes True or False, not {value!r}")
    return value


def _compression(name: str, value: Any) -> Any:
    if value != "zstd":
        raise ValueError(f'{name} takes None or "zstd", not {value!r}')
    return value


def _nonfinite(name: str, value: Any) -> Any:
    if value not in ("ignore", "distrust", "refuse"):
        raise ValueError(f'{name} takes "ignore", "distrust" or "refuse", not {value!r}')
    return value


def _bytes(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} takes a positive number of bytes, not {value!r}")
    return value


def _callbacks(name: str, value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in values:
        if not callable(each):
            raise TypeError(f"{name} takes a callable, or several, not {each!r}")
    return values


def _metadata(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} takes a mapping, not {value!r}")
    try:
        return dict(json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as problem:
        raise TypeError(f"{name} must be JSON-able: {problem}") from None


def _clock(name: str, value: Any) -> Callable[[], float]:
    if not callable(value):
        raise TypeError(f"{name} takes a function that returns seconds since the epoch, not {value!r}")
    return value  # type: ignore[no-any-return]


def _timeout(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} takes a positive number of seconds, not {value!r}")
    return min(float(value), _LONGEST_S)


def _mirror(name: str, value: Any) -> epath.Path:
    return paths.resolve(value, name)


def _local(name: str, value: Any) -> epath.Path:
    found = paths.resolve(value, name)
    if not paths.is_local(found):
        raise ValueError(f"{name} takes a directory of each process's own machine, not the bucket {found}")
    return found


def _local_every(name: str, value: Any) -> Any:
    found = _save_every(name, value)
    measuring = [each for each in found if policies.asks_about_saving(each)]
    if measuring:
        raise ValueError(
            f"{name} takes policies that ask neither what a save costs nor whether one is in progress, not "
            f"{measuring[0]!r}"
        )
    return found


def _copies(name: str, value: Any) -> int:
    if type(value) is not int or value not in (0, 1):
        raise ValueError(f"{name} takes 1 (the parts of a neighbour are kept too) or 0, not {value!r}")
    return value


def _save_every(name: str, value: Any) -> Any:
    found = _policies(name, value, policies.every_steps, policies.SavePolicy, adapt_save)
    if len(paced := [each for each in found if isinstance(each, cadence.overhead)]) > 1:
        raise ValueError(
            f"{name} has {' and '.join(map(str, paced))}: the largest share decides, so give only that"
        )
    return found


def _keep(name: str, value: Any) -> Any:
    return _policies(name, value, policies.latest, policies.KeepPolicy, adapt_keep)


# ---------------------------------------------------------------- the table


def _option(check: Check, *, writes: bool = False, **default: Any) -> Any:
    """An option with its default. `writes`: it makes no sense with read_only=True."""
    return dataclasses.field(**default, metadata={"check": check, "writes": writes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See `CheckpointManager`. Here every value is checked, and policies are tuples."""

    save_every: tuple[policies.SavePolicy, ...] = _option(
        _save_every, default=(policies.every_steps(1),), writes=True
    )
    keep: tuple[policies.KeepPolicy, ...] = _option(_keep, default=(), writes=True)
    asynchronous: bool = _option(_flag, default=True)
    compression: Literal["zstd"] | None = _option(_compression, default=None, writes=True)
    chunk_bytes: int = _option(_bytes, default=64 * 2**20)
    max_host_bytes: int | None = _option(_bytes, default=None)
    nonfinite: Literal["ignore", "distrust", "refuse"] = _option(_nonfinite, default="ignore", writes=True)
    on_commit: tuple[Callable[[CheckpointInfo], object], ...] = _option(_callbacks, default=(), writes=True)
    read_only: bool = _option(_flag, default=False)
    reuse_unchanged: bool = _option(_flag, default=False)
    local: epath.Path | None = _option(_local, default=None, writes=True)  # noqa: RUF009
    local_every: tuple[policies.SavePolicy, ...] = _option(
        _local_every, default=(policies.every_steps(1),), writes=True
    )
    local_keep: int = _option(policies.positive_int, default=2, writes=True)
    local_copies: int = _option(_copies, default=1, writes=True)
    mirror: epath.Path | None = _option(_mirror, default=None)  # noqa: RUF009
    mirror_keep: tuple[policies.KeepPolicy, ...] = _option(_keep, default=(), writes=True)
    metadata: Mapping[str, Any] = _option(_metadata, default_factory=dict, writes=True)
    timeout_s: float = _option(_timeout, default=1200.0)
    clock: Callable[[], float] = _option(_clock, default=time.time)  # noqa: RUF009


def check(given: Mapping[str, Any]) -> Options:
    """Checks the options that the caller gave; None means "not given", and so does nonfinite="ignore"."""
    given = {name: v for name, v in given.items() if v is not None and (name, v) != ("nonfinite", "ignore")}
    table = {field.name: field.metadata for field in dataclasses.fields(Options)}
    for name in table if given.get("read_only") else ():
        if table[name]["writes"] and name in given:
            raise ValueError(
                f"read_only=True contradicts {name}=: a reader never writes or deletes; leave one out"
            )
    needless = sorted(name for name in given if name.startswith("local_") and "local" not in given)
    if needless:
        raise ValueError(f"{needless[0]}= needs a local directory: give local= too")
    if "local" in given and given.get("reuse_unchanged"):
        raise ValueError("local= and reuse_unchanged=True cannot be combined: leave one out")
    if "mirror_keep" in given and "mirror" not in given:
        raise ValueError("mirror_keep= needs a mirror: give mirror= too")
    return Options(**{name: table[name]["check"](name, value) for name, value in given.items()})
