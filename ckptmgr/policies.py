"""When to save and what to keep: small frozen values, without clocks, files or JAX.

A save policy has `should_save(step, now=..., last=...)`. If that has a parameter `saving` too, the policy is told
whether a save is in progress, and what saving costs (`costs.Saving`), as those of `cadence` are. A keep policy has
`keep(history)`, which returns the steps to keep. `now` and the times in `history` are in seconds and come from the
manager's clock; `now` never goes back. Orbax's own policies are accepted too (`ckptmgr/orbax/policies.py`), and
the caller's own. If a keep policy fails, nothing is deleted.

A new policy is a class here; it is exported in `ckptmgr/__init__.py` and named in `docs/api.md`. A keep policy
also gets its words in `spell` and `parse`, and in the help of `--policy` (`cli/changing.py`). A save policy that
needs no clock is named in `need_no_time`.

A policy has two spellings. Its repr is Python, for people. `spell` gives one for shells and for the journal, which
`parse` reads without running code.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from ckptmgr.costs import Saving
from ckptmgr.errors import SaveError
from ckptmgr.specs import fit_line

_MOST_STEPS = 1_000_000
"""The largest number of steps that a policy may return: an iterable may have no end."""


class Record(Protocol):
    """What a policy knows of a checkpoint; `CheckpointInfo` is a Record."""

    @property
    def step(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


@runtime_checkable
class SavePolicy(Protocol):
    """Decides whether a step is saved."""

    def should_save(self, step: int, *, now: float, last: Record | None) -> bool: ...


class InformedSavePolicy(Protocol):
    """A save policy that is told whether a save is in progress, and what saving costs."""

    def should_save(self, step: int, *, now: float, last: Record | None, saving: Saving) -> bool: ...


@runtime_checkable
class KeepPolicy(Protocol):
    """Decides which checkpoints retention keeps; `history` is in order of steps."""

    def keep(self, history: Sequence[Record]) -> set[int]: ...


class OrbaxSavePolicy(Protocol):
    """A `SaveDecisionPolicy` of Orbax."""

    def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool: ...


class OrbaxKeepPolicy(Protocol):
    """A `PreservationPolicy` of Orbax."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]: ...


_SavePolicy: TypeAlias = SavePolicy | InformedSavePolicy | OrbaxSavePolicy
SaveEvery: TypeAlias = int | _SavePolicy | Sequence[int | _SavePolicy]
"""What `save_every` takes: a number of steps, a policy, or several."""
Keep: TypeAlias = int | KeepPolicy | OrbaxKeepPolicy | Sequence[int | KeepPolicy | OrbaxKeepPolicy]
"""What `keep` and `mirror_keep` take: how many of the newest steps, a policy, or several."""


