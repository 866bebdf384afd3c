"""The objects of a bucket, on servers on this machine."""

import contextlib
import os
import socket
import threading
import uuid

import pytest
import warm
from conftest import ON_SERVERS, counted
from etils import epath

from benchmarks import counting
from ckptmgr.format import files, objects
from ckptmgr.run import transfer

pytestmark = ON_SERVERS


@pytest.fixture(params=["gs", "s3"])
def folder(request, servers):
    return epath.Path(f"{request.param}://bucket/{uuid.uuid4().hex}")


def test_listed_read_and_deleted_also_over_several_pages(folder):
    store, start = objects.open_objects(folder), objects.key_of(folder)
    odd = ["a b", "a[1]", "a*b", "ä", "deep/d/1", "deep/d/2", "deep/er/d/3"]
    many = 1005 if str(folder).startswith("s3:") else 20  # the server for gs:// knows no pages
    kept = {f"{start}/{name}": name.encode() for name in (*odd, *map(str, range(many)))}
    for key, data in kept.items():
        store.create(key, data)
    whole = store.list(f"{start}/", "")
    assert set(whole.objects) == set(kept)
    assert whole.objects[f"{start}/a b"].size == 3
    rolled = store.list(f"{start}/", "/d/")
    assert set(rolled.rolled_up) == {f"{start}/deep/d/", f"{start}/deep/er/d/"}
    assert len(rolled.objects) == len(kept) - 3
    assert store.read([*list(kept)[:9], f"{start}/missing"]) == dict(list(kept.items())[:9])
    store.delete([*kept, f"{start}/missing"])
    assert not store.list(f"{start}/", "").objects


def test_the_identity_of_an_object_is_its_md5(folder):
    store, key = objects.open_objects(folder), objects.key_of(folder)
    store.create(key, b"one")
    assert store.list(key, "").objects[key].md5 == "f97c5d29941bfb1b2fdab0874906ab82"


def test_the_server_says_how_old_an_object_is(folder):
    store, key = objects.open_objects(folder), objects.key_of(folder)
    assert store.fetch(key) is None
    store.create(key, b"one")
    found = store.fetch(key)
    assert found.data == b"one"
    assert 0 <= found.age_s < 60


@pytest.mark.soak
def test_whatever_the_last_byte_is_it_arrives(folder, tmp_path):
    """Every file of a database ends with a checksum, so with any byte."""
    source = epath.Path(tmp_path)
    lasts = sorted({*range(0, 256, counted(15, full=1)), *b"\t\n\v\f\r -"})
    meant = {f"{last:02x}": bytes([255 - last, last]) for last in lasts}
    for name, data in meant.items():
        (source / name).write_bytes(data)
    transfer.put(source, folder / "put", list(meant))
    files.put_all(source, folder / "created")
    for way in ("put", "created"):
        start = objects.key_of(folder / way)
        found = objects.open_objects(folder).read([f"{start}/{name}" for name in meant])
        assert found == {f"{start}/{name}": data for name, data in meant.items()}


def test_what_another_has_written_is_not_written_over_and_the_same_twice_is_no_error(folder):
    if str(folder).startswith("gs:"):
        pytest.skip("the server for gs:// ignores conditions")
    objects.create(folder / "one", b"1")
    objects.create(folder / "one", b"1")
    with pytest.raises(FileExistsError, match="was written by another process meanwhile"):
        objects.create(folder / "one", b"2")
    assert {name: found.size for name, found in objects.below(folder).items()} == {"one": 1}


# ---------------------------------------------------------------- a server that is silent

ASKS = """
import sys
import tensorstore as ts
from etils import epath
from ckptmgr.format import objects

objects._SILENT_S = 1
scheme, port = sys.argv[1:]
store = objects.open_objects(epath.Path(f"{scheme}://bucket/run"))
if scheme == "s3":
    spec = {"driver": "s3", "endpoint": f"http://localhost:{port}", "aws_region": "us-east-1"}
else:
    spec = {"driver": "gcs"}
print(store.fetch("run/key"))
print(ts.KvStore.open(spec | {"bucket": "bucket"}).result().read("run/key").result().state)
"""


@contextlib.contextmanager
def every_other_connection_unanswered():
    """The port of a server that has nothing; yields also how many have connected."""
    with socket.create_server(("localhost", 0)) as listener:
        silent, count = [], 0

        def serve():
            nonlocal count
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    client, _ = listener.accept()
                    count += 1
                    if count % 2:
                        silent.append(client)
                        continue
                    with client:
                        client.recv(1 << 16)
                        client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], lambda: count
        for client in silent:
            client.close()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_request_that_is_never_answered_is_sent_again(scheme):
    """By each of the two clients of a bucket: that of the small files, and TensorStore."""
    with every_other_connection_unanswered() as (port, count):
        # Without the bound that an earlier test has set in this process.
        own = {name: value for name, value in os.environ.items() if "_LOW_SPEED_" not in name}
        done = warm.run(["-c", ASKS, scheme, port], env=own | counting.environment(port, port), timeout=30)
    assert done.stdout.split() == ["None", "missing"], done.stderr
    assert count() == 4
