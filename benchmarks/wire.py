"""HTTP as the benchmarks' origin speaks it: one parsed request, one answer to send.

Owns: heads, ranges, S3's error document. Leaves to others: what to answer, and sending it (origin.py).
"""

from __future__ import annotations

import email.utils
import re
import urllib.parse
from collections import deque
from dataclasses import dataclass, field

LAST_MODIFIED = 1_780_000_000
HTTP_DATE = email.utils.formatdate(LAST_MODIFIED, usegmt=True)
STARTED_DATE = email.utils.formatdate(usegmt=True)  # clients complain of a clock that is days behind, not of hours
ISO_DATE = "2026-05-28T20:26:40.000Z"


@dataclass(slots=True)
class Request:
    """One parsed request head."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass(slots=True)
class Answer:
    """What is sent: head and small body in `head`, the rest as runs (descriptor, offset, length)."""

    head: bytes
    inline: memoryview | bytes = b""
    runs: deque[tuple[int, int, int]] = field(default_factory=deque)
    close_fd: int | None = None
    keep_alive: bool = True
    part: tuple[str, int] | None = None  # key and first byte, of an object's body


def parse_request(head: bytes) -> Request:
    """Return the request in `head` (without the blank line)."""
    lines = head.decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ", 2)
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    path, _, query = target.partition("?")
    pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) if query else {}
    return Request(method, urllib.parse.unquote(path) if "%" in path else path, pairs, headers)


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """Return [start, stop) of a Range header, (0, size) without one, None if it cannot be satisfied."""
    if text is None:
        return 0, size
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if match is None or (not match[1] and not match[2]):
        return 0, size
    if not match[1]:
        return max(0, size - int(match[2])), size
    start = int(match[1])
    stop = min(size, int(match[2]) + 1) if match[2] else size
    return (start, stop) if start < min(stop, size) else None


def head_of(status: str, length: int, extra: str = "", content_type: str = "application/xml") -> bytes:
    """Return an answer's head; `length` is its Content-Length."""
    return (
        f"HTTP/1.1 {status}\r\nServer: origin\r\nDate: {STARTED_DATE}\r\nx-amz-request-id: 0\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n{extra}\r\n"
    ).encode()


def error_answer(status: str, code: str, *, with_body: bool = True, extra: str = "") -> Answer:
    """Return an S3 error document."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
    return Answer(head_of(status, len(body), extra), body if with_body else b"")
