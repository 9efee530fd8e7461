"""Routes for processes of other users: what is there, and its bytes. Nothing here changes anything but what is cached.

Owns: those routes, who is asking (the kernel says it, for each connection), the answer to everything else. Leaves to
others: who is admitted and the socket (daemon/guests). A guest may not read the cache directory, so bytes go over the
socket: from the cache where they can be kept there, else straight from the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

import orchestra
from orchestra.blocks.reader import CorruptBlockError
from orchestra.config_mounts import uri_without_password
from orchestra.daemon.api.app import frame_of_node
from orchestra.daemon.api.context import NODE, Activity, answer, body_of, typed
from orchestra.daemon.api.data import entry_json, send_pieces
from orchestra.daemon.assembly import Node
from orchestra.daemon.mounts import mount_to_json
from orchestra.engine.engine import Wanted
from orchestra.errors import AccessDeniedError, StaleObjectError, UsageError
from orchestra.namespace.paths import normalize_path
from orchestra.stores.contract import Buffer
from orchestra.values import ByteRange, EntryKind

# A path and a few numbers.
_BODY_LIMIT_BYTES = 64 * 1024
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
LISTING_HEAD = struct.Struct("<II")  # bytes of the names of mount points (JSON), bytes of the record
_TRIES_MAX = 2

Admits = Callable[[int], Awaitable[bool]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_guest_app(node: Node, activity: Activity, admits: Admits) -> web.Application:
    """Return the application that guests talk to."""

    @web.middleware
    async def doorkeeper(request: web.Request, handler: Handler) -> web.StreamResponse:
        uid = _peer_uid(request)
        if not await admits(uid):
            raise AccessDeniedError(
                f"{name_of(uid)} may not read through the daemon of {name_of(os.geteuid())}: daemon.readers in its "
                "orchestra.toml says who may"
            )
        return await handler(request)

    app = web.Application(middlewares=[frame_of_node(node, activity), doorkeeper], client_max_size=_BODY_LIMIT_BYTES)
    app[NODE] = node
    app.router.add_get("/v1/status", status)
    app.router.add_get("/v1/mounts", list_mounts)
    app.router.add_get("/v1/pins", list_pins)
    app.router.add_post("/v1/stat", stat)
    app.router.add_post("/v1/list", list_directory)
    app.router.add_post("/v1/cached", cached)
    app.router.add_post("/v1/read", read)
    app.router.add_route("*", "/{rest:.*}", refuse)
    return app


def name_of(uid: int) -> str:
    """Return "user nobody (uid 65534)", as far as it is known."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _peer_uid(request: web.Request) -> int:
    if request.transport is None:
        raise ConnectionResetError("the guest went away")
    end: socket.socket = request.transport.get_extra_info("socket")
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid


async def refuse(request: web.Request) -> web.Response:
    """Anything else -> refused."""
    raise AccessDeniedError(
        f"{request.method} {request.path} is for {name_of(os.geteuid())}, the owner of this cache: other users may read"
    )


async def status(request: web.Request) -> web.Response:
    """GET -> {version, used_bytes, capacity_bytes}."""
    node = request.app[NODE]
    used_bytes = node.blocks.statistics().used_bytes
    capacity_bytes = node.config.cache.size_bytes
    return answer({"version": orchestra.__version__, "used_bytes": used_bytes, "capacity_bytes": capacity_bytes})


async def list_mounts(request: web.Request) -> web.Response:
    """GET -> {mounts: [...]}, without options and passwords."""
    rows = [
        {
            **mount_to_json(mount.config),
            "uris": [uri_without_password(uri) for uri in mount.config.uris],
            "options": {},
            "source": mount.source,
            "error": str(mount.error or ""),
        }
        for mount in request.app[NODE].mounts.table
    ]
    return answer({"mounts": rows})


async def list_pins(request: web.Request) -> web.Response:
    """GET ?sizes=no -> {pins: [{path}]}; what they hold would have to be counted, and that is the owner's to ask."""
    if request.query.get("sizes") != "no":
        return await refuse(request)
    return answer({"pins": [{"path": path} for path in request.app[NODE].space.pins]})


