"""Policies that others wrote, good and broken: 300 and more, made of every class with every answer."""

import dataclasses
import datetime
import inspect
import itertools
import math
from collections import namedtuple
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptmgr
from ckptmgr import CheckpointManager, latest, options, policies

STEPS = [1, 2, 3, 5, 8]


def records():
    return [SimpleNamespace(step=step, time=100.0 * step, metrics={"loss": 1 / step}) for step in STEPS]


# ---------------------------------------------------------------- what they are


def _raises(*_):
    raise ZeroDivisionError("on purpose")


def plain(**methods):
    return type("Plain", (), methods)()


def slotted(**methods):
    return type("Slotted", (), {"__slots__": ("x",), **methods})()


def data(**options):
    fields = [("known", object)]
    values = np.arange(3) if options.pop("numpy", False) else [1, 2]
    return lambda **methods: dataclasses.make_dataclass("Data", fields, namespace=methods, **options)(values)


def named_tuple(**methods):
    return type("Named", (namedtuple("Base", "n"),), methods)(3)


def closure(**methods):
    state = [0]
    return SimpleNamespace(**{name: lambda *a, _do=do, **k: _do(state, *a, **k) for name, do in methods.items()})


SHAPES = {
    "plain": plain, "slots": slotted, "closure": closure, "a named tuple": named_tuple,
    "dataclass": data(), "frozen, with a list": data(frozen=True),
    "frozen, with numpy": data(frozen=True, numpy=True), "eq with numpy": data(numpy=True),
    "ordered": data(order=True), "no eq": data(eq=False),
    "equal to everything": lambda **m: plain(__eq__=lambda *_: True, __hash__=lambda _: 1, **m),
    "equal to everything, without a hash": lambda **m: plain(__eq__=lambda *_: True, **m),
    "== raises": lambda **m: plain(__eq__=_raises, __hash__=lambda _: 1, **m),
    "== gives arrays": lambda **m: plain(__eq__=lambda *_: np.ones(3), **m),
    "hash raises": lambda **m: plain(__hash__=_raises, **m),
    "repr raises": lambda **m: plain(__repr__=_raises, **m),
}  # fmt: skip

EVEN = {2, 8}


def _even(history):
    return [record.step for record in history if record.step % 2 == 0]


def _mutates(self, history):
    chosen = _even(history)
    for record in history:
        record.metrics.clear()
    del history[:]
    return chosen


def _endless(self, history):
    return itertools.count()


def _fails_later(self, history):
    yield 2
    raise ZeroDivisionError("on purpose")


KEEP = {
    "a set": (lambda self, history: set(_even(history)), EVEN),
    "a list": (lambda self, history: _even(history), EVEN),
    "a generator": (lambda self, history: (step for step in _even(history)), EVEN),
    "numpy": (lambda self, history: np.array(_even(history)), EVEN),
    "numpy ints": (lambda self, history: {np.int32(step) for step in _even(history)}, EVEN),
    "a range": (lambda self, history: range(0, 10_000, 2), EVEN),
    "a dict": (lambda self, history: dict.fromkeys(_even(history)), EVEN),
    "nothing": (lambda self, history: set(), set()),
    "steps that there are not": (lambda self, history: {-4, 7, 8, 10**30}, {8}),
    "changes what it is given": (_mutates, EVEN),
    "None": (lambda self, history: None, None),
    "an int": (lambda self, history: 8, None),
    "a str": (lambda self, history: "28", None),
    "verdicts": (lambda self, history: [step % 2 == 0 for step in STEPS], None),
    "numpy verdicts": (lambda self, history: np.array(STEPS) % 2 == 0, None),
    "floats": (lambda self, history: [2.0, 8.0], None),
    "records": (lambda self, history: history, None),
    "raises": (lambda self, history: 1 / 0, None),
    "fails later": (_fails_later, None),
    "endless": (_endless, None),
    "asks for what is not there": (lambda self, history: {record.gone for record in history}, None),
    "other arguments": (lambda self: set(), None),
}

