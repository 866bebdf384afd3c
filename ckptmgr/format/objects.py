"""The objects of a bucket: the few requests that a run makes, in the protocols of S3 and of GCS.

A key is the path of an object inside of its bucket. The clients are those of fsspec, which etils uses too. Their
common methods list a directory at a time, and know no conditions. So lists, and writes with conditions, use the
calls that each client has for its own protocol:

- S3: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html and
  https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
- GCS: https://cloud.google.com/storage/docs/json_api/v1/objects/list and
  https://cloud.google.com/storage/docs/request-preconditions
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import email.utils
import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath
from etils.epath import backend
from fsspec import asyn

_AT_ONCE = 64
_SILENT_S = 60
"""A request that is not answered for so long is sent again; gcsfs and TensorStore would wait without an end."""
_MD5 = re.compile("[0-9a-f]{32}")


class Found(NamedTuple):
    """An object in a listing."""

    size: int
    identity: str
    """Tells what the object holds from what it holds later: its MD5 in hexadecimal digits, where that is known."""

    @property
    def md5(self) -> str | None:
        return self.identity if _MD5.fullmatch(self.identity) else None

    def is_like(self, data: bytes) -> bool:
        """Whether the object has this size, and this MD5 if its own is known."""
        return self.size == len(data) and self.md5 in (None, hashlib.md5(data, usedforsecurity=False).hexdigest())


class Version(NamedTuple):
    """What an object holds now."""

    data: bytes
    tag: str
    """For conditions: the ETag of S3, the generation of GCS."""
    age_s: float | None
    """How long ago it was written, by the clock of the server; None if the server does not say it."""


class Listing(NamedTuple):
    objects: Mapping[str, Found]
    rolled_up: Collection[str]
    """The parts of keys up to the delimiter, where it occurs after the prefix: what follows is not listed."""


class Objects(Protocol):
    """The objects of one bucket."""

    bucket: str

    def list(self, prefix: str, delimiter: str) -> Listing:
        """Every object whose key begins so, in as many pages as the server needs."""

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What these objects hold, read at the same time; those that are not there are left out."""

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects, many with one request; one that is not there is no error."""

    def write(self, key: str, data: bytes) -> None:
        """Writes an object, whether there is one or not."""

    def fetch(self, key: str) -> Version | None:
        """What an object holds now; None if there is none."""

    def create(self, key: str, data: bytes) -> str | None:
        """Writes an object if there is none; returns its tag, or None if there is one."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Writes an object if it still is the one with this tag; returns its new tag, or None."""

    def remove(self, key: str, tag: str) -> None:
        """Deletes an object if it still is the one with this tag."""


def open_objects(path: epath.Path) -> Objects:
    """The objects of the bucket in which this path is."""
    for name, value in (("TIME_SECONDS", _SILENT_S), ("LIMIT_BYTES", 1)):  # TensorStore has no other option for it
        os.environ.setdefault(f"TENSORSTORE_CURL_LOW_SPEED_{name}", str(value))
    client = client_of(path)
    bucket = client._strip_protocol(str(path)).partition("/")[0]
    return _Gcs(client, bucket) if str(path).startswith("gs://") else _S3(client, bucket)


def key_of(path: epath.Path) -> str:
    """The path inside of its bucket."""
    return str(client_of(path)._strip_protocol(str(path))).partition("/")[2]


def client_of(path: epath.Path) -> Any:
    """The client of fsspec for a path in a bucket."""
    return backend.fsspec_backend.fs(str(path))


def create(path: epath.Path, data: bytes) -> None:
    """Writes a new object; raises FileExistsError if another process has written it meanwhile."""
    store, key = open_objects(path), key_of(path)
    if store.create(key, data) is None and store.read([key]).get(key) != data:  # if it is, it was sent twice
        raise FileExistsError(f"{path} was written by another process meanwhile")


def write(path: epath.Path, data: bytes) -> None:
    """Writes an object, whether there is one or not."""
    open_objects(path).write(key_of(path), data)


def delete(path: epath.Path) -> None:
    """Deletes the object of exactly this name. etils takes a name with `*`, `?` or `[` for a pattern."""
    open_objects(path).delete([key_of(path)])


def delete_below(folder: epath.Path) -> None:
    """Deletes every object below a folder, also those that only stand for folders."""
    store = open_objects(folder)
    store.delete(list(store.list(f"{key_of(folder)}/", "").objects))


