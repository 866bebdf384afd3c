"""The work at risk at each moment, from the journal of a run."""

import itertools
import re

import numpy as np
import pytest

import ckptmgr
from ckptmgr.cli import report, risk


def saved(step, time, durable_s):
    return {"event": "saved", "step": step, "time": time, "durable_s": durable_s}


def test_it_grows_from_the_beginning_of_a_save_until_the_next_is_durable():
    events = [saved(10, 100.0, 5.0), saved(20, 200.0, 5.0), saved(40, 400.0, 50.0)]
    assert risk.peaks(events) == [(200.0, 105.0, 5.0, 10, 20), (400.0, 205.0, 50.0, 20, 40)]


def test_a_failed_save_lets_it_grow_and_a_resumed_run_begins_anew():
    events = [
        saved(10, 100.0, 1.0),
        {"event": "failed", "step": 20, "time": 200.0},
        saved(30, 300.0, 1.0),
        {"event": "restored", "step": 30, "time": 10_000.0},
        saved(40, 10_100.0, 1.0),
        {"event": "rewound", "step": 10, "time": 10_150.0},
        saved(15, 10_200.0, 1.0),
    ]
    assert risk.peaks(events) == [(300, 201, 1, 20, 30), (10_100, 100, 1, 10, 40), (10_200, 50, 1, 5, 15)]


def test_a_clock_that_goes_back_and_saves_that_say_little_break_nothing():
    events = [saved(10, 100.0, 1.0), saved(20, 50.0, 2.0), {"event": "saved", "step": 5, "time": 60.0}]
    assert risk.peaks(events) == [(50, 2, 2, 10, 20), (60, 12, 0, 0, 5)]
    assert risk.peaks([]) == risk.peaks(events[:1]) == []


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (4, 3), (1000, 150)])
def test_of_many_saves_the_highest_peak_is_drawn(count, most):
    found = [risk.Peak(float(at), float(at * 7919 % 1000), 0.0, 1, at) for at in range(count)]
    shown = risk.fewer(found, most)
    assert len(shown) <= most
    assert all(one.at < other.at for one, other in itertools.pairwise(shown))
    assert max(shown, default=None, key=lambda peak: peak.before_s) == max(
        found, default=None, key=lambda peak: peak.before_s
    )


def test_the_report_of_a_run_says_how_much_was_at_risk(tmp_path):
    now = [1e9]
    with ckptmgr.CheckpointManager(tmp_path, clock=lambda: now[0]) as manager:
        for step, passes_s in ((10, 50), (20, 500), (70, 2000), (80, 300)):
            now[0] += passes_s
            manager.save(step, {"w": np.ones(3)}).result()
            manager.wait()
    page = report.html(ckptmgr.CheckpointManager(tmp_path, read_only=True))
    seconds = r"\d s"  # a save takes its time on a busy machine
    when = "before the save of 2001-09-09 02:29:10 UTC"
    assert re.search(rf"at most 2,00{seconds} \(50 steps\), {when}; for half of the saves 50{seconds}", page)
    assert page.count('aria-label="seconds of work at risk against steps or time') == 1
    assert re.search(r'<th scope="row">70</th><td>2001-09-09 02:29:10 UTC</td><td>2,00\d</td><td>50</td>', page)


def test_the_report_shows_the_intervals_that_overhead_has_chosen(tmp_path):
    now = [1e9]
    with ckptmgr.CheckpointManager(tmp_path, save_every=ckptmgr.overhead(0.1), clock=lambda: now[0]) as manager:
        for step in range(1, 30):
            now[0] += 2
            if manager.should_save(step):
                now[0] += 1 if step < 10 else 3
                manager.save(step, {"w": np.ones(3)})
            manager.wait()
    page = report.html(ckptmgr.CheckpointManager(tmp_path, read_only=True))
    assert "seconds between two saves, as overhead has chosen" in page
