"""Policies against a short oracle that shares no code with them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr import at_steps, best, every_seconds, every_steps, latest
from ckptmgr.policies import reasons_to_keep


def record(step, time=0.0, **metrics):
    return SimpleNamespace(step=step, time=time, metrics=metrics)


metric = st.one_of(st.none(), st.just(math.nan), st.floats(-3, 3), st.sampled_from([0.0, 1.0]))
histories = st.lists(metric, min_size=1, max_size=12).flatmap(
    lambda values: st.lists(st.integers(0, 500), min_size=len(values), max_size=len(values), unique=True).map(
        lambda steps: list(zip(sorted(steps), values, strict=True))
    )
)


def oracle(history, n_latest, every, mode):
    steps = [step for step, _ in history]
    keep = set(steps[-n_latest:]) | {step for step in steps if step % every == 0} | {steps[-1]}
    real = [(loss, step) for step, loss in history if loss is not None and loss == loss]
    if real:
        target = (min if mode == "min" else max)(loss for loss, _ in real)
        keep.add(max(step for loss, step in real if loss == target))
    return keep


@given(histories, st.integers(1, 4), st.integers(1, 120), st.sampled_from(["min", "max"]))
def test_latest_best_and_every_n_together_keep_what_the_oracle_says(history, n, every, mode):
    records = [record(step, **({} if loss is None else {"loss": loss})) for step, loss in history]
    reasons = reasons_to_keep([latest(n), best("loss", mode=mode), every_steps(every)], records, set())
    assert {step for step, why in reasons.items() if why} == oracle(history, n, every, mode)


def test_best_orders_by_metric_prefers_the_newer_of_equals_and_never_takes_nan():
    records = [record(1, loss=2.0), record(2, loss=math.nan), record(3, loss=1.0), record(4, loss=1.0), record(5)]
    assert best("loss").ranking(records) == [4, 3, 1]
    assert best("loss", mode="max").ranking(records) == [1, 4, 3]
    assert best("loss", n=2).keep(records) == {3, 4}
    assert best("accuracy").keep(records) == set()


def test_every_seconds_keeps_checkpoints_that_far_apart():
    records = [record(step, time=10.0 * step) for step in range(8)]
    assert every_seconds(25).keep(records) == {0, 3, 6}
    assert every_seconds(1).keep(records) == set(range(8))


def test_save_policies():
    assert [step for step in range(10) if every_steps(3).should_save(step, now=0, last=None)] == [0, 3, 6, 9]
    assert [step for step in range(10) if at_steps(2, 7).should_save(step, now=0, last=None)] == [2, 7]
    assert every_seconds(5).should_save(1, now=0, last=None)
    assert not every_seconds(5).should_save(2, now=14.9, last=record(1, time=10))
    assert every_seconds(5).should_save(2, now=15, last=record(1, time=10))


def test_pinned_and_newest_are_kept_and_reasons_say_why():
    records = [record(step, loss=-step) for step in (1, 2, 3)]
    reasons = reasons_to_keep([best("loss", mode="max")], records, {2})
    assert reasons == {1: ("best(metric='loss', n=1, mode='max')",), 2: ("pinned",), 3: ("newest",)}
    assert reasons_to_keep([], records, set())[1] == ("keep=None",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: every_steps(0),
        lambda: every_steps(True),
        lambda: every_seconds(0),
        lambda: every_seconds(math.nan),
        lambda: at_steps(),
        lambda: at_steps(-1),
        lambda: latest(0),
        lambda: best("loss", n=0),
        lambda: best("loss", mode="least"),
    ],
)
def test_wrong_values_are_refused_where_they_are_written(make):
    with pytest.raises(ValueError, match=r"every_steps|every_seconds|at_steps|latest|best"):
        make()


def test_policies_are_values():
    assert latest(3) == latest(3)
    assert len({best("loss"), best("loss"), best("loss", mode="max")}) == 2
    with pytest.raises(AttributeError):
        latest(3).n = 4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_no_number_is_never_best_and_breaks_nothing(mode):
    odd = [math.nan, None, "0.5", [0.5], {"loss": 0.5}, 0.5j, b"1"]
    numbers = [0.5, 10**400, -(10**400), math.inf, -math.inf, True, np.float32(0.25), np.int8(2)]
    records = [record(step, loss=value) for step, value in enumerate([*odd, *numbers])]
    ranked = [records[step].metrics["loss"] for step in best("loss", mode=mode).ranking([*records, record(99)])]
    expected = [-math.inf, -(10**400), np.float32(0.25), 0.5, True, np.int8(2), 10**400, math.inf]
    assert ranked == (expected if mode == "min" else expected[::-1])


@given(
    st.lists(st.one_of(st.floats(), st.floats(-100, 100), st.sampled_from([0.0, 1e11])), min_size=1, max_size=12)
)
def test_every_seconds_keeps_something_of_every_history_and_what_it_keeps_is_far_apart(times):
    """Times may be out of order, equal, or none: a run went back, a clock jumped."""
    records = [record(step, time=time) for step, time in enumerate(times)]
    kept = every_seconds(25).keep(records)
    assert kept
    known = [time for time in times if math.isfinite(time)]
    far_apart = sorted(times[step] for step in kept if math.isfinite(times[step]))
    assert all(later >= time + 25 for time, later in itertools.pairwise(far_apart))
    assert all(any(each <= time < each + 25 for each in far_apart) or time in far_apart for time in known)
    assert {step for step, time in enumerate(times) if time not in known} <= kept
    assert every_seconds(25).keep([records[step] for step in sorted(kept)]) == kept