@dataclass(frozen=True)
class every_steps:  # noqa: N801 - reads as a word of the options it is passed to
    """Saves, or keeps, the steps that are multiples of `n`."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", positive_int("every_steps", self.n))

    def should_save(self, step: int, *, now: float, last: Record | None) -> bool:
        return step % self.n == 0

    def keep(self, history: Sequence[Record]) -> set[int]:
        return {record.step for record in history if record.step % self.n == 0}


@dataclass(frozen=True)
class every_seconds:  # noqa: N801
    """Saves once `s` seconds have passed since the last save; keeps checkpoints `s` seconds apart."""

    s: float

    def __post_init__(self) -> None:
        if not isinstance(self.s, int | float) or not self.s > 0:
            raise ValueError(f"every_seconds takes a positive number of seconds, not {self.s!r}")

    def should_save(self, step: int, *, now: float, last: Record | None) -> bool:
        return last is None or now - last.time >= self.s

    def keep(self, history: Sequence[Record]) -> set[int]:
        kept: set[int] = set()
        due = -math.inf
        for record in sorted(history, key=_order_in_time):
            if not math.isfinite(record.time):
                kept.add(record.step)
            elif record.time >= due:
                kept.add(record.step)
                due = record.time + self.s
        return kept


def _order_in_time(record: Record) -> tuple[bool, float, int]:
    """A sort key: by time, then by step. Checkpoints without a finite time come first."""
    is_known = math.isfinite(record.time)
    return is_known, record.time if is_known else 0.0, record.step


@dataclass(frozen=True, init=False)
class at_steps:  # noqa: N801
    """Saves exactly these steps."""

    steps: frozenset[int]

    def __init__(self, *steps: int) -> None:
        if not steps:
            raise ValueError("at_steps takes one or more step numbers")
        object.__setattr__(self, "steps", frozenset(step_number(step, "a step of at_steps") for step in steps))

    def __repr__(self) -> str:
        return fit_line("at_steps", *map(str, sorted(self.steps)))

    def should_save(self, step: int, *, now: float, last: Record | None) -> bool:
        return step in self.steps


@dataclass(frozen=True)
class latest:  # noqa: N801
    """Keeps the `n` newest checkpoints."""

    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", positive_int("latest", self.n))

    def keep(self, history: Sequence[Record]) -> set[int]:
        return set(sorted(record.step for record in history)[-self.n :])


@dataclass(frozen=True)
class best:  # noqa: N801
    """Keeps the `n` checkpoints with the best values of a metric; of equal values the newer. NaN is never best."""

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", positive_int("best", self.n))
        if not isinstance(self.metric, str):
            raise TypeError(f"best takes the name of a metric, not {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f'best takes mode="min" or mode="max", not {self.mode!r}')

    def ranking(self, history: Iterable[Record]) -> list[int]:
        """Steps from best to worst; those without the metric, or with NaN, are left out."""
        sign = 1 if self.mode == "min" else -1
        found = ((_number(record.metrics.get(self.metric)), record.step) for record in history)
        scored = [(sign * number, -step) for number, step in found if number is not None]
        return [-step for _, step in sorted(scored)]

    def keep(self, history: Sequence[Record]) -> set[int]:
        return set(self.ranking(history)[: self.n])


@dataclass(frozen=True)
class params_only:  # noqa: N801
    """Keeps the params, step and metrics of what `policy` keeps; the other items of such a step are deleted.

    A step that another policy keeps too stays whole. `policy` is any keep policy; an int N is `latest(N)`.
    """

    policy: KeepPolicy

    def __init__(self, policy: int | KeepPolicy | OrbaxKeepPolicy) -> None:
        given: Any = policy
        if hasattr(given, "__index__") and not isinstance(given, bool):
            given = latest(positive_int("params_only", given))
        is_policy = isinstance(given, KeepPolicy) or hasattr(given, "should_preserve")
        if not is_policy or isinstance(given, type | params_only):
            raise TypeError(f"params_only takes a whole number or a keep policy, not {policy!r}")
        object.__setattr__(self, "policy", given)

    def __repr__(self) -> str:
        inner = self.policy
        if isinstance(inner, every_steps | latest):
            return f"params_only({type(inner).__name__}({inner.n}))"
        return f"params_only({name_of(inner)})"

    def keep(self, history: Sequence[Record]) -> set[int]:
        return self.policy.keep(history)


def _number(value: Any) -> float | None:
    """A metric as a number that can be ranked; None for NaN and what is not a number."""
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) and not math.isnan(value) else None


_PARAMS_ONLY = "params-only"


def spell(kept: KeepPolicy) -> str:
    """A policy as the command line takes it: "latest:3", "best:loss:min:1". Policies of others: their repr."""
    if isinstance(kept, params_only):
        return f"{_PARAMS_ONLY}:{spell(kept.policy)}"
    if isinstance(kept, latest):
        return f"latest:{kept.n}"
    if isinstance(kept, best):
        return f"best:{kept.metric}:{kept.mode}:{kept.n}"
    if isinstance(kept, every_steps):
        return f"every_steps:{kept.n}"
    return f"every_seconds:{kept.s:g}" if isinstance(kept, every_seconds) else name_of(kept)


_FORMS = {
    "latest": "latest:N",
    "best": "best:METRIC[:min|max[:N]]",
    "every_steps": "every_steps:N",
    "every_seconds": "every_seconds:S",
}


def parse(text: str) -> KeepPolicy:
    """The policy that such a text means; mode and n of "best" may be left out, and - is as good as _ in a name."""
    name, rest = _named(text)
    if name == _PARAMS_ONLY and rest.isdecimal():
        raise ValueError(
            f"{text!r} does not say which steps: params-only:latest:{rest}, or params-only:every_steps:{rest}"
        )
    if name == _PARAMS_ONLY and _named(rest)[0] != _PARAMS_ONLY:
        return params_only(parse(rest))
    if (known := name.replace("-", "_")) not in _FORMS:
        raise ValueError(f"unknown policy {text!r}; known are {', '.join(_FORMS.values())}, params-only:POLICY")
    try:
        if known == "best":
            metric, mode, n = [*rest.split(":"), *("min", "1")[rest.count(":") :]]
            return best(metric, mode=mode, n=int(n))  # type: ignore[arg-type]  # checked there
        if known == "every_seconds":
            return every_seconds(float(rest))
        return every_steps(int(rest)) if known == "every_steps" else latest(int(rest))
    except (ValueError, TypeError):
        raise ValueError(f"{text!r} is not of the form {_FORMS[known]}") from None


def _named(text: str) -> tuple[str, str]:
    """The name of a policy in such a text, and what follows it."""
    name, _, rest = text.partition(":")
    return name.replace("_", "-"), rest


def asks_about_saving(policy: SavePolicy) -> bool:
    """Whether a policy is told about saving: its `should_save` names a parameter `saving`."""
    decide = policy.should_save
    try:
        return _names_saving(getattr(decide, "__func__", decide))
    except (ValueError, TypeError):  # a callable that has no hash or no signature
        return False


@functools.lru_cache(maxsize=64)  # `inspect` takes 0.1 ms, and a step may be as short
def _names_saving(decide: Callable[..., Any]) -> bool:
    return "saving" in inspect.signature(decide).parameters


def need_no_time(policies: Iterable[SavePolicy]) -> bool:
    """Whether these policies look at the step alone, so that all processes of a job decide alike."""
    return all(isinstance(each, every_steps | at_steps) for each in policies)


def is_due(
    policies: Iterable[SavePolicy], step: int, *, now: float, last: Record | None, saving: Saving | None = None
) -> bool:
    """Whether any policy wants to save a step. If none does and one has failed, raises its error as SaveError."""
    failure = None
    for each in policies:
        try:
            given: dict[str, Any] = {"saving": saving} if asks_about_saving(each) else {}
            if each.should_save(step, now=now, last=last, **given):
                return True
        except Exception as problem:
            failure = SaveError(
                f"step {step}: the policy {name_of(each)} of save_every failed: {type(problem).__name__}: "
                f"{problem}; nothing is lost, and force=True saves without it",
                step=step,
            )
            failure.__cause__ = problem
    if failure is not None:
        raise failure
    return False


def reasons_to_keep(
    policies: Sequence[KeepPolicy],
    history: Sequence[Record],
    pinned: set[int],
    committed: int | None = None,
    failed: Callable[[str, Exception], object] = lambda name, problem: None,
) -> dict[int, tuple[str, ...]]:
    """Why each step of `history` is kept; an empty tuple means that it may be deleted.

    Without policies everything is kept. The newest step, pinned steps and the step that was `committed` last are
    kept whatever the policies say, because a run may resume from them. (If the last commit is not known, it is the
    step with the latest time.) If the newest step was reduced to its params, the newest whole step is kept too. If
    a policy fails, all steps are kept, and `failed` is called.
    """
    wanted: list[tuple[str, set[int]]] = []
    for policy in policies:
        name = name_of(policy)
        try:
            wanted.append((name, _chosen(policy.keep(list(map(_copy, history))))))
        except Exception as problem:
            failed(name, problem)
            wanted.append((f"{name} failed", {record.step for record in history}))
    newest = max((record.step for record in history), default=None)
    newest_whole = max((record.step for record in history if not _is_reduced(record)), default=None)
    if committed not in {record.step for record in history}:
        committed = max(history, key=_order_in_time).step if history else None

    def reasons(step: int) -> tuple[str, ...]:
        found = list(dict.fromkeys(name for name, steps in wanted if step in steps))
        found += ["pinned"] * (step in pinned) + ["newest"] * (step == newest)
        found += ["last saved"] * (step == committed != newest)
        found += ["newest whole step"] * (step == newest_whole != newest)
        return tuple(found) if wanted else (*found, "keep=None")

    return {record.step: reasons(record.step) for record in history}


def to_reduce(policies: Sequence[KeepPolicy], reasons: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """The steps that `params_only` policies keep and nothing else does; for each of them, which policies.

    `reasons` has why each step is kept, as `reasons_to_keep` returns it.
    """
    names = {name_of(policy) for policy in policies if isinstance(policy, params_only)}
    return {step: ", ".join(why) for step, why in reasons.items() if why and names.issuperset(why)}


def _is_reduced(record: Record) -> bool:
    """Whether a step has lost items to `params_only`. (The caller's own records may not say it.)"""
    return getattr(record, "reduced", None) is not None


def _copy(record: Record) -> Any:
    """A copy, so that a policy may change it. Only dataclasses are copied."""
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        return record
    return dataclasses.replace(record, metrics=dict(record.metrics))


def _chosen(answer: Any) -> set[int]:
    """The steps that a policy returns: any iterable of whole numbers. Steps that do not exist do no harm."""
    chosen = list(itertools.islice(iter(answer), _MOST_STEPS + 1))
    if len(chosen) > _MOST_STEPS:
        raise ValueError(f"it returns more than {_MOST_STEPS} steps")
    if any(isinstance(step, bool) for step in chosen):
        raise TypeError("it returns True or False; `keep` must return the steps to keep")
    return set(map(operator.index, chosen))


def unknown_metric(keep: Sequence[KeepPolicy], history: Sequence[Record]) -> str | None:
    """A metric that a `best` of these policies names and no checkpoint has, though they have others."""
    asked = [each.policy if isinstance(each, params_only) else each for each in keep]
    known = {name for record in history for name in record.metrics}
    return next(
        (each.metric for each in asked if known and isinstance(each, best) and each.metric not in known), None
    )


def name_of(policy: Any) -> str:
    """The repr of a policy; the name of its class if it has no repr of its own."""
    try:
        text = repr(policy)
    except Exception:
        text = "<"
    return type(policy).__name__ if text.startswith("<") else text


def step_number(step: Any, what: str = "a step") -> int:
    """A step as an int: anything that `operator.index` takes, for example numpy integers."""
    hint = ""
    if hasattr(step, "block_until_ready"):
        hint = "; it is a jax array: pass int(step), which waits for its device"
    elif not isinstance(step, bool) and hasattr(step, "__index__") and (number := operator.index(step)) >= 0:
        return number
    raise ValueError(f"{what} must be a whole number, 0 or more, not {step!r}{hint}")


def positive_int(name: str, value: Any) -> int:
    """A whole number, 1 or more, as an int; `name` is used in the error."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or (number := operator.index(value)) < 1:
        raise ValueError(f"{name} takes a positive whole number, not {value!r}")
    return number
