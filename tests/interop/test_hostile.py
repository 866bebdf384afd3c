"""Hostile files of every format: a clear error in bounded time and memory, and nothing changed for the next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

SUFFIXES = (".pkl", ".safetensors", ".index.json", ".npz", ".msgpack")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each case; a process that a case ends is started again for the rest."""
    folder, found, left = tmp_path_factory.mktemp("hostile"), {}, list(hostile.FILES)
    (folder / "endless").symlink_to("/dev/zero")
    os.mkfifo(folder / "queue")
    while left:
        done = subprocess.run(
            [sys.executable, hostile.__file__, folder, *left], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines, done.stderr
        for said in lines:
            found[said["case"]] = said | {"process": done.returncode}
        left = left[left.index(lines[-1]["case"]) + 1 :]
    return found


@pytest.mark.parametrize("case", hostile.FILES)
def test_it_is_refused_and_an_honest_file_is_read_afterwards(case, outcomes):
    said = outcomes[case]
    assert "error" in said, f"the process ended with {said['process']}"
    assert said["error"] == ("UnsafePickleError" if case.endswith(".pkl") else "ValueError"), said["message"]
    assert 10 < len(said["message"]) < 1500
    assert said["honest"]


def test_every_format_that_is_read_has_hostile_files():
    for suffix in SUFFIXES:
        assert sum(Path(case).name.endswith(suffix) for case in hostile.FILES) > 10
