"""What all routes share: the node, JSON in and out, and whether anybody is being served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import msgspec
from aiohttp import web

from orchestra.clock import Clock
from orchestra.daemon.assembly import Node
from orchestra.errors import UsageError

NODE: web.AppKey[Node] = web.AppKey("node", Node)


class Activity:
    """Knows since when nothing happened."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running = 0
        self._last_ns = clock.now_ns()
        self._drained = asyncio.Event()
        self.requests_total = 0

    def begin(self) -> None:
        """A request came in."""
        self._running += 1
        self.requests_total += 1

    def end(self) -> None:
        """A request was answered."""
        self._running -= 1
        self._last_ns = self._clock.now_ns()
        if not self._running:
            self._drained.set()

    async def wait_drained(self, timeout_s: float) -> None:
        """Return when no request is being served, or after `timeout_s`."""
        self._drained.clear()
        if self._running:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout_s)

    def note(self) -> None:
        """Something else happened: a reader read."""
        self._last_ns = self._clock.now_ns()

    def idle_s(self) -> float:
        """Seconds since the last sign of life; 0 while a request is being served."""
        return 0.0 if self._running else (self._clock.now_ns() - self._last_ns) / 1e9


def answer(body: dict[str, Any], status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=encoded(body), status=status, content_type="application/json")


async def body_of(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that was sent. Raises UsageError."""
    return decoded(await request.read(), request.path)


def decoded(raw: bytes, route: str) -> dict[str, Any]:
    """Return the JSON object in `raw`, {} for nothing. Raises UsageError naming the route."""
    try:
        body = msgspec.json.decode(raw) if raw else {}
    except msgspec.DecodeError:
        body = _decoded_slowly(raw, route)
    if not isinstance(body, dict):
        raise UsageError(f"{route}: the body is not a JSON object")
    return body


def _decoded_slowly(raw: bytes, route: str) -> Any:
    # A name that is no UTF-8 comes as half surrogate pairs, as Python's own file functions have it. msgspec refuses it.
    try:
        return json.loads(raw)
    except ValueError as error:
        raise UsageError(f"{route}: the body is not JSON: {error}") from error


def encoded(body: dict[str, Any]) -> bytes:
    """Return the JSON of an answer."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return json.dumps(body).encode()


def typed(body: dict[str, Any], name: str, kind: type, default: Any = ...) -> Any:
    """Return a field of that type. Raises UsageError naming it."""
    value = body.get(name, default)
    if value is ...:
        raise UsageError(f"field {name!r} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"field {name!r}: expected {kind.__name__}, got {value!r}")
    return value
