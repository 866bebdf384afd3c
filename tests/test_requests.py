"""How many requests each call makes to a bucket: as many with few steps as with many."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import in_background

from benchmarks import requests

pytestmark = pytest.mark.xdist_group("remote")
ROOT = Path(__file__).parents[1]
NOISE = {"s3": 0, "gs": 6}
"""gcsfs asks in two ways at the same time whether there is an object, and may withdraw the slower request."""


@pytest.fixture(scope="module", params=["s3", "gs"])
def found(request):
    command = [sys.executable, "-m", "benchmarks.requests", "--steps=3,12", "--json", "--schemes", request.param]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)[request.param]


def number(counts):
    return sum(counts["caller"].values()) + sum(counts["background"].values())


def test_a_call_makes_as_many_requests_with_12_steps_as_with_3(found, request):
    few, many = found["3"], found["12"]
    assert len(few) > 10
    noise = NOISE[request.node.callspec.params["found"]]
    differs = {
        call: (few[call], many[call])
        for call in few.keys() - set(requests.READS_ALL)
        if abs(number(many[call]) - number(few[call])) > noise
    }
    assert not differs


@in_background
def test_no_call_of_save_waits_for_a_request(found):
    saves = [call for call in found["12"] if call.startswith(("declined", "save", "first save"))]
    assert len(saves) > 5
    assert {call: found["12"][call]["caller"] for call in saves} == {call: {} for call in saves}
    for call in saves:
        assert (number(found["12"][call]) == 0) == call.startswith("declined")


def test_few_requests_of_a_save_and_of_a_restore_wait_for_another():
    """With 0.1 s for each request, so that those that are made together are together here too."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.requests",
        "--steps=3",
        "--json",
        "--schemes=s3",
        "--delay-ms=100",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["s3"]["3"]
    assert found["save"]["in_turn"] <= 12  # 7 until it is durable, 2 later; 18 before they were counted
    assert found["restore of params"]["in_turn"] <= 8


def test_the_infos_of_a_run_take_one_listing_and_one_read_of_each_manifest(found):
    assert found["12"]["infos, the first"]["caller"] == {"list": 1, "read": 12}
    assert found["12"]["infos, again"]["caller"] == {"list": 1}
    assert found["12"]["steps()"]["caller"] == {"list": 1}
