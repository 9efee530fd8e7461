"""Membership by probes: the drivers `static` and `dns` against real HTTP servers that answer, hang, lie and go."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from orchestra.cluster.membership import Connect, Disconnect
from orchestra.cluster.probing import ProbeSettings, ProbingDriver, listed, resolved, system_addresses
from orchestra.cluster.records import NodeRecord, encode_record
from orchestra.units import GIB
from tests.support.members import free_port, running

pytestmark = pytest.mark.system

SETTINGS = ProbeSettings(every_s=0.05, timeout_s=0.3, silent_max=2)
OWN = NodeRecord("a", "127.0.0.1:1", 100 * GIB)


class Peer:
    """The health page of another node; `body` is what it answers, None to hang."""

    def __init__(self, node_id: str, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.record = NodeRecord(node_id, self.address, 50 * GIB, incarnation=1, instance="a peer's")
        self.body: bytes | None = encode_record(self.record)
        self.probes = 0
        self.released = asyncio.Event()

    async def answer(self, _: web.Request) -> web.Response:
        self.probes += 1
        if self.body is None:
            await self.released.wait()
        return web.Response(body=self.body)


@asynccontextmanager
async def peer(node_id: str, port: int | None = None) -> AsyncIterator[Peer]:
    """Serve a peer's health page for as long as the context."""
    served = Peer(node_id, free_port() if port is None else port)
    app = web.Application()
    app.router.add_get("/healthz", served.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(served.address.split(":")[1])).start()
    try:
        yield served
    finally:
        served.released.set()
        await runner.cleanup()


async def test_a_listed_node_that_answers_is_on_the_ring_and_one_that_goes_is_off() -> None:
    """Own node at once; the peer when it answers; gone after two silent probes, back after one answer."""
    async with peer("b") as served:
        port = int(served.address.split(":")[1])
        driver = ProbingDriver(OWN, listed([OWN.address, served.address]), SETTINGS)
        async with running(OWN, driver) as member:
            await member.wait_for_names("a", "b")
            assert member.member.membership.ring.revision == 2
            served.body = None  # hangs
            await member.wait_for_names("a")
            assert member.heard(Disconnect) == 1
            served.released.set()
            served.body = encode_record(served.record)
            await member.wait_for_names("a", "b")
    async with peer("b", port) as again, running(OWN, ProbingDriver(OWN, listed([again.address]), SETTINGS)) as member:
        await member.wait_for_names("a", "b")


async def test_a_hung_peer_costs_the_probes_of_others_its_timeout_and_no_more() -> None:
    """While one peer hangs for good, the other is seen to join and to change its capacity."""
    async with peer("b") as hung, peer("c") as well:
        hung.body = None
        async with running(OWN, ProbingDriver(OWN, listed([hung.address, well.address]), SETTINGS)) as member:
            await member.wait_for_names("a", "c")
            well.body = encode_record(NodeRecord("c", well.address, 70 * GIB, incarnation=1))
            await member.wait_until(lambda: member.member.membership.ring.nodes[1].weight == 70 * GIB)
            assert hung.probes >= 1
            assert member.names == ["a", "c"]


@pytest.mark.parametrize("body", [b'{"status": "ok"}', b"<html>", b"x" * 100_000, b"\xff"])
async def test_a_page_that_is_no_record_is_silence(body: bytes) -> None:
    """Another server at the address, an older version, a page without end: none of them is a node."""
    async with peer("b") as lying, peer("c") as well:
        lying.body = body
        async with running(OWN, ProbingDriver(OWN, listed([lying.address, well.address]), SETTINGS)) as member:
            await member.wait_for_names("a", "c")
            assert member.heard(Connect) == 1


async def test_another_process_under_this_nodes_name_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Two nodes that were given one node_id: the log says where the other one is, once, and it is on no ring."""
    async with peer("a") as twin:
        driver = ProbingDriver(OWN, listed([twin.address]), SETTINGS)
        async with running(OWN, driver) as heard:
            async with asyncio.timeout(10):
                while twin.probes < 3:
                    await asyncio.sleep(0)
            assert heard.names == ["a"]
            assert heard.heard(Connect) == 0
    said = [record.getMessage() for record in caplog.records if "is called a as well" in record.getMessage()]
    assert len(said) == 1
    assert twin.address in said[0]


async def test_a_name_that_resolves_to_other_addresses_is_followed() -> None:
    """Nodes come and go with the name's addresses; while it does not resolve the last ones stay."""
    async with peer("b") as second, peer("c") as third:
        found: list[Sequence[str] | OSError] = [[second.address]]

        def resolve(name: str, port: int) -> Sequence[str]:
            assert (name, port) == ("orchestra.test", 7420)
            if isinstance(found[-1], OSError):
                raise found[-1]
            return found[-1]

        driver = ProbingDriver(OWN, resolved("orchestra.test", 7420, resolve), SETTINGS)
        async with running(OWN, driver) as member:
            await member.wait_for_names("a", "b")
            found.append([second.address, third.address])
            await member.wait_for_names("a", "b", "c")
            found.append(socket.gaierror(-2, "Name or service not known"))
            third.body = encode_record(NodeRecord("c", third.address, 70 * GIB))
            await member.wait_until(lambda: member.member.membership.ring.nodes[2].weight == 70 * GIB)
            found.append([third.address])
            await member.wait_for_names("a", "c")


async def test_the_systems_resolver_is_asked() -> None:
    """`localhost` resolves to addresses of this machine, with the port; a name that cannot exist is an OSError."""
    assert "127.0.0.1:7420" in system_addresses("localhost", 7420)
    with pytest.raises(OSError, match=r"."):
        system_addresses("does-not-exist.invalid", 7420)
    addresses = await resolved("127.0.0.1", 7420)()
    assert list(addresses) == ["127.0.0.1:7420"]


async def test_membership_does_not_wait_for_threads_that_are_busy_with_data() -> None:
    """With every default thread of the loop taken, the name is resolved and the peer is probed all the same."""
    loop = asyncio.get_running_loop()
    held = threading.Event()
    with ThreadPoolExecutor(1) as busy:
        loop.set_default_executor(busy)
        try:
            taken = [loop.run_in_executor(None, held.wait) for _ in range(3)]
            async with peer("b") as served:
                driver = ProbingDriver(OWN, resolved("n", 1, lambda name, port: [served.address]), SETTINGS)
                async with running(OWN, driver) as member:
                    await member.wait_for_names("a", "b")
            assert not any(one.done() for one in taken)
        finally:
            held.set()
