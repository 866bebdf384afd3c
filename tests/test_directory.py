"""Random histories of a run directory: what was accepted is there, and nothing of a stranger's is gone."""

import os

import histories
import pytest
from conftest import counted

FIRST = int(os.environ.get("CKPTMGR_SEED", "0"))

FOUND = {
    # what a history has found, and the history, cut down
}


@pytest.fixture(scope="module")
def helper():
    found = histories.Helper()
    yield found
    found.close()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FIRST, FIRST + counted(100, full=2000)))
def test_a_random_history(seed, helper):
    text = histories.history(seed)
    try:
        histories.play(text, helper)
    except BaseException:
        print(f'to play it again: python tests/histories.py "{text}"')
        raise


@pytest.mark.parametrize("what", FOUND)
def test_a_history_that_found_something(what, helper):
    histories.play(FOUND[what], helper)
