"""Random histories of a run directory: what was accepted is there, and nothing of a stranger's is gone."""

import os

import histories
import pytest
from conftest import counted

FIRST = int(os.environ.get("CKPTMGR_SEED", "0"))  # CKPTMGR_SEED=5000 plays others

FOUND = {  # what each has found once
    "a copy of a step, to another number, counted as a step and was replaced": "save:784 copy:780 save:12",
    "a folder of a user's that is named x.replaced was renamed": "save:784 copy:38 reopen:3 save:3",
    "after the clock went back, what was saved last was deleted": "save:880 clock:245 save:992 save:596 reopen:4",
    "a FIFO with the number of a step: every listing stood still": "put:63",
    "a FIFO in the place of a manifest: restore stood still": "save:638 spoil:900",
    "after an interrupt in close the process could not open its own run": "interrupt:682",
    "deleting a step deleted a half copy of it that is named 007": "save:560 copy:758 remove:587 delete:283",
    "a copy of the only step, named -1, was read and deleted in its place": "save:933 copy:114 interrupt:921",
    "a manager that was opened beside one with a mirror deleted by its own policy": (
        "save:627 two:741 reopen:482 save:61 restore:853 rename:857 clock:488 save:284 two:933"
    ),
    "no step was saved beside a copy that is named -1": "save:476 copy:77 delete:795 save:579",
}


@pytest.fixture(scope="module")
def helper():
    found = histories.Helper()
    yield found
    found.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt inside of open()
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FIRST, FIRST + counted(40, full=2000)))
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
