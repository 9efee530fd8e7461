"""Routes about the cluster, for this machine's own clients: which nodes there are, what they hold, draining."""

from __future__ import annotations

from aiohttp import web

from orchestra.daemon.api.context import NODE, answer, body_of, typed
from orchestra.daemon.nodes.control import NodeControl
from orchestra.daemon.nodes.overview import one_machine
from orchestra.engine.engine import Wanted
from orchestra.errors import IsADirectoryPathError, UsageError
from orchestra.namespace.paths import normalize_path
from orchestra.values import ByteRange, EntryKind


def add_routes(app: web.Application) -> None:
    """Add the routes to `app`."""
    app.router.add_get("/v1/nodes", list_nodes)
    app.router.add_post("/v1/nodes/drain", drain)
    app.router.add_post("/v1/nodes/where", where)


async def list_nodes(request: web.Request) -> web.Response:
    """GET -> {is_cluster, membership, ring, source_error, nodes: [{node_id, address, state, capacity_bytes, used_bytes,
    share, is_self, note, hot_copies}]}; a machine that stands alone is one node."""
    node = request.app[NODE]
    if node.nodes is None:
        return answer(one_machine(node.config.cache.size_bytes, node.blocks.statistics().used_bytes))
    return answer(await node.nodes.overview.describe())


async def drain(request: web.Request) -> web.Response:
    """POST {node?, undo?} -> {node_id, handover}: that node (this one) is drained, or with `undo` is so no more."""
    body = await body_of(request)
    name, undo = typed(body, "node", str, ""), typed(body, "undo", bool, False)
    return answer(await control_of(request).drain(name, undo=undo))


async def where(request: web.Request) -> web.Response:
    """POST {path} -> {nodes: [{node_id, is_self, held_bytes, hot_bytes, owns_bytes, error}]} of the file's current
    version."""
    control = control_of(request)
    node = request.app[NODE]
    path = normalize_path(typed(await body_of(request), "path", str))
    entry = await node.engine.stat(path)
    if entry.kind is not EntryKind.FILE:
        raise IsADirectoryPathError(f"is a directory: {path}")
    wanted: Wanted = node.engine.want(path, entry.version, entry.size_bytes, ByteRange(0, entry.size_bytes))
    return answer(await control.presence.where(wanted, control.replicas_of(wanted.mount.config)))


def control_of(request: web.Request) -> NodeControl:
    """Return the control side of this node. Raises UsageError where there is no cluster."""
    control = request.app[NODE].nodes
    if control is None:
        source = request.app[NODE].config.source
        raise UsageError(f"this machine stands alone: {source or 'its settings'} has no table [cluster]")
    return control
