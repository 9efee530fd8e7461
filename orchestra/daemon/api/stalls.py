"""Route that says what this node's readers waited for."""

from __future__ import annotations

import dataclasses
from typing import Any

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer
from orchestra.daemon.assembly import Node
from orchestra.observe.stalls import NodeFigures


def add_routes(app: web.Application) -> None:
    """Add the route to `app`."""
    app.router.add_get("/v1/stalls", stalls)


async def stalls(request: web.Request) -> web.Response:
    """GET ?brief= -> {figures, uptime_s, minutes, plans}; brief: the figures alone, for who asks often."""
    node = request.app[NODE]
    body: dict[str, Any] = {"figures": figures_of(node).to_json()}
    if "brief" not in request.query:
        body |= {
            "uptime_s": round((node.clock.now_ns() - node.started_ns) / 1e9, 3),
            "minutes": [
                {"minutes_ago": ago, "waits": dataclasses.asdict(waits)} for ago, waits in node.engine.stalls.minutes()
            ],
            "plans": node.plans.status(),
        }
    return answer(body)


def figures_of(node: Node) -> NodeFigures:
    """What the node did for its readers since its start."""
    reads = node.accesses.totals()
    fetched = node.fetcher.statistics
    return NodeFigures(
        node.engine.stalls.waits(),
        node.engine.stalls.misses,
        fetched.bytes_fetched,
        fetched.busy_ns / 1e9,
        reads.hit_bytes + reads.miss_bytes,
        reads.miss_bytes,
        node.config.cache.size_bytes,
    )
