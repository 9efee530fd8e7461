"""The web application: routes, and the outermost frame around every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from orchestra.daemon.api import cache, control, data, jobs, nodes, plans, stalls
from orchestra.daemon.api.context import NODE, Activity, answer, decoded
from orchestra.daemon.api.hot import HotHandler
from orchestra.daemon.assembly import Node
from orchestra.errors import OrchestraError, UsageError, http_status_of, to_wire

log = logging.getLogger(__name__)

# The largest body is a list of paths (a load of a list): 10,000 long ones.
BODY_LIMIT_BYTES = 64 * 1024 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_hot_handler(node: Node, activity: Activity) -> HotHandler:
    """Return what answers POST /v1/ensure in front of the application: the same frame around the same work."""

    async def handle(raw: bytes) -> tuple[int, dict[str, Any]]:
        activity.begin()
        try:
            return 200, await data.ensure_body(node, decoded(raw, "/v1/ensure"))
        except OrchestraError as error:
            return http_status_of(error), dict(to_wire(error))
        except Exception as error:  # outermost frame: a bug must not leave a reader without an answer
            log.exception("POST /v1/ensure failed")
            return 500, dict(to_wire(_internal(node, error)))
        finally:
            activity.end()

    return handle


def _internal(node: Node, error: Exception) -> OrchestraError:
    return OrchestraError(f"internal error in the daemon ({type(error).__name__}); see {node.layout.log}")


def frame_of(
    activity: Activity,
    internal: Callable[[Exception], OrchestraError],
    *,
    asked_by: str = "",
    uncounted: Container[str] = (),
) -> Middleware:
    """Return the outermost frame around a request: errors become answers, and requests are counted, except those of
    `uncounted` paths. `internal` makes the error that answers a defect; the log says `asked_by`."""

    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in uncounted:
            return await handler(request)
        activity.begin()
        try:
            return await handler(request)
        except OrchestraError as error:
            return answer(to_wire(error), status=http_status_of(error))
        except web.HTTPException as error:
            return answer(to_wire(UsageError(f"{request.method} {request.path}: {error.reason}")), status=error.status)
        except (ConnectionResetError, asyncio.CancelledError):
            raise  # the client went away
        except Exception as error:
            log.exception("%s %s%s failed", request.method, request.path, asked_by and f", asked by {asked_by},")
            return answer(to_wire(internal(error)), status=500)
        finally:
            activity.end()

    return frame


def frame_of_node(node: Node, activity: Activity) -> Middleware:
    """Return the frame around what processes of this machine ask: who finds a defect is sent to the node's log."""
    return frame_of(activity, partial(_internal, node))


@contextlib.asynccontextmanager
async def serving(app: web.Application, *, drain_timeout_s: float, keepalive_s: float) -> AsyncIterator[web.Server]:
    """Give what makes a protocol for each connection to `app`; at the end let requests under way finish."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=drain_timeout_s, keepalive_timeout=keepalive_s)
    await runner.setup()
    assert runner.server is not None, "the runner was set up"
    try:
        yield runner.server
    finally:
        await runner.cleanup()


def make_app(node: Node, stop: asyncio.Event, activity: Activity) -> web.Application:
    """Return the application of `node`; `stop` is set by POST /v1/stop."""
    app = web.Application(middlewares=[frame_of_node(node, activity)], client_max_size=BODY_LIMIT_BYTES)
    app[NODE] = node
    control.add_routes(app, stop)
    data.add_routes(app)
    jobs.add_routes(app)
    plans.add_routes(app)
    stalls.add_routes(app)
    cache.add_routes(app)
    nodes.add_routes(app)
    return app
