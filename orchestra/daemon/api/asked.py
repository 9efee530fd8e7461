"""Routes that other nodes of the cluster ask, besides those for bytes; the port is api.between's, and every request has
proved the secret before it comes here."""

from __future__ import annotations

from aiohttp import web

from orchestra.daemon.api import jobs
from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.daemon.api.nodes import control_of
from orchestra.daemon.nodes import doubts, handover, hot, listings, loads, presence
from orchestra.daemon.nodes.control import DRAIN_ROUTE


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/node/status", status)
    app.router.add_post(presence.ROUTE, holds)
    app.router.add_post(listings.ROUTE, listing)
    app.router.add_post(handover.ROUTE, take)
    app.router.add_post(hot.ROUTE, copy)
    app.router.add_post(doubts.ROUTE, doubt)
    app.router.add_post(DRAIN_ROUTE, drain)
    jobs.add_own_routes(app)
    app.router.add_post(loads.ROUTE + "{action}", part_of_load)


async def status(request: web.Request) -> web.Response:
    """GET -> {node_id, ring_digest, used_bytes, handover}: how this node is."""
    return answer(control_of(request).status())


async def holds(request: web.Request) -> web.Response:
    """POST {objects: [[digest, size_bytes]]} -> {held: [{extent: bytes}], hot: [[extent]]} of each, on this node's
    disk; `hot` are those which it was asked to keep because they are read so often."""
    node, kept = request.app[NODE], control_of(request).hot.kept
    return answer(presence.answer_holds(node.blocks, node.geometry, await body_of(request), kept))


async def part_of_load(request: web.Request) -> web.Response:
    """POST {job, ...} -> what jobs.parts answers: start, status, release, stop, failures of this node's part."""
    return answer(await control_of(request).parts.answer(request.match_info["action"], await body_of(request)))


async def listing(request: web.Request) -> web.Response:
    """POST {store, prefix, freshness_s, refresh, since_ns?} -> the record of that listing, and its age in a header;
    nothing while it is under way, and then in a header what `since_ns` is to be when it is asked for again."""
    record, headers = await control_of(request).listings.answer(await body_of(request))
    return web.Response(body=record, headers=headers)


async def take(request: web.Request) -> web.Response:
    """POST {from, extents} -> {taken: [...]}: extents of a node that is drained, which this one now has of it."""
    return answer(await control_of(request).handover.answer(await body_of(request)))


async def copy(request: web.Request) -> web.Response:
    """POST {from, extent} -> {held}: an extent that is read so often that this node is to keep a copy, too."""
    return answer(await control_of(request).hot.answer(await body_of(request)))


async def doubt(request: web.Request) -> web.Response:
    """POST {part} -> {damaged}: blocks that came from here with other bytes than they should have are looked at."""
    return answer(await control_of(request).doubts.answer(await body_of(request)))


async def drain(request: web.Request) -> web.Response:
    """POST {undo?} -> {node_id, handover}: this node is drained, or is so no more."""
    undo = typed(await body_of(request), "undo", bool, False)
    return answer(await control_of(request).drain("", undo=undo))
