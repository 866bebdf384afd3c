"""Files of one process for the others of its job, over the network of their hosts.

Each process serves one folder of its own machine. The job tells all processes the addresses, and the secret with
which every request begins. Nothing here runs on a device: a program between those of the training, in an order
that may differ between processes, can stop them all.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import http.client
import json
import os
import socket
import threading
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from etils import epath

from ckptmgr.arrays import extents
from ckptmgr.format import manifest as manifests
from ckptmgr.format import paths, schema
from ckptmgr.processes import coordinator

_BLOCK_BYTES = 4 << 20
_SILENCE_S = 60.0
Address = tuple[str, int]


class Server:
    """Serves the files of a folder to whoever knows the secret, until it is closed."""

    def __init__(self, folder: epath.Path, secret: str) -> None:
        handler = type("_OfFolder", (_Handler,), {"folder": folder, "secret": secret})
        self._server = _Listening(("", 0), handler)
        serve = functools.partial(self._server.serve_forever, poll_interval=0.1)
        threading.Thread(target=serve, name="ckptmgr peers", daemon=True).start()

    @property
    def address(self) -> Address:
        """Where the other processes of the job find this one."""
        return own_host(), self._server.server_address[1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Listening(ThreadingHTTPServer):
    """Listens on all addresses of this machine."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, *_: Any) -> None:
        """Says nothing: who asks meets the error."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one process after the other."""

    folder: epath.Path
    secret: str
    timeout = _SILENCE_S
    protocol_version = "HTTP/1.1"  # one connection for all files of a part

    def do_GET(self) -> None:
        """One file, whole."""
        name = self._name()
        if name is None:
            return
        try:
            file = paths.open_to_read(self.folder / name)
        except OSError:
            self.send_error(404)
            return
        with file:
            self.send_response(200)
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.end_headers()
            while block := file.read(_BLOCK_BYTES):
                self.wfile.write(block)

    def do_POST(self) -> None:
        """Values of a database, those of the keys in the request that it has: a line of JSON, then the values."""
        name = self._name()
        if name is None:
            return
        keys = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        directory = str(self.folder / name)
        if not os.path.exists(os.path.join(directory, "../..", manifests.NAME)):
            self.send_error(404)
            return
        try:  # a process that has nothing of an item has no database of it
            found = _find(directory) if os.path.exists(directory) else {}
            values = [extents.read_value(directory, found[key]) for key in keys if key in found]
        except (OSError, ValueError):
            self.send_error(404)
            return
        held = [key for key in keys if key in found]
        line = json.dumps([[key, len(data), zlib.crc32(data)] for key, data in zip(held, values, strict=True)])
        self.send_response(200)
        self.send_header("Content-Length", str(len(line) + 1 + sum(map(len, values))))
        self.end_headers()
        self.wfile.write(line.encode() + b"\n")
        for data in values:
            self.wfile.write(data)

    def _name(self) -> str | None:
        """What is asked for; None if it is not given, which is answered."""
        secret, _, name = urllib.parse.unquote(self.path).lstrip("/").partition("/")
        if not hmac.compare_digest(secret.encode(), self.secret.encode()) or not schema.stays_inside(name):
            self.send_error(403)
            return None
        return name

    def log_message(self, *_: Any) -> None:
        """Nothing: the job says what it does."""


@functools.lru_cache(maxsize=16)
def _find(directory: str) -> extents.Found:
    """Where the values of a database lie, which does not change any more."""
    return extents.find(directory)


class Peers:
    """The folders of the other processes."""

    def __init__(self, addresses: Sequence[Address], secret: str) -> None:
        self._addresses, self._secret = addresses, secret

    @contextlib.contextmanager
    def opened(self, process: int) -> Iterator[Peer]:
        """A connection to one of them."""
        connection = http.client.HTTPConnection(*self._addresses[process], timeout=_SILENCE_S)
        with contextlib.closing(connection):
            yield Peer(connection, self._secret, process)


class Peer:
    """One other process."""

    def __init__(self, connection: http.client.HTTPConnection, secret: str, process: int) -> None:
        self._connection, self._secret, self._process = connection, secret, process

    def read(self, name: str) -> bytes:
        return b"".join(self._blocks(name))

    def fetch(self, name: str, target: epath.Path) -> None:
        """Copies a file of it to a path of this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb", opener=paths.open_to_write) as file:
            for block in self._blocks(name):
                file.write(block)

    def values(self, name: str, keys: Sequence[str]) -> list[tuple[str, bytes]]:
        """The values of these keys that a database of it has."""
        line, _, data = b"".join(self._blocks(name, json.dumps(keys).encode())).partition(b"\n")
        found, at = [], 0
        for key, nbytes, crc32 in json.loads(line):
            found.append((key, data[at : at + nbytes]))
            at += nbytes
            if zlib.crc32(found[-1][1]) != crc32:
                raise ValueError(f"{key} of {name} was damaged on its way from process {self._process}")
        return found

    def _blocks(self, name: str, body: bytes | None = None) -> Iterator[bytes]:
        """Raises OSError for a file that it does not have, or a connection that ends."""
        try:
            method = "GET" if body is None else "POST"
            self._connection.request(method, f"/{self._secret}/{urllib.parse.quote(name)}", body)
            answer = self._connection.getresponse()
            if answer.status != 200:
                answer.read()
                raise FileNotFoundError(f"process {self._process} does not have {name}: {answer.reason}")
            while block := answer.read(_BLOCK_BYTES):
                yield block
        except http.client.HTTPException as problem:
            raise ConnectionError(f"process {self._process} did not send {name}: {problem!r}") from problem


def own_host() -> str:
    """The address of this machine on the network that leads to the coordinator."""
    host = coordinator.host()
    if host is None:
        return "127.0.0.1"
    if coordinator.is_here():  # all processes have reached it there
        return host
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # nothing is sent
        probe.connect(address)
        return str(probe.getsockname()[0])