SAVE = {
    "True": (lambda self, step, *, now, last: True, [True] * 5),
    "even": (lambda self, step, *, now, last: step % 2 == 0, [False, True, False, False, True]),
    "numpy": (lambda self, step, *, now, last: np.bool_(step > 2), [False, False, True, True, True]),
    "an array": (lambda self, step, *, now, last: jnp.array(step > 2), [False, False, True, True, True]),
    "None": (lambda self, step, *, now, last: None, [False] * 5),
    "an hour": (lambda self, step, *, now, last: last is None or now - last.time > 3600, [True, *[False] * 4]),
    "an array of many": (lambda self, step, *, now, last: np.ones(3), None),
    "raises": (lambda self, step, *, now, last: 1 / 0, None),
    "other arguments": (lambda self, step: True, None),
}


def test_there_are_300_policies():
    assert len(SHAPES) * (len(KEEP) + len(SAVE)) >= 300


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("answer", KEEP)
def test_what_is_kept_is_what_the_policy_says_or_everything_if_it_cannot_say(shape, answer):
    keep, chosen = KEEP[answer]
    made = SHAPES[shape](keep=keep)
    (checked,) = _checked(keep=made).keep
    assert checked is made
    broken = []
    reasons = policies.reasons_to_keep(
        [made, made, latest(1)], records(), set(), failed=lambda name, problem: broken.append((name, problem))
    )
    expected = set(STEPS) if chosen is None else chosen | {8}
    assert {step for step, why in reasons.items() if why} == expected
    assert bool(broken) == (chosen is None)
    assert all(type(made).__name__ in name for name, _ in broken if shape not in ("repr raises", "closure"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("answer", SAVE)
def test_a_save_policy_decides_or_its_error_says_which_it_is(shape, answer):
    decide, expected = SAVE[answer]
    made = SHAPES[shape](should_save=decide)
    (checked,) = _checked(save_every=made).save_every
    assert checked is made
    last, found = None, []
    for step in STEPS:
        if expected is not None:
            found.append(policies.is_due([checked], step, now=step, last=last))
            last = SimpleNamespace(step=step, time=step, metrics={})
            continue
        with pytest.raises(ckptmgr.SaveError, match=f"step {step}: the policy ") as caught:
            policies.is_due([checked], step, now=step, last=last)
        assert caught.value.step == step
        assert caught.value.__cause__ is not None
    assert found == (expected or [])


def _checked(**given):
    return options.check(given)


# ---------------------------------------------------------------- Orbax's own

managers = ocp.checkpoint_managers
PRESERVE = {
    "LatestN": ({"n": 2}, [5, 8]),
    "EveryNSeconds": ({"interval_secs": 200}, [1, 3, 5, 8]),
    "EveryNSteps": ({"interval_steps": 2}, [2, 8]),
    "EveryNStepsClosest": ({"interval_steps": 4}, [1, 5, 8]),
    "CustomSteps": ({"steps": [3]}, [3, 8]),
    "LatestDuration": ({"duration": datetime.timedelta(days=1)}, [8]),
    "AnyPreservationPolicy": ({"policies": [managers.LatestN(1), managers.CustomSteps([1])]}, [1, 8]),
    "BestN": ({"get_metric_fn": lambda metrics: -metrics["loss"], "n": 1}, [8]),
}
DECIDE = {
    "FixedIntervalPolicy": ({"interval": 2}, [2, 8]),
    "SpecificStepsPolicy": ({"steps": [3]}, [3]),
    "ContinuousCheckpointingPolicy": ({"minimum_interval_secs": 3}, [1, 5, 8]),
    "PreemptionCheckpointingPolicy": ({}, []),
    "InitialSavePolicy": ({}, [1]),
    "AnySavePolicy": ({"policies": [managers.FixedIntervalPolicy(4), managers.SpecificStepsPolicy([3])]}, [3, 8]),
}


def _of_orbax(method):
    classes = inspect.getmembers(managers, inspect.isclass)
    return {
        name
        for name, each in classes
        if hasattr(each, method) and "Manager" not in name and not getattr(each, "_is_protocol", False)
    }


def test_every_policy_of_orbax_is_here():
    assert _of_orbax("should_preserve") == set(PRESERVE)
    assert _of_orbax("should_save") == set(DECIDE)


@pytest.mark.parametrize("name", PRESERVE)
@pytest.mark.parametrize("time", [0.0, -1e11, 1e11, -6e10, math.nan, math.inf])
def test_orbax_keeps_what_it_keeps_and_no_time_on_disk_breaks_it(name, time):
    given, expected = PRESERVE[name]
    (checked,) = _checked(keep=getattr(managers, name)(**given)).keep
    broken, history = [], records()
    for record in history:
        record.time = record.time if time == 0 else time
    reasons = policies.reasons_to_keep([checked], history, set(), failed=lambda *what: broken.append(what))
    assert not broken
    if time == 0:
        assert [step for step, why in reasons.items() if why] == expected


@pytest.mark.parametrize("name", DECIDE)
def test_orbax_saves_when_it_saves_and_no_time_breaks_it(name):
    given, expected = DECIDE[name]
    (checked,) = _checked(save_every=getattr(managers, name)(**given)).save_every
    saved, last = [], None
    for step in STEPS:
        if policies.is_due([checked], step, now=float(step), last=last):
            saved.append(step)
            last = SimpleNamespace(step=step, time=float(step), metrics={})
    assert saved == expected
    for now in (-1e300, 1e300, math.nan, math.inf):
        policies.is_due([checked], 4, now=now, last=SimpleNamespace(step=1, time=now, metrics={}))


# ---------------------------------------------------------------- in a run


@dataclasses.dataclass
class KeepEven:
    """What a user writes first: it has no hash."""

    keeps: list

    def keep(self, history):
        return [record.step for record in history if record.step % 2 == 0]


class Fails:
    def keep(self, history):
        raise KeyError("loss")


def _steps_with(directory, keep):
    with CheckpointManager(directory, keep=keep) as manager:
        for step in (1, 2, 3, 4, 5):
            manager.save(step, {"w": jnp.ones(1)}, metrics={"loss": step})
    return manager.steps()


def test_a_policy_without_a_hash_keeps_what_it_says(tmp_path, caplog):
    assert _steps_with(tmp_path, KeepEven([])) == [2, 4, 5]
    assert "Traceback" not in caplog.text


def test_a_policy_that_fails_deletes_nothing_and_the_log_says_so_once(tmp_path, caplog):
    assert _steps_with(tmp_path, [Fails(), latest(1)]) == [1, 2, 3, 4, 5]
    assert caplog.text.count("the policy Fails of keep failed") == 1
    assert "nothing is deleted: KeyError: 'loss'" in caplog.text


def test_a_save_policy_that_fails_is_named_loses_nothing_and_force_saves_without_it(tmp_path):
    class Breaks:
        def should_save(self, step, *, now, last):
            if step == 3:
                raise ValueError("no metric yet")
            return True

    with CheckpointManager(tmp_path, save_every=[Breaks()]) as manager:
        manager.save(2, {"w": jnp.ones(1)})
        with pytest.raises(ckptmgr.SaveError, match=r"step 3: the policy Breaks of save_every failed: ValueError"):
            manager.save(3, {"w": jnp.ones(1)})
        with pytest.raises(ckptmgr.SaveError, match="Breaks"):
            manager.should_save(3)
        assert manager.save(3, {"w": jnp.ones(1)}, force=True)
        assert manager.save(4, {"w": jnp.ones(1)})
    assert manager.steps() == [2, 3, 4]
    with CheckpointManager(tmp_path, save_every=[Breaks(), 3]) as manager:
        assert manager.save(3, {"w": jnp.ones(1)}, on_exists="replace")  # another policy wants it
