"""The tests of the guarantees can fail: each guarantee is broken on purpose, and its test must say so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SOAK
from mutations import MUTATIONS, SENTENCES

import ckptmgr

PACKAGE = Path(ckptmgr.__file__).parent
ROOT = Path(__file__).parent.parent


def test_every_mutation_applies_to_the_code_as_it_is():
    for mutation in MUTATIONS:
        text = (PACKAGE / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation.what
        compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert {mutation.sentence for mutation in MUTATIONS} == set(SENTENCES)


def test_every_sentence_and_every_mutation_is_listed():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    for name, sentence in SENTENCES.items():
        assert f"| {name} {sentence} |" in page
    for mutation in MUTATIONS:
        assert f"| {mutation.what} | `{mutation.test}` |" in page


def test_a_difference_of_megabytes_is_told_at_once_on_ci_too(tmp_path):
    """Else a broken guarantee looks like a test that stands still."""
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert b'x' * 4_000_000 == b'y' * 4_000_000\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-c", ROOT / "pyproject.toml", "-p", "conftest", tmp_path],
        env=os.environ | {"CI": "true", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "At index 0 diff: b'x' != b'y'" in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize(
    "mutation", MUTATIONS[1::60] if not SOAK else MUTATIONS, ids=lambda mutation: mutation.what
)
def test_a_broken_guarantee_is_noticed(mutation, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "ckptmgr")
    file = tmp_path / "ckptmgr" / mutation.file
    file.write_text(file.read_text().replace(mutation.old, mutation.new))
    options = ["-n", "0", "-x", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    options += ["--basetemp", tmp_path / "tests"]  # else pytest closes the folder of the other tests
    options += ["--hypothesis-seed=0"]  # what is noticed today is noticed tomorrow
    bounded = ["sh", "-c", 'ulimit -v 12000000; exec "$@"', "sh"]  # a device without an end is read, say
    command = [*bounded, sys.executable, "-m", "pytest", *options, f"{ROOT}/{mutation.test}"]
    found = {name: value for name, value in os.environ.items() if name != "CKPTMGR_SOAK"}
    done = subprocess.run(  # in the directory of the copy, which Python then imports
        command,
        cwd=tmp_path,
        env=found | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
