"""The drivers `static` and `dns`: addresses from a list or a name, and who answers there.

Owns: resolving the name again and again, the probes (GET /healthz) and their connections. Leaves to others: how many
silent probes make a node lost (liveness), the ring (membership).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp

from orchestra.cluster.contract import Deliver, Errand
from orchestra.cluster.liveness import Liveness
from orchestra.cluster.membership import Changed, SourceLost
from orchestra.cluster.records import RECORD_BYTES_MAX, NodeRecord, parse_record

Addresses = Callable[[], Awaitable[Sequence[str]]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """A node that died is off the ring after at most `silent_max` * (`every_s` + `timeout_s`): 9 s."""

    every_s: float = 2.0
    timeout_s: float = 1.0
    silent_max: int = 3


class ProbingDriver:
    """Probes every address of a list that may change. Without leases: each node judges for itself."""

    has_lease = False

    def __init__(self, own: NodeRecord, addresses: Addresses, settings: ProbeSettings | None = None) -> None:
        self._own = own
        self._addresses = addresses
        self._settings = ProbeSettings() if settings is None else settings
        self._liveness = Liveness(own, self._settings.silent_max)
        self._session: aiohttp.ClientSession | None = None
        self._namesakes: set[str] = set()

    async def run(self, deliver: Deliver) -> None:
        """See MembershipDriver. An address list that cannot be had leaves the last one in use."""
        deliver(Changed(0, seen=(self._own,)))
        await self._follow_addresses(deliver)
        # Apart from the probes: a resolver may hang for half a minute, and its silence says nothing of any node.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again_and_again(self._follow_addresses, deliver))
            tasks.create_task(self._again_and_again(self._probe_all, deliver))

    async def _again_and_again(self, act: Callable[[Deliver], Awaitable[None]], deliver: Deliver) -> None:
        while True:
            await act(deliver)
            await asyncio.sleep(self._settings.every_s)

    async def _follow_addresses(self, deliver: Deliver) -> None:
        try:
            addresses = await self._addresses()
        except OSError as error:
            deliver(SourceLost(f"the addresses of the nodes cannot be resolved: {error}"))
            return
        self._deliver(deliver, self._liveness.keep(addresses))

    async def _probe_all(self, deliver: Deliver) -> None:
        async with asyncio.TaskGroup() as probes:
            for address in self._liveness.to_probe:
                probes.create_task(self._probe(address, deliver))

    async def perform(self, errand: Errand, deliver: Deliver) -> None:
        """Never asked for: there is no lease."""

    async def close(self) -> None:
        """See MembershipDriver; others notice by their probes."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _probe(self, address: str, deliver: Deliver) -> None:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
            # No limit of connections: a probe that waited for another would count as silent.
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        try:
            async with self._session.get(f"http://{address}/healthz", allow_redirects=False) as answer:
                body = await answer.content.read(RECORD_BYTES_MAX + 1)
                while len(body) <= RECORD_BYTES_MAX and (more := await answer.content.read(RECORD_BYTES_MAX)):
                    body += more
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            record = parse_record(body)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            _log.debug("no answer from %s: %s", address, error or type(error).__name__)
            self._deliver(deliver, self._liveness.silent(address))
            return
        self._check_name(address, record)
        self._deliver(deliver, self._liveness.answered(address, record))

    def _check_name(self, address: str, record: NodeRecord) -> None:
        """Say, once, that another process goes by this node's name: both would think that they own the same extents."""
        own = self._own
        if record.node_id != own.node_id or record.instance == own.instance or address in self._namesakes:
            return
        self._namesakes.add(address)
        _log.error(
            "the node at %s is called %s as well, as this one at %s: give one of them another cluster.node_id",
            *(address, own.node_id, own.address),
        )

    @staticmethod
    def _deliver(deliver: Deliver, changed: Changed | None) -> None:
        if changed is not None:
            deliver(changed)


def listed(nodes: Sequence[str]) -> Addresses:
    """Return the source of `static`: always the same addresses."""

    async def addresses() -> Sequence[str]:
        return nodes

    return addresses


def resolved(name: str, port: int, resolve: Callable[[str, int], Sequence[str]] | None = None) -> Addresses:
    """Return the source of `dns`: what `name` resolves to now. `resolve` blocks and raises OSError (default: the
    system's resolver)."""
    # A thread of its own: the loop's default ones may all be busy with data.
    thread = ThreadPoolExecutor(1, thread_name_prefix="cluster-dns")
    look_up = system_addresses if resolve is None else resolve

    async def addresses() -> Sequence[str]:
        return await asyncio.get_running_loop().run_in_executor(thread, look_up, name, port)

    return addresses


def system_addresses(name: str, port: int) -> list[str]:
    """Return every address of `name` as "host:port", sorted. Raises OSError."""
    found = {info[4][0] for info in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}
    return sorted(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}" for host in found)
