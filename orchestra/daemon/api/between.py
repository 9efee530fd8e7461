"""The port that other nodes reach: its application, and the proof of the secret in front of every route but /healthz.

Owns: listening on `cluster.listen`, the frame around each request. Leaves to others: what the routes do (each group of
routes adds its own in `make_peer_app`), what a proof is (cluster.proof).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from weakref import WeakSet

from aiohttp import web

from orchestra.cluster.records import encode_record
from orchestra.config_cluster import split_address
from orchestra.daemon import replicas
from orchestra.daemon.api import asked
from orchestra.daemon.api.app import frame_of, serving
from orchestra.daemon.api.context import NODE, Activity, answer, body_of, typed
from orchestra.daemon.api.peer import PeerConnection
from orchestra.daemon.assembly import Node
from orchestra.daemon.cluster import ClusterNode
from orchestra.errors import ConfigError, OrchestraError

log = logging.getLogger(__name__)

# The largest body that a node sends another: read before its proof can be checked.
BODY_LIMIT_BYTES = 8 * 1024 * 1024
_BACKLOG = 1024
# Longer than any pause of a training job between two reads; a peer that is gone is noticed by its failing requests.
_KEEPALIVE_S = 3600.0
_DRAIN_TIMEOUT_S = 2.0

_HEALTH = "/healthz"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def cluster_of(request: web.Request) -> ClusterNode:
    """Return this node's part in its cluster; there is one where these routes are."""
    cluster = request.app[NODE].cluster
    assert cluster is not None, "the peers' port is open only in a cluster"
    return cluster


async def healthz(request: web.Request) -> web.Response:
    """GET -> this node's record. Needs no proof: probes of other nodes come before anything is known of them."""
    return web.Response(body=encode_record(cluster_of(request).own), content_type="application/json")


async def keep(request: web.Request) -> web.Response:
    """POST {parts: [...]} -> {}: this node, an owner of these parts, is to fetch them when there is nothing better to
    do."""
    copies = cluster_of(request).replicas
    if copies is not None:
        copies.take(typed(await body_of(request), "parts", list))
    return answer({})


def _internal(error: Exception) -> OrchestraError:
    return OrchestraError(f"internal error in another node's daemon ({type(error).__name__})")


def make_peer_app(node: Node, activity: Activity) -> web.Application:
    """Return the application that other nodes reach."""

    @web.middleware
    async def doorkeeper(request: web.Request, handler: Handler) -> web.StreamResponse:
        checker = cluster_of(request).checker
        if request.path != _HEALTH and checker is not None:
            checker.check(request.method, request.raw_path, request.headers, await request.read())
        return await handler(request)

    frame = frame_of(activity, _internal, asked_by="another node", uncounted=(_HEALTH,))
    app = web.Application(middlewares=[frame, doorkeeper], client_max_size=BODY_LIMIT_BYTES)
    app[NODE] = node
    app.router.add_get(_HEALTH, healthz)
    app.router.add_post(replicas.ROUTE, keep)
    asked.add_routes(app)
    return app


@contextlib.asynccontextmanager
async def clustered(node: Node, activity: Activity) -> AsyncIterator[None]:
    """Take part in the node's cluster inside the block: first the port, then membership; and the other way round in
    the end. Does nothing where there is no cluster. Raises ConfigError if the port cannot be had."""
    cluster = node.cluster
    if cluster is None:
        yield
        return
    service = cluster.service
    assert service is not None, "assembly joined them"
    app = make_peer_app(node, activity)
    try:
        async with serving(app, drain_timeout_s=_DRAIN_TIMEOUT_S, keepalive_s=_KEEPALIVE_S) as web_server:
            connections: WeakSet[PeerConnection] = WeakSet()

            def connection() -> PeerConnection:
                made = PeerConnection(web_server, service, cluster.checker, activity)
                connections.add(made)
                return made

            server = await _listening(connection, cluster.config.listen)
            try:
                async with _taking_part(cluster):
                    yield
            finally:
                server.close()
                for made in list(connections):
                    made.close()
    finally:
        service.close()


async def _listening(connection: Callable[[], PeerConnection], listen: str) -> asyncio.Server:
    """Open `listen`; raise ConfigError if it cannot be had."""
    host, port = split_address(listen)
    try:
        return await asyncio.get_running_loop().create_server(connection, host, port, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cluster.listen {listen} cannot be opened: {error.strerror or error}; it must be an address of this"
            " machine that nobody else listens on"
        ) from error


@contextlib.asynccontextmanager
async def _taking_part(cluster: ClusterNode) -> AsyncIterator[None]:
    """Run what a member of a cluster does by itself inside the block."""
    async with asyncio.TaskGroup() as tasks:
        under_way = [tasks.create_task(cluster.run())]
        if cluster.replicas is not None:
            under_way.append(tasks.create_task(cluster.replicas.run()))
        try:
            yield
        finally:
            for task in under_way:
                task.cancel()