def copy(source: epath.Path, target: epath.Path) -> None:
    """Has the server copy an object."""
    client_of(source).cp_file(str(source), str(target))


def below(directory: epath.Path) -> dict[str, Found]:
    """Every object below a folder, by its relative name."""
    start = f"{key_of(directory)}/"
    found = open_objects(directory).list(start, "").objects
    return {key.removeprefix(start): each for key, each in found.items() if not key.endswith("/")}


class _S3:
    def __init__(self, client: Any, bucket: str) -> None:
        self._client, self.bucket = client, bucket
        client.config_kwargs.setdefault("max_pool_connections", _AT_ONCE)  # else 10, and the others wait for them
        client.config_kwargs.setdefault("read_timeout", _SILENT_S)

    def list(self, prefix: str, delimiter: str) -> Listing:
        self._client.invalidate_cache()  # others write there too
        objects, rolled_up, page = dict[str, Found](), list[str](), dict[str, Any]()
        more: dict[str, str] = {}
        while more or not page:
            page = self._call("list_objects_v2", Prefix=prefix, Delimiter=delimiter, **more)
            for each in page.get("Contents", ()):
                objects[each["Key"]] = Found(each["Size"], each["ETag"].strip('"'))
            rolled_up += [each["Prefix"] for each in page.get("CommonPrefixes", ())]
            more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {}
        return Listing(objects, rolled_up)

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        return _read(self._client, self.bucket, keys, max_concurrency=1)  # else it asks for each size first

    def delete(self, keys: Sequence[str]) -> None:
        for some in _batches(keys, 1000):
            wanted = {"Objects": [{"Key": key} for key in some], "Quiet": True}
            failed = self._call("delete_objects", Delete=wanted).get("Errors") or []
            self._client.invalidate_cache()
            if failed:
                raise OSError(f"{failed[0]['Key']} could not be deleted: {failed[0].get('Message')}")

    def fetch(self, key: str) -> Version | None:
        try:
            found = self._call("get_object", Key=key)
        except FileNotFoundError:
            return None
        data = bytes(_run(self._client, found["Body"].read))
        found["Body"].close()
        now = found["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        return Version(data, found["ETag"], _age_s(found["LastModified"], now))

    def write(self, key: str, data: bytes) -> None:
        self._call("put_object", Key=key, Body=data)

    def create(self, key: str, data: bytes) -> str | None:
        return self._put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        return self._put(key, data, IfMatch=tag)

    def remove(self, key: str, tag: str) -> None:
        self._if("delete_object", Key=key, IfMatch=tag)

    def _put(self, key: str, data: bytes, **condition: str) -> str | None:
        found = self._if("put_object", Key=key, Body=data, **condition)
        return None if found is None else str(found["ETag"])

    def _if(self, method: str, **given: Any) -> Mapping[str, Any] | None:
        """The answer to a request with a condition; None if the condition did not hold."""
        try:
            return self._ask(method, given)
        except FileNotFoundError as problem:
            if "IfMatch" not in given:
                raise _no_bucket(self.bucket) from problem
            return None  # nothing has the tag
        except OSError as problem:
            if not _is_refused(problem):
                raise
        return None

    def _ask(self, method: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """A server that is S3 in part may know no conditions: then the request is made without."""
        try:
            found: Mapping[str, Any] = self._call(method, **given)
        except OSError as problem:
            if problem.errno != errno.ENOSYS:
                raise
            found = self._call(method, **{name: given[name] for name in given.keys() - {"IfMatch", "IfNoneMatch"}})
        return found

    def _call(self, method: str, **given: Any) -> Any:
        return self._client.call_s3(method, Bucket=self.bucket, **given)


class _Gcs:
    def __init__(self, client: Any, bucket: str) -> None:
        import aiohttp  # it comes with gcsfs

        self._client, self.bucket = client, bucket
        if client.requests_timeout is None:
            client.requests_timeout = aiohttp.ClientTimeout(sock_connect=_SILENT_S, sock_read=_SILENT_S)

    def list(self, prefix: str, delimiter: str) -> Listing:
        self._client.invalidate_cache()  # others write there too
        objects, rolled_up, token = dict[str, Found](), list[str](), ""
        while token is not None:
            page = self._client.call(
                "GET", "b/{}/o", self.bucket, json_out=True, prefix=prefix, delimiter=delimiter, maxResults=1000,
                fields=_FIELDS, pageToken=token or None,
            )  # fmt: skip
            for each in page.get("items", ()):
                objects[each["name"]] = Found(int(each.get("size", 0)), _identity(each))
            rolled_up += page.get("prefixes", ())
            token = page.get("nextPageToken")
        return Listing(objects, rolled_up)

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        return _read(self._client, self.bucket, keys)

    def delete(self, keys: Sequence[str]) -> None:
        plain = [key for key in keys if not _has_magic(key)]  # the others the client would take for patterns
        for some in _batches(plain, 100):
            try:
                self._client.rm([f"{self.bucket}/{key}" for key in some])
            except FileNotFoundError:  # all of them are gone
                continue
        for key in filter(_has_magic, keys):
            self._if("DELETE", "b/{}/o/{}", self.bucket, key)

    def fetch(self, key: str) -> Version | None:
        try:
            headers, said = self._client.call("GET", "b/{}/o/{}", self.bucket, key)
            found = json.loads(said)
            _, data = self._client.call(
                "GET", "b/{}/o/{}", self.bucket, key, alt="media", generation=found["generation"]
            )
        except FileNotFoundError:
            return None
        written = datetime.datetime.fromisoformat(found["updated"])
        return Version(bytes(data), found["generation"], _age_s(written, headers.get("Date", "")))

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> str | None:
        return self._put(key, data, ifGenerationMatch="0")

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        return self._put(key, data, ifGenerationMatch=tag)

    def remove(self, key: str, tag: str) -> None:
        self._if("DELETE", "b/{}/o/{}", self.bucket, key, ifGenerationMatch=tag)

    def _put(self, key: str, data: bytes, **condition: str) -> str | None:
        """Sends nothing but the bytes: gcsfs sends small files between lines of text, and loses a last byte 13."""
        place = self._client.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
        found = self._if(
            "POST", place, self.bucket, uploadType="media", name=key, data=data,
            headers={"Content-Type": "application/octet-stream"}, **condition,
        )  # fmt: skip
        return None if found is None else str(json.loads(found)["generation"])

    def _if(self, method: str, path: str, *args: str, **given: Any) -> bytes | None:
        """The answer to a request with a condition; None if the condition did not hold."""
        try:
            return bytes(self._client.call(method, path, *args, **given)[1])
        except FileExistsError:  # how the client spells 412
            return None
        except FileNotFoundError as problem:
            if method == "POST" and given.get("ifGenerationMatch", "0") == "0":
                raise _no_bucket(self.bucket) from problem
            return None  # nothing has this generation


_FIELDS = "items(name,size,md5Hash,generation),prefixes,nextPageToken"


def _no_bucket(bucket: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "there is no such bucket, or you may not write to it", bucket)


def _is_refused(problem: OSError) -> bool:
    """Whether a server refused to write over an object; s3fs makes such an error only if the server says much."""
    said = getattr(problem.__cause__, "response", {}).get("Error", {}).get("Code")
    return isinstance(problem, FileExistsError) or said in ("PreconditionFailed", "ConditionalRequestConflict")


def _identity(item: Mapping[str, Any]) -> str:
    """The MD5 of an object of GCS; its generation, if it was composed and has none."""
    try:
        return base64.b64decode(item["md5Hash"]).hex()
    except (KeyError, binascii.Error):
        return f"generation {item.get('generation')}"


def _has_magic(key: str) -> bool:
    return re.search(r"[*?\[]", key) is not None


def _age_s(written: datetime.datetime, now: str) -> float | None:
    """`now` is the header Date of an answer, in whole seconds."""
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(now) - written).total_seconds())
    except (ValueError, TypeError):
        return None


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[i : i + size] for i in range(0, len(keys), size))


def _read(client: Any, bucket: str, keys: Sequence[str], **given: Any) -> dict[str, bytes]:
    """Objects by key; raises what the client raises, but for objects that are not there."""

    async def read_all() -> list[bytes | BaseException]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def read(key: str) -> bytes:
            async with turns:
                return bytes(await client._cat_file(f"{bucket}/{key}", **given))

        return await asyncio.gather(*map(read, keys), return_exceptions=True)

    found = dict(zip(keys, _run(client, read_all) if keys else (), strict=True))
    for problem in found.values():
        if isinstance(problem, BaseException) and not isinstance(problem, FileNotFoundError):
            raise problem
    return {key: data for key, data in found.items() if isinstance(data, bytes)}


def _run(client: Any, function: Any) -> Any:
    """Runs a coroutine in the thread of the client, and waits for it."""
    return asyn.sync(client.loop, function)
