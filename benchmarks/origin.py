"""A small, fast S3 origin for benchmarks: listings and ranged, conditional GETs of made-up objects, with knobs.

    python benchmarks/origin.py --dataset small:5000x110kB --dataset big:1x300MB --latency-ms 50

Prints its URL. The bucket is `bench`; a dataset NAME:COUNTxSIZE is COUNT objects `NAME/00/0000.bin`, a hundred to a
folder; `--folder DIR` adds the files below DIR under their own names. Signatures are not checked.

Its bodies cost it next to nothing (`sendfile` from memory), so that a benchmark measures the client. What an object
holds follows from its key: `expected_bytes` says it again, for the check that the bytes timed were the right ones.

    GET  /__stats            requests by kind, answers by status, bytes of object bodies sent, bodies that were sent to
                             their end more than once, its own CPU seconds
    POST /__reset            counters to zero
    POST /__set?latency_ms=50&latency_sigma=0.6&bandwidth=90MB&cap=1GB&rate=5500    knobs, while it runs; 0: off

Owns: the S3 dialect that readers use. Leaves to others: writing, authentication, and starting it (common.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import resource
import socket
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from synthetic import (
    INLINE_BODY_BYTES,
    PATTERN,
    PATTERN_TWICE,
    PERIOD,
    Catalogue,
    StoredObject,
    parse_dataset,
    pattern_offset,
)
from wire import HTTP_DATE, ISO_DATE, Answer, Request, error_answer, head_of, parse_range, parse_request

from orchestra.units import parse_size_bytes

BUCKET = "bench"
SEND_STEP_BYTES = 1 << 20
KEYS_PER_PAGE = 1000
HEAD_LIMIT_BYTES = 64 * 1024


@dataclass(slots=True)
class Knobs:
    """What may be changed while it runs; 0 turns a knob off."""

    latency_ms: float = 0.0  # before the first byte of every answer
    latency_sigma: float = 0.0  # of a lognormal latency whose median is latency_ms
    bandwidth: float = 0.0  # bytes per second per connection
    cap: float = 0.0  # bytes per second over all connections
    rate: float = 0.0  # requests per second, above which the answer is 503


@dataclass(slots=True)
class Stats:
    """What was asked and sent since the last reset."""

    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    body_bytes: int = 0
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)  # bodies sent to their end, by key and first byte
    in_flight: int = 0
    in_flight_max: int = 0
    cpu_s_at_reset: float = 0.0


class Origin:
    """The server: its objects, knobs, counters, and what it answers."""

    def __init__(self, catalogue: Catalogue, knobs: Knobs) -> None:
        self.catalogue = catalogue
        self.knobs = knobs
        self.stats = Stats()
        self.random = random.Random(1)
        self.cap_free_at = 0.0
        self.rate_tokens = 0.0
        self.rate_at = 0.0
        self.pattern_fd = os.memfd_create("pattern")
        os.write(self.pattern_fd, PATTERN)
        assert os.fstat(self.pattern_fd).st_size == PERIOD, "a short write to memory"

    def answer(self, request: Request) -> tuple[Answer, float]:
        """Return the answer and the seconds to wait before its first byte."""
        if request.path.startswith("/__"):
            return self._control(request), 0.0
        bucket, _, key = request.path.lstrip("/").partition("/")
        kind = request.method if key else {"GET": "LIST", "HEAD": "HEAD_BUCKET"}.get(request.method, request.method)
        self.stats.requests[kind] += 1
        if self._is_over_rate():
            answer = error_answer("503 Slow Down", "SlowDown", with_body=request.method != "HEAD")
        elif request.method not in ("GET", "HEAD"):
            answer = error_answer("405 Method Not Allowed", "MethodNotAllowed")
        elif not bucket:
            answer = self._buckets()
        elif bucket != BUCKET:
            answer = error_answer("404 Not Found", "NoSuchBucket", with_body=request.method != "HEAD")
        elif not key:
            answer = self._bucket(request)
        else:
            answer = self._object(request, key)
        self.stats.statuses[int(answer.head[9:12])] += 1
        return answer, self._latency_s()

    def _latency_s(self) -> float:
        knobs = self.knobs
        if not knobs.latency_ms:
            return 0.0
        if not knobs.latency_sigma:
            return knobs.latency_ms / 1000
        return self.random.lognormvariate(math.log(knobs.latency_ms / 1000), knobs.latency_sigma)

    def _is_over_rate(self) -> bool:
        if not self.knobs.rate:
            return False
        now = time.perf_counter()
        # A tenth of a second of burst, so that the limit is felt at once and not on average.
        burst = max(1.0, self.knobs.rate / 10)
        self.rate_tokens = min(burst, self.rate_tokens + (now - self.rate_at) * self.knobs.rate)
        self.rate_at = now
        if self.rate_tokens < 1:
            return True
        self.rate_tokens -= 1
        return False

    def _object(self, request: Request, key: str) -> Answer:
        found = self.catalogue.objects.get(key)
        headers = request.headers
        with_body = request.method == "GET"
        if found is None:
            return error_answer("404 Not Found", "NoSuchKey", with_body=with_body)
        if_match = headers.get("if-match")
        if if_match is not None and if_match not in ("*", found.etag):
            return error_answer("412 Precondition Failed", "PreconditionFailed", with_body=with_body)
        if headers.get("if-none-match") == found.etag:
            return Answer(head_of("304 Not Modified", 0, f"ETag: {found.etag}\r\n"))
        span = parse_range(headers.get("range"), found.size)
        if span is None:
            extra = f"Content-Range: bytes */{found.size}\r\n"
            return error_answer("416 Range Not Satisfiable", "InvalidRange", with_body=with_body, extra=extra)
        start, stop = span
        extra = f"ETag: {found.etag}\r\nLast-Modified: {HTTP_DATE}\r\nAccept-Ranges: bytes\r\n"
        status = "200 OK"
        if "range" in headers:
            status = "206 Partial Content"
            extra += f"Content-Range: bytes {start}-{stop - 1}/{found.size}\r\n"
        answer = Answer(head_of(status, stop - start, extra, "binary/octet-stream"))
        if with_body:
            self.stats.body_bytes += stop - start
            answer.part = (key, start)
            self._add_body(answer, found, start, stop)
        return answer

    def _add_body(self, answer: Answer, found: StoredObject, start: int, stop: int) -> None:
        if found.path is not None:
            answer.close_fd = os.open(found.path, os.O_RDONLY)
            answer.runs.append((answer.close_fd, start, stop - start))
            return
        at = (pattern_offset(found.key) + start) % PERIOD
        left = stop - start
        if left <= INLINE_BODY_BYTES:
            answer.inline = PATTERN_TWICE[at : at + left]
            return
        while left > 0:
            step = min(left, PERIOD - at)
            answer.runs.append((self.pattern_fd, at, step))
            left -= step
            at = 0

    def _buckets(self) -> Answer:
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListAllMyBucketsResult><Owner><ID>0</ID></Owner><Buckets><Bucket>'
            f"<Name>{BUCKET}</Name><CreationDate>{ISO_DATE}</CreationDate></Bucket></Buckets></ListAllMyBucketsResult>"
        ).encode()
        return Answer(head_of("200 OK", len(body)), body)

    def _bucket(self, request: Request) -> Answer:
        query = request.query
        if request.method == "HEAD":
            return Answer(head_of("200 OK", 0, "x-amz-bucket-region: us-east-1\r\n"))
        if "location" in query:
            body = b'<?xml version="1.0" encoding="UTF-8"?><LocationConstraint></LocationConstraint>'
            return Answer(head_of("200 OK", len(body)), body)
        other = {"acl", "policy", "versioning", "versions", "uploads", "lifecycle", "tagging"} & query.keys()
        if other:
            return error_answer("501 Not Implemented", "NotImplemented")
        body = self._listing(query).encode()
        return Answer(head_of("200 OK", len(body)), body)

    def _listing(self, query: dict[str, str]) -> str:
        version_2 = query.get("list-type") == "2"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or query.get("marker") or ""
        limit = min(KEYS_PER_PAGE, int(query.get("max-keys") or KEYS_PER_PAGE))
        keys, prefixes, more = self.catalogue.page(prefix, delimiter, after, limit)
        url_encoded = query.get("encoding-type") == "url"

        def text(value: str) -> str:
            return escape(urllib.parse.quote(value, safe="/") if url_encoded else value)

        parts = ['<?xml version="1.0" encoding="UTF-8"?>']
        parts.append('<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">')
        parts.append(f"<Name>{BUCKET}</Name><Prefix>{text(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys>")
        parts.append(f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>")
        if delimiter:
            parts.append(f"<Delimiter>{text(delimiter)}</Delimiter>")
        if url_encoded:
            parts.append("<EncodingType>url</EncodingType>")
        if version_2:
            parts.append(f"<KeyCount>{len(keys) + len(prefixes)}</KeyCount>")
        if more:
            tag = "NextContinuationToken" if version_2 else "NextMarker"
            parts.append(f"<{tag}>{escape(more) if version_2 else text(more)}</{tag}>")
        for key in keys:
            found = self.catalogue.objects[key]
            parts.append(
                f"<Contents><Key>{text(key)}</Key><LastModified>{ISO_DATE}</LastModified><ETag>{escape(found.etag)}"
                f"</ETag><Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        parts += [f"<CommonPrefixes><Prefix>{text(name)}</Prefix></CommonPrefixes>" for name in prefixes]
        parts.append("</ListBucketResult>")
        return "".join(parts)

    def _control(self, request: Request) -> Answer:
        stats = self.stats
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        if request.path == "/__reset":
            self.stats = Stats(in_flight=stats.in_flight, cpu_s_at_reset=cpu_s)
        elif request.path == "/__set":
            for name, value in request.query.items():
                if name not in Knobs.__slots__:
                    return error_answer("400 Bad Request", f"UnknownKnob-{name}")
                number = float(parse_size_bytes(value)) if name in ("bandwidth", "cap") else float(value)
                setattr(self.knobs, name, number)
        elif request.path != "/__stats":
            return error_answer("404 Not Found", "NoSuchControl")
        body = json.dumps(
            {
                "requests": dict(stats.requests),
                "statuses": {str(status): count for status, count in stats.statuses.items()},
                "body_bytes": stats.body_bytes,
                "bodies_sent_again": stats.sent.total() - len(stats.sent),
                "in_flight_max": stats.in_flight_max,
                "cpu_s": cpu_s - stats.cpu_s_at_reset,
            }
        ).encode()
        return Answer(head_of("200 OK", len(body), content_type="application/json"), body)


class Connection:
    """One connection: reads heads, waits the latency, sends; directly on the socket, as a transport would copy."""

    def __init__(self, origin: Origin, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self.origin, self.loop, self.sock, self.fd = origin, loop, sock, sock.fileno()
        self.received = b""
        self.answer: Answer | None = None
        self.writing = False
        self.free_at = 0.0  # when this connection's bandwidth allows the next byte
        self.granted = 0  # bytes whose turn on the link of all is known, and when it is
        self.granted_at = 0.0
        loop.add_reader(self.fd, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        self.received += data
        if self.answer is None:
            self._next_request()

    def _next_request(self) -> None:
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            if len(self.received) > HEAD_LIMIT_BYTES:
                self._close()
            return
        head, self.received = self.received[:end], self.received[end + 4 :]
        request = parse_request(head)
        self.answer, latency_s = self.origin.answer(request)
        self.answer.keep_alive = request.headers.get("connection", "").lower() != "close"
        if request.headers.get("content-length", "0") != "0":
            self.answer.keep_alive = False  # nothing that we serve has a body: do not read this one as a head
        stats = self.origin.stats
        stats.in_flight += 1
        stats.in_flight_max = max(stats.in_flight_max, stats.in_flight)
        if latency_s:
            self.loop.call_later(latency_s, self._send)
        else:
            self._send()

    def _send(self) -> None:
        answer = self.answer
        if answer is None:
            return
        try:
            if answer.head and not self._send_head(answer):
                return
            while answer.runs:
                wait_s, step = self._allowance(answer.runs[0][2])
                if wait_s > 0:
                    self._stop_writing()
                    self.loop.call_later(wait_s, self._send)
                    return
                fd, offset, left = answer.runs[0]
                sent = os.sendfile(self.fd, fd, offset, step)
                self._account(sent)
                if sent == left:
                    answer.runs.popleft()
                else:
                    answer.runs[0] = (fd, offset + sent, left - sent)
        except BlockingIOError:
            self._wait_writable()
            return
        except OSError:
            self._close()
            return
        self._done(answer)

    def _send_head(self, answer: Answer) -> bool:
        """Send head and inline body; False if the socket is full or its bandwidth asks for a wait."""
        if answer.inline and (self.origin.knobs.bandwidth or self.origin.knobs.cap):
            wait_s, _ = self._allowance(len(answer.inline), is_one_piece=True)
            if wait_s > 0:
                self._stop_writing()
                self.loop.call_later(wait_s, self._send)
                return False
            self._account(len(answer.inline))
        more = socket.MSG_MORE if answer.runs else 0
        sent = self.sock.sendmsg([answer.head, answer.inline], [], more)
        from_head = min(sent, len(answer.head))
        answer.head, answer.inline = answer.head[from_head:], answer.inline[sent - from_head :]
        if answer.head or answer.inline:
            # Whatever is left becomes the head: rare, and small.
            answer.head, answer.inline = answer.head + bytes(answer.inline), b""
            self._wait_writable()
            return False
        return True

    def _allowance(self, wanted: int, *, is_one_piece: bool = False) -> tuple[float, int]:
        """Return seconds to wait, or 0 and how many bytes may be sent now.

        The link of all serves whoever asked first, a step at a time: among many, nobody starves, and a timer that
        fires late takes nothing of its rate.
        """
        knobs = self.origin.knobs
        step = min(wanted, SEND_STEP_BYTES)
        if not knobs.bandwidth and not knobs.cap:
            return 0.0, step
        now = time.perf_counter()
        if not self.granted:
            if knobs.bandwidth and self.free_at > now:
                return self.free_at - now, 0
            for limit in (knobs.bandwidth, knobs.cap):
                if limit and not is_one_piece:
                    step = min(step, max(16 * 1024, int(limit / 100)))  # ten milliseconds' worth
            self.granted, self.granted_at = step, now
            if knobs.cap:
                self.granted_at = max(now, self.origin.cap_free_at)
                self.origin.cap_free_at = self.granted_at + step / knobs.cap
        return self.granted_at - now, min(step, self.granted)

    def _account(self, sent: int) -> None:
        self.granted = max(0, self.granted - sent)
        if self.origin.knobs.bandwidth:
            self.free_at = max(self.free_at, time.perf_counter()) + sent / self.origin.knobs.bandwidth

    def _wait_writable(self) -> None:
        if not self.writing:
            self.loop.add_writer(self.fd, self._send)
            self.writing = True

    def _stop_writing(self) -> None:
        if self.writing:
            self.loop.remove_writer(self.fd)
            self.writing = False

    def _done(self, answer: Answer) -> None:
        self._stop_writing()
        if answer.part is not None:
            self.origin.stats.sent[answer.part] += 1
        self._release(answer)
        if not answer.keep_alive:
            self._close()
        elif self.received:
            self._next_request()

    def _release(self, answer: Answer) -> None:
        if answer.close_fd is not None:
            os.close(answer.close_fd)
            answer.close_fd = None
        self.answer = None
        self.origin.stats.in_flight -= 1

    def _close(self) -> None:
        if self.fd < 0:
            return
        self._stop_writing()
        self.loop.remove_reader(self.fd)
        if self.answer is not None:
            self._release(self.answer)
        self.fd = -1
        self.sock.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a non-blocking listening socket."""
    sock = socket.create_server((host, port), backlog=1024)
    sock.setblocking(False)
    return sock


def accept_all(origin: Origin, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
    """Take every connection that waits."""
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Connection(origin, loop, sock)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="A small, fast S3 origin for benchmarks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dataset", type=parse_dataset, action="append", default=[], metavar="NAME:COUNTxSIZE")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="before the first byte of every answer")
    parser.add_argument("--latency-sigma", type=float, default=0.0, help="of a lognormal latency; 0: fixed")
    parser.add_argument("--bandwidth", type=parse_size_bytes, default=0, help="bytes per second per connection")
    parser.add_argument("--cap", type=parse_size_bytes, default=0, help="bytes per second in all")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second, above which it answers 503")
    return parser.parse_args(argv)


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> None:
    """Serve until killed."""
    options = parse_arguments(argv)
    knobs = Knobs(options.latency_ms, options.latency_sigma, options.bandwidth, options.cap, options.rate)
    origin = Origin(Catalogue(options.dataset, options.folder), knobs)
    loop = asyncio.new_event_loop()
    listener = listen(options.host, options.port)
    loop.add_reader(listener.fileno(), accept_all, origin, loop, listener)
    print(f"http://{options.host}:{listener.getsockname()[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        loop.run_forever()


if __name__ == "__main__":
    main()
