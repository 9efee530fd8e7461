"""Routes of the space: pin, unpin, free, and what the cache holds below a path."""

from __future__ import annotations

import dataclasses

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.errors import UsageError


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/pins", list_pins)
    app.router.add_post("/v1/pins", pin)
    app.router.add_delete("/v1/pins", unpin)
    app.router.add_post("/v1/free", free)
    app.router.add_get("/v1/usage", usage)


async def list_pins(request: web.Request) -> web.Response:
    """GET ?sizes= -> {pins: [{path, held_bytes, pinned_bytes}]}; `sizes=no`: the paths alone, which costs nothing."""
    space = request.app[NODE].space
    if request.query.get("sizes") == "no":
        return answer({"pins": [{"path": path} for path in space.pins]})
    rows = []
    for path in space.pins:
        held = dataclasses.asdict(await space.usage(path)) if space.is_mounted(path) else {}
        rows.append({"path": path, "held_bytes": 0, "pinned_bytes": 0, **held})
    return answer({"pins": rows})


async def pin(request: web.Request) -> web.Response:
    """POST {path} -> {held_bytes, pinned_bytes} at and below it."""
    body = await body_of(request)
    return answer(dataclasses.asdict(await request.app[NODE].space.pin(typed(body, "path", str))))


async def unpin(request: web.Request) -> web.Response:
    """DELETE ?path= -> {held_bytes, pinned_bytes} at and below it; what is pinned still, is so by another pin."""
    return answer(dataclasses.asdict(await request.app[NODE].space.unpin(_path_of(request))))


async def free(request: web.Request) -> web.Response:
    """POST {path, force?} -> {freed_bytes, pinned_bytes, busy_bytes}; pinned files leave only with `force`."""
    body = await body_of(request)
    path, force = typed(body, "path", str), typed(body, "force", bool, False)
    return answer(dataclasses.asdict(await request.app[NODE].space.free(path, pinned=force)))


async def usage(request: web.Request) -> web.Response:
    """GET ?path= -> {held_bytes, pinned_bytes}: what the cache holds at and below it, of all versions."""
    return answer(dataclasses.asdict(await request.app[NODE].space.usage(_path_of(request))))


def _path_of(request: web.Request) -> str:
    path = request.query.get("path")
    if not path:
        raise UsageError(f"{request.method} {request.path} needs ?path=")
    return path
