"""One question to another node: JSON there and back, signed where there is a secret, each with a timeout.

Owns: connections for questions, so that none waits behind data, and the errors of a node that does not answer. Leaves
to others: what is asked (the modules beside this one), bytes of objects (peers).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from orchestra.cluster.records import NodeRecord
from orchestra.daemon.cluster import ClusterNode
from orchestra.errors import DaemonUnavailableError, OrchestraError, from_wire

# A node that is there answers a question in milliseconds; one whose loop is busy writing a listing, in tenths.
ASK_TIMEOUT_S = 2.0
# The status of a job with its failures is some 100 kB, a list of jobs some megabytes.
ANSWER_BYTES_MAX = 16 * 1024 * 1024
_CONNECTIONS_PER_NODE = 32

T = TypeVar("T")


class NodeCalls:
    """Questions of this node to others. One event loop; opens nothing before the first."""

    def __init__(self, cluster: ClusterNode) -> None:
        self._cluster = cluster
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self,
        node: NodeRecord,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Return the JSON object that `node` answers. Raises what it answered, DaemonUnavailableError if it does not
        answer in time or not with that."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        _, raw = await self.ask_raw(node, method, route, body, timeout=timeout, bytes_max=ANSWER_BYTES_MAX)
        try:
            document = json.loads(raw) if raw else {}
        except ValueError as error:
            raise DaemonUnavailableError(f"node {node.node_id} answers {route} with what is not JSON") from error
        if not isinstance(document, dict):
            raise DaemonUnavailableError(f"node {node.node_id} answers {route} with what is no JSON object")
        return document

    async def ask_raw(
        self,
        node: NodeRecord,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: aiohttp.ClientTimeout,
        bytes_max: int,
    ) -> tuple[dict[str, str], bytes]:
        """Return the headers and at most `bytes_max` bytes that `node` answers. Raises as `ask` does."""
        data = b"" if body is None else json.dumps(body).encode()
        signer = self._cluster.signer
        headers = {} if signer is None else signer.headers(method, route, node.node_id, body=data)
        url = URL(f"http://{node.address}{route}", encoded=True)
        try:
            async with self._opened().request(
                method, url, data=data or None, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                raw = await _read(answer, bytes_max)
                status, got = answer.status, {name.lower(): value for name, value in answer.headers.items()}
        except TimeoutError as error:
            raise DaemonUnavailableError(f"node {node.node_id} did not answer in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise DaemonUnavailableError(f"node {node.node_id} does not answer: {why}") from error
        if status != 200:
            raise _refusal(node, raw, status)
        return got, raw

    async def ask_all(
        self, nodes: Iterable[NodeRecord], question: Callable[[NodeRecord], Awaitable[T]]
    ) -> list[T | OrchestraError]:
        """Put a question to each of `nodes` at the same time; return answers, or errors, in their order."""

        async def one(node: NodeRecord) -> T | OrchestraError:
            try:
                return await question(node)
            except OrchestraError as error:
                return error

        return list(await asyncio.gather(*(one(node) for node in nodes)))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=_CONNECTIONS_PER_NODE)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._session


async def _read(answer: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    raw = bytearray()
    async for piece in answer.content.iter_any():
        raw += piece
        if len(raw) > bytes_max:
            raise ValueError(f"an answer of over {bytes_max} bytes")
    return bytes(raw)


def _refusal(node: NodeRecord, raw: bytes, status: int) -> OrchestraError:
    """The error that the node answered with, or that it did not answer as a node does."""
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict) or "code" not in document:
        return DaemonUnavailableError(f"node {node.node_id} answers with status {status}")
    return from_wire(document)
