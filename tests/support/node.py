"""Real nodes for tests: a daemon that is a process (`DaemonNode`), and the same daemon's parts in a thread of this
process over any store and clock (`ThreadNode`). Both give clients of the node, and end with their test.

Paths are short on purpose: a unix socket lies below `root`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from orchestra.client.guest import GuestClient
from orchestra.client.node import NodeClient
from orchestra.client.process import daemon_status, start_daemon, stop_daemon
from orchestra.clock import Clock
from orchestra.config import CacheConfig, Config, DaemonConfig, FetchConfig, MountConfig, load_config
from orchestra.daemon.api.context import Activity
from orchestra.daemon.assembly import Node, assemble, disassemble
from orchestra.daemon.guests import answering_guests
from orchestra.daemon.main import answering
from orchestra.stores.contract import UnderStore
from orchestra.units import GIB, KIB

T = TypeVar("T")

# How long anything here may take before the test fails rather than hangs.
PATIENCE_S = 60.0


# -- a daemon that is a process ------------------------------------------------------------------------------------


class DaemonNode:
    """A configuration, and the daemon that runs by it. Nothing runs before `start` or a client's first miss."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path
        self.config = load_config(config_path)
        self._clients: list[NodeClient] = []

    @property
    def cache_dir(self) -> Path:
        """Where the node keeps its blocks."""
        return self.config.cache.dir

    def client(self) -> NodeClient:
        """A new client; closed at the end of the test."""
        client = NodeClient(self.config)
        self._clients.append(client)
        return client

    def start(self) -> dict[str, Any]:
        """Start the daemon unless one runs; return its status."""
        return start_daemon(self.config)

    def status(self) -> dict[str, Any]:
        """The status of the daemon that runs."""
        status = daemon_status(self.config)
        assert status is not None, "no daemon runs"
        return status

    def is_running(self) -> bool:
        """Whether a daemon answers."""
        return daemon_status(self.config) is not None

    def stop(self) -> bool:
        """Stop the daemon, if one runs, and wait until it has let go of the cache directory."""
        return stop_daemon(self.config)

    def reconfigure(self, **tables: Any) -> None:
        """Write orchestra.toml anew; see `write_config`."""
        write_config(self.config_path, **tables)
        self.config = load_config(self.config_path)

    def close(self) -> None:
        """Stop everything."""
        for client in self._clients:
            client.close()
        self.stop()


def write_config(
    path: Path,
    *,
    mounts: Sequence[Mapping[str, Any]],
    cache: Mapping[str, Any] | None = None,
    daemon: Mapping[str, Any] | None = None,
    fetch: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
) -> None:
    """Write an orchestra.toml; the cache is beside it unless `cache` says where. A mount without `uri`/`uris` fails."""
    cache = {"dir": f"{path.parent}/cache", "size": "1GiB", "free_space_ratio": 0.0, **(cache or {})}
    daemon = {"idle_timeout": "2m", **(daemon or {})}
    tables = [("[cache]", cache), ("[daemon]", daemon), ("[fetch]", fetch or {})]
    tables += [("[cluster]", cluster)] if cluster else []
    tables += [("[[mount]]", mount) for mount in mounts]
    lines = []
    for head, table in tables:
        lines += [head, *(f"{key} = {_toml(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


@contextmanager
def daemon_node(root: Path, **tables: Any) -> Iterator[DaemonNode]:
    """A node below `root`, which must exist; its daemon is stopped in the end."""
    path = root / "orchestra.toml"
    write_config(path, **tables)
    node = DaemonNode(path)
    try:
        yield node
    finally:
        node.close()


@contextmanager
def folder_daemon_node(root: Path, *, freshness: str = "60s", **tables: Any) -> Iterator[tuple[DaemonNode, Path]]:
    """A node with one mount, /data, of the folder that is given beside it."""
    folder = root / "store"
    folder.mkdir()
    mounts = [{"path": "/data", "uri": f"file://{folder}", "freshness": freshness}]
    with daemon_node(root, mounts=mounts, **tables) as node:
        yield node, folder


# -- a daemon's parts in a thread ----------------------------------------------------------------------------------


class ThreadNode:
    """A node whose loop runs in a thread: `node` is the daemon's own object, `run` does something in its loop."""

    def __init__(self, config: Config, stores: Mapping[str, UnderStore], clock: Clock | None = None) -> None:
        self.config = config
        self._stores = stores
        self._clock = clock
        self._clients: list[NodeClient] = []
        self._ready = threading.Event()
        self._error: BaseException | None = None
        # A daemon thread: a test that fails in the middle must not keep the process from ending.
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="thread-node", daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S), "the node did not start"
        if self._error is not None:
            self._thread.join()
            raise self._error

    def client(self) -> NodeClient:
        """A new client, with the node's clock; closed at the end of the test."""
        client = NodeClient(self.config, clock=self._clock)
        self._clients.append(client)
        return client

    def guest(self) -> GuestClient:
        """A new client as other users have it; `readers` has to name this user."""
        client = GuestClient(self.config, clock=self._clock)
        self._clients.append(client)
        return client

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the node's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)

    def close(self) -> None:
        """Stop as a daemon does that was told to. Idempotent."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the node does not stop"
        if self._error is not None:
            raise self._error

    async def _serve(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
            self.stop = asyncio.Event()
            self.node: Node = assemble(
                self.config, started="now", clock=self._clock, open_store=lambda settings, _: self._stores[settings.uri]
            )
            self.activity = Activity(self.node.clock)
            try:
                async with answering(self.node, self.stop, self.activity), answering_guests(self.node, self.activity):
                    self._ready.set()
                    await self.stop.wait()
            finally:
                await disassemble(self.node)
        except BaseException as error:  # noqa: BLE001 - the thread's outermost frame: raised again by whoever waits
            self._error = error
        finally:
            self._ready.set()


@contextmanager
def thread_node(
    root: Path,
    store: UnderStore | Mapping[str, UnderStore],
    *,
    clock: Clock | None = None,
    block_size_bytes: int = 4 * KIB,
    extent_size_bytes: int = 16 * KIB,
    freshness_s: float = 60.0,
    prefetch: str = "none",
    quota_bytes: int | None = None,
    cache: Mapping[str, Any] | None = None,
    fetch: FetchConfig | None = None,
    readers: tuple[str, ...] = (),
) -> Iterator[ThreadNode]:
    """A node with the store mounted at /data, or with each of several at its path. Nothing is read ahead, and blocks
    are 4 KiB, unless the test says so."""
    stores = store if isinstance(store, Mapping) else {"/data": store}
    mounts = tuple(
        MountConfig(path, (f"memory://{path}",), freshness_s=freshness_s, prefetch=prefetch, quota_bytes=quota_bytes)
        for path in stores
    )
    cache_config = CacheConfig(
        root / "cache",
        size_bytes=GIB,
        free_space_ratio=0.0,
        block_size_bytes=block_size_bytes,
        extent_size_bytes=extent_size_bytes,
    )
    config = Config(
        dataclasses.replace(cache_config, **(cache or {})),
        mounts,
        DaemonConfig(autostart=False, readers=readers),
        fetch or FetchConfig(),
    )
    node = ThreadNode(config, {f"memory://{path}": one for path, one in stores.items()}, clock)
    try:
        yield node
    finally:
        node.close()
