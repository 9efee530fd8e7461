"""Routes of the data path: stat, list, ensure, read. They answer misses; hits never come here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.daemon.assembly import Node
from orchestra.engine.engine import Wanted
from orchestra.errors import OrchestraError, UsageError
from orchestra.metadata.records import RecordEntry
from orchestra.stores.contract import Buffer
from orchestra.values import ByteRange

log = logging.getLogger(__name__)


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_post("/v1/ensure", ensure)
    app.router.add_post("/v1/stat", stat)
    app.router.add_post("/v1/list", list_directory)
    app.router.add_post("/v1/read", read)


async def stat(request: web.Request) -> web.Response:
    """POST {path, refresh?} -> {kind, size_bytes, mtime_ns, version}; the record is published for all readers."""
    body = await body_of(request)
    engine = request.app[NODE].engine
    began_ns = engine.stalls.now_ns()
    try:
        entry = await engine.stat(typed(body, "path", str), refresh=typed(body, "refresh", bool, False))
    finally:
        engine.stalls.add_metadata(began_ns)
    return answer(entry_json(entry))


async def list_directory(request: web.Request) -> web.Response:
    """POST {path, refresh?} -> {count}; the listing itself is published, not sent."""
    body = await body_of(request)
    engine = request.app[NODE].engine
    began_ns = engine.stalls.now_ns()
    try:
        record = await engine.list_directory(typed(body, "path", str), refresh=typed(body, "refresh", bool, False))
    finally:
        engine.stalls.add_metadata(began_ns)
    return answer({"count": len(record) if record is not None else 0})


async def ensure(request: web.Request) -> web.Response:
    """POST {path, version, digest?, size_bytes, start, stop, ahead_stop?, suspect?} -> {kept}: the bytes are present.

    `ahead_stop`: go on fetching up to there in the background.
    """
    return answer(await ensure_body(request.app[NODE], await body_of(request)))


async def ensure_body(node: Node, body: dict[str, Any]) -> dict[str, Any]:
    """Do what `ensure` is asked for; return its answer."""
    wanted = _wanted(node, body)
    suspect = typed(body, "suspect", bool, False)
    ahead_stop = typed(body, "ahead_stop", int, 0)
    if ahead_stop > wanted.byte_range.stop:
        # First what is waited for: both end up in the same queue.
        waited = asyncio.ensure_future(node.engine.ensure(wanted, suspect=suspect))
        await asyncio.sleep(0)
        node.prefetch.ahead(node.prefetch.rest_of(wanted, ahead_stop))
        return {"kept": await waited}
    return {"kept": await node.engine.ensure(wanted, suspect=suspect)}


async def read(request: web.Request) -> web.StreamResponse:
    """POST as for ensure -> the bytes, straight from the store: for readers that cannot use the cache directory."""
    body = await body_of(request)
    node = request.app[NODE]
    wanted = _wanted(node, body)
    return await send_pieces(request, wanted, node.engine.read_uncached(wanted))


async def send_pieces(request: web.Request, wanted: Wanted, pieces: AsyncIterator[Buffer]) -> web.StreamResponse:
    """Send what `pieces` gives; an error after the first piece breaks the connection off."""
    # The first piece is fetched before the status is sent, so that most errors have one of their own.
    first = await anext(pieces, b"")
    response = web.StreamResponse()
    response.content_type = "application/octet-stream"
    response.content_length = wanted.byte_range.length
    await response.prepare(request)
    try:
        await response.write(bytes(first))
        async for piece in pieces:
            await response.write(bytes(piece))
    except OrchestraError as error:
        # An answer about the error would be taken for the rest of the bytes. The reader sees the connection break, asks
        # again, and gets the error itself if it comes with the first piece.
        log.warning("reading %s broke off: %s", wanted.info.key, error)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(str(error)) from error
    await response.write_eof()
    return response


def _wanted(node: Node, body: dict[str, Any]) -> Wanted:
    size, start, stop = (typed(body, name, int) for name in ("size_bytes", "start", "stop"))
    if not 0 <= start <= stop <= size:
        raise UsageError(f"not a range of {size} bytes: [{start}, {stop})")
    digest = typed(body, "digest", str, "")
    return node.engine.want(
        typed(body, "path", str), typed(body, "version", str), size, ByteRange(start, stop), digest=digest
    )


def entry_json(entry: RecordEntry) -> dict[str, Any]:
    """Return an entry as it is sent."""
    return {
        "kind": int(entry.kind),
        "size_bytes": entry.size_bytes,
        "mtime_ns": entry.mtime_ns,
        "version": entry.version,
    }
