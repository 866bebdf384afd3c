"""The options of a CheckpointManager: frozen, keyword-only, checked at construction."""

from __future__ import annotations

import dataclasses
import json
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath

from ckptmgr import policies
from ckptmgr.format import paths
from ckptmgr.orbax.policies import adapt_keep, adapt_save
from ckptmgr.results import CheckpointInfo

Adapt = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See `CheckpointManager`; here every value has been checked and every policy is a tuple."""

    save_every: tuple[policies.SavePolicy, ...] = (policies.every_steps(1),)
    keep: tuple[policies.KeepPolicy, ...] = ()
    asynchronous: bool = True
    compression: Literal["zstd"] | None = None
    chunk_bytes: int = 64 * 2**20
    max_host_bytes: int | None = None
    on_commit: tuple[Callable[[CheckpointInfo], object], ...] = ()
    read_only: bool = False
    mirror: epath.Path | None = None
    mirror_keep: tuple[policies.KeepPolicy, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout_s: float = 1200.0
    clock: Callable[[], float] = time.time


def check(given: Mapping[str, Any]) -> Options:
    """Checks what the caller gave; None stands for "not given" and takes the default."""
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("read_only"):
        _refuse_beside_read_only(given)
    if "mirror_keep" in given and "mirror" not in given:
        raise ValueError("mirror_keep= says what a mirror keeps; name one with mirror=")
    checks: dict[str, Callable[[Any], Any]] = {
        "save_every": lambda value: _policies(
            "save_every", value, policies.every_steps, policies.SavePolicy, adapt_save
        ),
        "keep": lambda value: _policies("keep", value, policies.latest, policies.KeepPolicy, adapt_keep),
        "mirror": lambda value: paths.resolve(value, "mirror"),
        "mirror_keep": lambda value: _policies(
            "mirror_keep", value, policies.latest, policies.KeepPolicy, adapt_keep
        ),
        "asynchronous": lambda value: _flag("asynchronous", value),
        "read_only": lambda value: _flag("read_only", value),
        "compression": _compression,
        "chunk_bytes": lambda value: _bytes("chunk_bytes", value),
        "max_host_bytes": lambda value: _bytes("max_host_bytes", value),
        "on_commit": _callbacks,
        "metadata": _metadata,
        "timeout_s": _timeout,
        "clock": _clock,
    }
    return Options(**{name: checks[name](value) for name, value in given.items()})


def _refuse_beside_read_only(given: Mapping[str, Any]) -> None:
    writing = ("save_every", "keep", "compression", "max_host_bytes", "on_commit", "metadata", "mirror_keep")
    for name in writing:
        if name in given:
            raise ValueError(f"read_only=True contradicts {name}=: it never writes or deletes; drop one")


def _policies(name: str, value: Any, number: Callable[[int], Any], kind: Any, adapt: Adapt) -> Any:
    is_one = isinstance(adapt(value), kind)  # a named tuple may be a policy
    values = value if isinstance(value, list | tuple) and not is_one else [value]
    if not values:
        raise ValueError(f"{name}=[] asks for nothing; leave {name} out for its default")
    return tuple(_policy(name, each, number, kind, adapt) for each in values)


def _policy(name: str, value: Any, number: Callable[[int], Any], kind: Any, adapt: Adapt) -> Any:
    if hasattr(value, "__index__") and not isinstance(value, bool):
        if operator.index(value) < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
        return number(operator.index(value))
    adapted = adapt(value)
    if isinstance(value, type) or not isinstance(adapted, kind):
        raise TypeError(f"{name} takes a whole number, a policy, or a list of policies, not {value!r}")
    return adapted


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} takes True or False, not {value!r}")
    return value


def _compression(value: Any) -> Any:
    if value != "zstd":
        raise ValueError(f'compression takes None or "zstd", not {value!r}')
    return value


def _bytes(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} takes a positive number of bytes, not {value!r}")
    return value


def _callbacks(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in values:
        if not callable(each):
            raise TypeError(f"on_commit takes a callable, or several, not {each!r}")
    return values


def _metadata(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"metadata takes a mapping, not {value!r}")
    try:
        return dict(json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as problem:
        raise TypeError(f"metadata must be JSON-able: {problem}") from None


def _clock(value: Any) -> Callable[[], float]:
    if not callable(value):
        raise TypeError(f"clock takes a function that gives seconds since the epoch, not {value!r}")
    return value  # type: ignore[no-any-return]


def _timeout(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"timeout_s takes a positive number of seconds, not {value!r}")
    return float(value)
