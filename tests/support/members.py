"""Members of a cluster in one event loop, what each was told, and a real etcd for them."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from orchestra.clock import SystemClock
from orchestra.cluster.contract import MembershipDriver
from orchestra.cluster.member import ClusterMember, News
from orchestra.cluster.records import NodeRecord

WAIT_S = 20.0


class Heard:
    """A member that runs, and everything that it told."""

    def __init__(self, own: NodeRecord, driver: MembershipDriver) -> None:
        self.news: list[News] = []
        self._is_new = asyncio.Event()
        self.member = ClusterMember(own, driver, SystemClock(), self._tell)

    def _tell(self, news: News) -> None:
        self.news.append(news)
        self._is_new.set()

    @property
    def names(self) -> list[str]:
        """The nodes of its ring."""
        return [node.node_id for node in self.member.membership.ring.nodes]

    def heard(self, kind: type[News]) -> int:
        """How many news of `kind` there were."""
        return sum(isinstance(one, kind) for one in self.news)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds, which is looked at with every piece of news."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._is_new.clear()
                await self._is_new.wait()

    async def wait_for_names(self, *names: str) -> None:
        await self.wait_until(lambda: self.names == list(names))


@asynccontextmanager
async def running(own: NodeRecord, driver: MembershipDriver) -> AsyncIterator[Heard]:
    """Run a member for as long as the context."""
    heard = Heard(own, driver)
    task = asyncio.create_task(heard.member.run())
    try:
        yield heard
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EtcdServer:
    """A real etcd of one member, its data below `folder`; elsewhere than on loopback, `prefix` is a command that runs
    another there (tests/support/cluster_network.py), and who asks whether it is healthy must be there, too."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self._folder = folder
        self._host = host
        self._prefix = prefix
        self.port = free_port()
        self._peer_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self.port}"

    def start(self) -> None:
        """Start it on its port and data, and return when it is healthy."""
        peer = f"http://127.0.0.1:{self._peer_port}"
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._prefix, "etcd", "--name", "one", "--data-dir", str(self._folder / "data")),
                    *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"one={peer}", "--logger", "zap"),
                ],
                stdout=log,
                stderr=log,
            )
        for _ in range(400):
            with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.endpoint}/health") as answer:
                if answer.status == 200:
                    return
            with suppress(subprocess.TimeoutExpired):  # ends early if it died
                self._process.wait(0.05)
                raise AssertionError((self._folder / "etcd.log").read_text()[-2000:])
        raise AssertionError("etcd did not become healthy")

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def etcd_server(folder: Path) -> Iterator[EtcdServer]:
    """Run a real etcd for as long as the context."""
    server = EtcdServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
