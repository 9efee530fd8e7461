"""Routes that ask about the daemon and change its mounts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from typing import Any

from aiohttp import web

import orchestra
from orchestra.config import load_config
from orchestra.config_file import settings_of
from orchestra.daemon.api.context import NODE, answer
from orchestra.daemon.assembly import Node
from orchestra.daemon.mounts import mount_from_json, mount_to_json
from orchestra.daemon.nodes.mounts import SharedMounts
from orchestra.errors import UsageError
from orchestra.prefetch.dataset import statuses_json
from orchestra.stores.counting import HasStatistics


def add_routes(app: web.Application, stop: asyncio.Event) -> None:
    """Add the routes to `app`; POST /v1/stop sets `stop`."""

    async def stop_daemon(_: web.Request) -> web.Response:
        """POST -> {}: the daemon writes its index and ends."""
        stop.set()
        return answer({})

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/v1/status", status)
    app.router.add_post("/v1/stop", stop_daemon)
    app.router.add_post("/v1/reload", reload_config)
    app.router.add_get("/v1/mounts", list_mounts)
    app.router.add_post("/v1/mounts", add_mount)
    app.router.add_put("/v1/mounts", update_mount)
    app.router.add_delete("/v1/mounts", remove_mount)


async def healthz(_: web.Request) -> web.Response:
    """GET -> {"status": "ok"} while requests are answered."""
    return answer({"status": "ok"})


async def status(request: web.Request) -> web.Response:
    """GET -> who the daemon is, what it holds, and what was read and fetched since its start."""
    return answer(_status(request.app[NODE]))


async def metrics(request: web.Request) -> web.Response:
    """GET -> the numbers of the status in Prometheus' text format."""
    body = _status(request.app[NODE])
    lines = []
    for group in ("reads", "blocks", "fetch", "metadata", "engine"):
        for name, value in body[group].items():
            lines.append(f"orchestra_{group}_{name} {value}")
    for group in ("shared", "replicas", "hot", "doubts"):
        for name, value in (body["cluster"] or {}).get(group, {}).items():
            lines.append(f"orchestra_cluster_{group}_{name} {value}")
    for store in body["stores"]:
        for name, value in store["counts"].items():
            lines.append(f'orchestra_store_{name}{{mount="{_escaped(store["mount"])}"}} {value}')
    lines += [f"orchestra_cache_used_bytes {body['used_bytes']}", f"orchestra_uptime_seconds {body['uptime_s']}"]
    return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


async def reload_config(request: web.Request) -> web.Response:
    """POST -> {}: the mounts of the daemon's configuration file are read again."""
    node = request.app[NODE]
    node.mounts.reload(load_config(node.config.source) if node.config.source is not None else node.config)
    return answer({})


async def list_mounts(request: web.Request) -> web.Response:
    """GET -> {mounts: [...]}, options as they were written (this socket is its owner's alone)."""
    rows = [
        {**mount_to_json(mount.config), "source": mount.source, "error": str(mount.error or "")}
        for mount in request.app[NODE].mounts.table
    ]
    return answer({"mounts": rows})


async def add_mount(request: web.Request) -> web.Response:
    """POST a mount -> {}; its store must answer."""
    mount = mount_from_json(await _mount_body(request))
    shared = _shared_mounts(request)
    await (request.app[NODE].mounts.add(mount) if shared is None else shared.add(mount))
    return answer({})


async def update_mount(request: web.Request) -> web.Response:
    """PUT a mount -> {}: it replaces the added mount of that path."""
    mount = mount_from_json(await _mount_body(request))
    shared = _shared_mounts(request)
    if shared is not None and shared.has(mount.path):
        await shared.update(mount)
    else:
        await request.app[NODE].mounts.update(mount)
    return answer({})


async def remove_mount(request: web.Request) -> web.Response:
    """DELETE ?path= -> {}."""
    path = request.query.get("path")
    if not path:
        raise UsageError("DELETE /v1/mounts needs ?path=")
    shared = _shared_mounts(request)
    if shared is not None and shared.has(path):
        await shared.remove(path)
    else:
        request.app[NODE].mounts.remove(path)
    return answer({})


def _shared_mounts(request: web.Request) -> SharedMounts | None:
    """The mounts of the whole cluster, where it has an etcd to keep them."""
    control = request.app[NODE].nodes
    return None if control is None else control.mounts


async def _mount_body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())  # the stdlib's: it knows Infinity, which an old client may send
    except ValueError as error:
        raise UsageError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UsageError("the body is not a JSON object")
    return body


def _status(node: Node) -> dict[str, Any]:
    blocks = node.blocks.statistics()
    stores = [
        {"mount": mount.path, "store": mount.opened.store_id, "counts": _counts(mount.opened)}
        for mount in node.mounts.table
        if mount.opened is not None
    ]
    return {
        "pid": os.getpid(),
        "socket": str(node.layout.socket),
        "cache_dir": str(node.layout.root),
        "used_bytes": blocks.used_bytes,
        "capacity_bytes": node.config.cache.size_bytes,
        "uptime_s": round((node.clock.now_ns() - node.started_ns) / 1e9, 3),
        "version": orchestra.__version__,
        "config": str(node.config.source) if node.config.source is not None else None,
        "settings": settings_of(node.config),
        "mounts_fingerprint": node.mounts.fingerprint,
        "mounts": len(node.mounts.table),
        "hidden": _hidden(node),
        "reads": dataclasses.asdict(node.accesses.totals()),
        "blocks": dataclasses.asdict(blocks),
        "fetch": {
            **dataclasses.asdict(node.fetcher.statistics),
            "in_flight_bytes": node.budget.used_bytes,
            "waiting": node.budget.waiting_count,
        },
        "metadata": dataclasses.asdict(node.catalog.statistics),
        "engine": dataclasses.asdict(node.engine.statistics),
        "prefetch": {
            "readahead_blocks": node.prefetch.blocks_asked,
            "dataset": statuses_json(node.dataset),
            "jobs_running": sum(not job.state.is_over for job in node.jobs.all()),
        },
        "stores": stores,
        "cluster": None if node.cluster is None else node.cluster.status(),
    }


def _hidden(node: Node) -> list[dict[str, Any]]:
    """The mounts with keys that no path can show, as far as they were listed since the start."""
    rows = []
    for mount in node.mounts.table:
        count, example = node.catalog.hidden(mount.opened.store_id) if mount.opened is not None else (0, "")
        if count:
            rows.append({"mount": mount.path, "count": count, "example": f"{mount.path.rstrip('/')}/{example}"})
    return rows


def _counts(store: object) -> dict[str, int | float]:
    """The numbers of a store that counts."""
    if not isinstance(store, HasStatistics):
        return {}
    fields = dataclasses.asdict(store.statistics())
    return {name: value for name, value in fields.items() if isinstance(value, (int, float))}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