async def stat(request: web.Request) -> web.Response:
    """POST {path, refresh?} -> {kind, size_bytes, mtime_ns, version, digest}."""
    body = await body_of(request)
    engine = request.app[NODE].engine
    path = typed(body, "path", str)
    entry = await engine.stat(path, refresh=typed(body, "refresh", bool, False))
    digest = ""
    if entry.kind is EntryKind.FILE:
        digest = engine.want(path, entry.version, entry.size_bytes, ByteRange(0, 0)).digest
    return answer({**entry_json(entry), "digest": digest})


async def list_directory(request: web.Request) -> web.Response:
    """POST {path, refresh?} -> a head (LISTING_HEAD), the names of mount points below as JSON, the record (nothing
    above all mounts)."""
    body = await body_of(request)
    engine = request.app[NODE].engine
    path = normalize_path(typed(body, "path", str))
    record = await engine.list_directory(path, refresh=typed(body, "refresh", bool, False))
    names = json.dumps(engine.mounts.names_below(path)).encode()
    raw = b"" if record is None else record.raw
    parts = b"".join((LISTING_HEAD.pack(len(names), len(raw)), names, raw))
    return web.Response(body=parts, content_type="application/octet-stream")


async def cached(request: web.Request) -> web.Response:
    """POST as for read -> {cached_bytes} of the whole object."""
    node = request.app[NODE]
    wanted = await _wanted(node, await body_of(request))
    local = node.blocks.open_object(wanted.digest, wanted.info.size_bytes)
    try:
        return answer({"cached_bytes": local.cached_bytes()})
    finally:
        local.close()


async def read(request: web.Request) -> web.StreamResponse:
    """POST {path, version, digest?, size_bytes, start, stop} -> the bytes."""
    node = request.app[NODE]
    wanted = await _wanted(node, await body_of(request))
    return await send_pieces(request, wanted, _pieces(node, wanted))


async def _wanted(node: Node, body: dict[str, Any]) -> Wanted:
    """What a guest means who opened that version. Its word for size and version is not taken: what is fetched by it is
    kept for everybody. Raises StaleObjectError unless they are those of now."""
    path, version = typed(body, "path", str), typed(body, "version", str)
    size, start, stop = (typed(body, name, int) for name in ("size_bytes", "start", "stop"))
    if not 0 <= start <= stop <= size:
        raise UsageError(f"not a range of {size} bytes: [{start}, {stop})")
    entry = await node.engine.stat(path)
    if (entry.kind, entry.version, entry.size_bytes) != (EntryKind.FILE, version, size):
        raise StaleObjectError(f"{path} changed after it was opened; open it again")
    digest = typed(body, "digest", str, "")
    return node.engine.want(path, version, size, ByteRange(start, stop), digest=digest)


async def _pieces(node: Node, wanted: Wanted) -> AsyncIterator[Buffer]:
    """Yield the bytes in order, block by block; the rest of a long range is fetched meanwhile."""
    block_size = node.geometry.block_size_bytes
    start, stop = wanted.byte_range.start, wanted.byte_range.stop
    is_first = True
    while start < stop:
        piece = replace(wanted, byte_range=ByteRange(start, min(start - start % block_size + block_size, stop)))
        if is_first and piece.byte_range.stop < stop:
            node.prefetch.ahead(node.prefetch.rest_of(piece, stop))
            is_first = False
        data = await _from_cache(node, piece)
        if data is not None:
            yield data
        else:
            async for part in node.engine.read_uncached(piece):
                yield part
        start = piece.byte_range.stop


async def _from_cache(node: Node, wanted: Wanted) -> bytearray | None:
    """The bytes by way of the cache; None if they cannot be kept there."""
    loop = asyncio.get_running_loop()
    is_suspect = False
    for _ in range(_TRIES_MAX):
        if not await node.engine.ensure(wanted, suspect=is_suspect):
            return None
        try:
            data = await loop.run_in_executor(node.writers, _read_local, node, wanted)
        except CorruptBlockError:
            is_suspect = True
            continue
        if data is not None:
            node.blocks.touch(wanted.digest, wanted.byte_range.start // node.geometry.block_size_bytes)
            return data
    return None


def _read_local(node: Node, wanted: Wanted) -> bytearray | None:
    local = node.blocks.open_object(wanted.digest, wanted.info.size_bytes)
    try:
        buffer = bytearray(wanted.byte_range.length)
        count = local.readinto(wanted.byte_range.start, memoryview(buffer))
        return buffer if count == len(buffer) else None
    finally:
        local.close()
