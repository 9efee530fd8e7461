"""Routes by which readers publish their plans; see orchestra/client/plans.py for the other side.

Paths and orders come as plain bytes (path_table, 32-bit indexes): ten million of either would be half a gigabyte of
JSON.
"""

from __future__ import annotations

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.errors import UsageError
from orchestra.prefetch.plan import unpacked_samples

# A plan's name is made by its publisher; it is shown in logs and in `orchestra stalls`.
_NAME_CHARACTERS_MAX = 64


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/plans", list_plans)
    app.router.add_post("/v1/plans/paths", declare_paths)
    app.router.add_post("/v1/plans/paths/part", add_paths_part)
    app.router.add_post("/v1/plans/order", add_order)
    app.router.add_post("/v1/plans/position", move)
    app.router.add_post("/v1/plans/end", end)


async def list_plans(request: web.Request) -> web.Response:
    """GET -> {plans: [...]}: how far each reader is, and how far ahead of it the cache."""
    return answer({"plans": request.app[NODE].plans.status()})


async def declare_paths(request: web.Request) -> web.Response:
    """POST {paths, count} -> {missing_parts}: what of that table has to be sent."""
    body = await body_of(request)
    name = typed(body, "paths", str)
    if not 0 < len(name) <= _NAME_CHARACTERS_MAX:
        raise UsageError("field 'paths': expected the name of a table")
    return answer({"missing_parts": request.app[NODE].plans.declare_paths(name, typed(body, "count", int))})


async def add_paths_part(request: web.Request) -> web.Response:
    """POST ?paths=&part= with a part's bytes -> {}."""
    part = _number(request, "part")
    request.app[NODE].plans.add_paths_part(request.query.get("paths", ""), part, await request.read())
    return answer({})


async def add_order(request: web.Request) -> web.Response:
    """POST ?plan=&paths=&epoch=&first=&total= with 32-bit indexes -> {}."""
    name = request.query.get("plan", "")
    if not 0 < len(name) <= _NAME_CHARACTERS_MAX or not name.isprintable():
        raise UsageError("plan: expected a name of at most 64 characters")
    epoch, first, total = (_number(request, field) for field in ("epoch", "first", "total"))
    samples = unpacked_samples(await request.read())
    request.app[NODE].plans.add_order(name, request.query.get("paths", ""), epoch, first, total, samples)
    return answer({})


async def move(request: web.Request) -> web.Response:
    """POST {plan, epoch, position} -> {known, rest_s, failure}: `known` is false if the plan has to be published
    (again); for `rest_s` the next position may be left unsaid; `failure` says why a file could not be fetched ahead."""
    body, plans = await body_of(request), request.app[NODE].plans
    name, epoch, position = typed(body, "plan", str), typed(body, "epoch", int), typed(body, "position", int)
    known = plans.move(name, epoch, max(0, position))
    return answer({"known": known, "rest_s": plans.rest_s(name), "failure": plans.failure(name)})


async def end(request: web.Request) -> web.Response:
    """POST {plan} -> {}."""
    request.app[NODE].plans.end(typed(await body_of(request), "plan", str))
    return answer({})


def _number(request: web.Request, name: str) -> int:
    text = request.query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UsageError(f"{request.path}: {name}: expected a whole number, got {text[:40]!r}")
    return int(text)
