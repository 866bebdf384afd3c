"""Servers on this machine that speak the protocols of S3 and GCS, each behind a proxy that counts the requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "te", "upgrade"}
"""Headers that are about one connection."""


def kind(method: str, target: str) -> str:
    """What a request does, in the protocol of S3 or GCS: list, read, write, copy or delete."""
    path, _, query = target.partition("?")
    if method == "DELETE" or (method == "POST" and re.fullmatch("delete=?", query)) or path.startswith("/batch"):
        return "delete"
    if method == "GET" and ("list-type=" in query or re.search("/b/[^/]+/o/?$", path)):
        return "list"
    if "/rewriteTo/" in path or "/copyTo/" in path:
        return "copy"
    return "read" if method in ("GET", "HEAD") else "write"


class Proxy:
    """Passes requests on to a server after a delay; counts them by kind, those of the caller's thread apart."""

    def __init__(self, port: int, delay_s: float = 0.0) -> None:
        self.before: Counter[str] = Counter()
        """Requests that were passed on before the call returned: those of the caller's thread."""
        self.after: Counter[str] = Counter()
        self.targets: list[str] = []
        self.uploaded = 0
        """The bytes in the bodies of all requests, also of those before `call`."""
        self.spans: list[tuple[float, float]] = []
        """When each request came, and when it was answered."""
        self._delay_s = delay_s
        self._returned = threading.Event()
        self._returned.set()
        self._counting = threading.Lock()
        self._patience_s = 0.0
        self._server = ThreadingHTTPServer(("localhost", 0), _handler(self, port))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @contextlib.contextmanager
    def call(self, patience_s: float = 0.0) -> Iterator[None]:
        """Counts anew. Inside of it each request waits so long for the call to return.

        If the call has not returned then, it waits for this request: the request is of the caller's thread.
        """
        with self._counting:
            self.before, self.after, self.targets, self.spans = Counter(), Counter(), [], []
            self._patience_s = patience_s
        self._returned.clear()
        try:
            yield
        finally:
            self._returned.set()

    def count(self, method: str, target: str) -> None:
        has_returned = self._returned.wait(self._patience_s)
        with self._counting:
            (self.after if has_returned else self.before)[kind(method, target)] += 1
            self.targets.append(f"{'after' if has_returned else 'before'} {method} {target}")

    @contextlib.contextmanager
    def request(self, method: str, target: str) -> Iterator[None]:
        self.count(method, target)
        began = time.perf_counter()
        time.sleep(self._delay_s)
        yield
        with self._counting:
            self.spans.append((began, time.perf_counter()))

    def in_turn(self) -> int:
        """How many of the requests came one after the other: the most of which each began after another's end."""
        turns, last = 0, 0.0
        with self._counting:
            for began, ended in sorted(self.spans, key=lambda span: span[1]):
                if began >= last:
                    turns, last = turns + 1, ended
        return turns

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def pass_on(self) -> None:
            body = self._body()
            proxy.uploaded += len(body)
            with proxy.request(self.command, self.path):
                self._answer(body)

        def _answer(self, body: bytes) -> None:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            if body or self.command in ("PUT", "POST"):
                headers["Content-Length"] = str(len(body))
            server = http.client.HTTPConnection("localhost", port, timeout=60)
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            data = answer.read()
            server.close()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", size or "0")
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def handle_expect_100(self) -> bool:
            is_expected = super().handle_expect_100()
            self.wfile.flush()
            return is_expected

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = pass_on  # noqa: N815

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler


# ---------------------------------------------------------------- the servers

_BIN = Path(sys.executable).parent
_GCS = """
import sys, threading, urllib.parse
from gcp_storage_emulator import __main__, server, storage

class InTurn(server.Router):
    turn = threading.Lock()

    def handle(self, method):
        with self.turn:
            super().handle(method)

server.Router = InTurn
server.server.HTTPServer = server.server.ThreadingHTTPServer  # without threads a stopped client blocks all others
server.urlparse = urllib.parse.urlsplit  # else a path ends at a semicolon
read = server._read_data  # it takes an empty object for none, and ends the connection
server._read_data = lambda handler, query: read(handler, query) or (b"" if query.get("uploadType") else None)
storage.Storage._write_config_to_file = lambda self: None  # it writes a list of all objects, in memory, each time
__main__.main(["start", "--host=localhost", f"--port={sys.argv[1]}", "--in-memory", "--default-bucket=bucket"])
"""


@contextlib.contextmanager
def servers(delay_s: float = 0.0) -> Iterator[Mapping[str, Proxy]]:
    """The proxies of both servers, by scheme. The environment leads clients that are made from now on to them."""
    with server("gs") as gs, server("s3") as s3:
        proxies = {"gs": Proxy(gs, delay_s), "s3": Proxy(s3, delay_s)}
        os.environ |= environment(proxies["gs"].port, proxies["s3"].port)
        try:
            yield proxies
        finally:
            for proxy in proxies.values():
                proxy.close()


@contextlib.contextmanager
def server(scheme: str) -> Iterator[int]:
    """The port of a server that holds an empty bucket of the name "bucket"."""
    port = free_port()
    command = {
        "gs": [sys.executable, "-c", _GCS, str(port)],
        "s3": [str(_BIN / "moto_server"), "-p", str(port)],
    }[scheme]
    with running(command):
        answers(f"http://localhost:{port}/")
        if scheme == "s3":
            made = urllib.request.Request(f"http://localhost:{port}/bucket", method="PUT")
            urllib.request.urlopen(made).close()
        yield port


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[None]:
    """A process that is killed in the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def environment(gs: int, s3: int) -> dict[str, str]:
    """What leads the clients of gs:// and s3:// to these ports, without any credentials."""
    return {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{gs}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{gs}",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google for the kind of bucket at each read
        "AWS_ENDPOINT_URL": f"http://localhost:{s3}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def answers(url: str) -> None:
    """Waits until something answers there."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)
