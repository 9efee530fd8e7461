"""A web server in a thread: files from memory, with ETags, ranges and index pages; it counts what it sent."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote


class CountingServer:
    """`files` by key; a key that is rewritten has another ETag. Any thread may change them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.gets: list[tuple[str, int, int]] = []  # of files: key, start, stop
        self.is_failing = False  # answers 503 to every GET of a file
        self.broken: set[str] = set()  # keys of which every GET is answered 500
        self.lists: list[str] = []  # folders whose index was asked for
        self.list_delay_s = 0.0  # how long each index takes
        self.waiting_count = 0  # GETs that wait for `release`
        self._released = threading.Event()
        self._released.set()
        self.url = ""

    def hold(self) -> None:
        """Have every GET of a file wait until `release`."""
        self._released.clear()

    def release(self) -> None:
        """Answer those that wait, and all after them."""
        self._released.set()

    def wait_released(self) -> None:
        """Return when nothing is held."""
        if not self._released.is_set():
            self.waiting_count += 1
            self._released.wait(60)

    @property
    def bytes_sent(self) -> int:
        """Bytes of files that were asked for and sent."""
        return sum(stop - start for _, start, stop in self.gets)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: CountingServer

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        key = unquote(self.path.removeprefix("/"))
        data = self.store.files.get(key)
        if data is None:
            self._index(key)
            return
        if has_body:
            self.store.wait_released()
        if has_body and (self.store.is_failing or key in self.store.broken):
            self._send(503 if self.store.is_failing else 404, b"", {})
            return
        headers = {"ETag": f'"{zlib.crc32(data):08x}"', "Accept-Ranges": "bytes"}
        if self.headers.get("If-Match") not in (None, headers["ETag"]):
            self._send(412, b"", headers)
            return
        span = self.headers.get("Range")
        if not has_body or span is None:
            self._send(200, data, headers, has_body=has_body)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        self.store.gets.append((key, start, stop))
        self._send(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _index(self, key: str) -> None:
        folder = key.rstrip("/") + "/" if key.rstrip("/") else ""
        below = {name.removeprefix(folder) for name in self.store.files if name.startswith(folder)}
        names = sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in below})
        if not names:
            self._send(404, b"", {})
            return
        self.store.lists.append(key)
        threading.Event().wait(self.store.list_delay_s)
        links = "".join(f'<a href="{quote(name)}">{escape(name)}</a><br>' for name in names)
        self._send(200, f"<html><body>{links}</body></html>".encode(), {"Content-Type": "text/html"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, has_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def counting_server() -> Iterator[CountingServer]:
    """Serve for as long as the context."""
    store = CountingServer()
    handler = type("_Bound", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
