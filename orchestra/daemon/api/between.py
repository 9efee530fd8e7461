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
from orchestra.daemon.api.context import NODE, Activity, answer, body_of, typed
from orchestra.daemon.api.peer import PeerConnection
from orchestra.daemon.assembly import Node
from orchestra.daemon.cluster import ClusterNode
from orchestra.errors import ConfigError, OrchestraError, UsageError, http_status_of, to_wire

log = logging.getLogger(__name__)

# The largest body that a node sends another: read before its proof can be checked.
BODY_LIMIT_BYTES = 8 * 1024 * 1024
_BACKLOG = 1024
# Longer than any pause of a training job between two reads; a peer that is gone is noticed by its failing requests.
_KEEPALIVE_S = 3600.0
_DRAIN_TIMEOUT_S = 2.0

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


def make_peer_app(node: Node, activity: Activity) -> web.Application:
    """Return the application that other nodes reach."""

    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/healthz":
            return await handler(request)
        activity.begin()
        try:
            checker = cluster_of(request).checker
            if checker is not None:
                checker.check(request.method, request.raw_path, request.headers, await request.read())
            return await handler(request)
        except OrchestraError as error:
            return answer(to_wire(error), status=http_status_of(error))
        except web.HTTPException as error:
            return answer(to_wire(UsageError(f"{request.method} {request.path}: {error.reason}")), status=error.status)
        except (ConnectionResetError, asyncio.CancelledError):
            raise  # the peer went away
        except Exception as error:
            log.exception("%s %s, asked by another node, failed", request.method, request.path)
            internal = OrchestraError(f"internal error in another node's daemon ({type(error).__name__})")
            return answer(to_wire(internal), status=500)
        finally:
            activity.end()

    app = web.Application(middlewares=[frame], client_max_size=BODY_LIMIT_BYTES)
    app[NODE] = node
    app.router.add_get("/healthz", healthz)
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
    runner = web.AppRunner(
        make_peer_app(node, activity),
        access_log=None,
        shutdown_timeout=_DRAIN_TIMEOUT_S,
        keepalive_timeout=_KEEPALIVE_S,
    )
    await runner.setup()
    web_server = runner.server
    assert web_server is not None, "the runner was set up"
    service = cluster.service
    assert service is not None, "assembly joined them"
    host, port = split_address(cluster.config.listen)
    connections: WeakSet[PeerConnection] = WeakSet()

    def connection() -> PeerConnection:
        made = PeerConnection(web_server, service, cluster.checker, activity)
        connections.add(made)
        return made

    try:
        server = await asyncio.get_running_loop().create_server(connection, host, port, backlog=_BACKLOG)
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"cluster.listen {cluster.config.listen} cannot be opened: {error.strerror or error}; it must be an address"
            " of this machine that nobody else listens on"
        ) from error
    try:
        async with asyncio.TaskGroup() as tasks:
            taking_part = [tasks.create_task(cluster.run())]
            if cluster.replicas is not None:
                taking_part.append(tasks.create_task(cluster.replicas.run()))
            try:
                yield
            finally:
                for task in taking_part:
                    task.cancel()
    finally:
        server.close()
        for made in list(connections):
            made.close()
        await runner.cleanup()
        service.close()
