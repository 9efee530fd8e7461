"""Clients of a node beside a dict, step by step, while an outside writer replaces and deletes objects in the store.

The dict remembers every state the store was in, and when. What a client says about a path must have been true at some
moment within the mount's freshness; `refresh` must say what is true now; a read returns the bytes of exactly one
version, or StaleObjectError, after which the path can be opened again. The node is stopped, restarted and made to evict
in between. The clock moves only when told to.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from orchestra.client.handle import NodeHandle
from orchestra.client.node import NodeClient
from orchestra.clock import ManualClock
from orchestra.config import CacheConfig, Config, DaemonConfig, MountConfig
from orchestra.errors import NotFoundError, StaleObjectError
from orchestra.units import GIB
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import ThreadNode
from tests.support.versioned_store import VersionedStore

KEYS = ["a", "d/x", "d/y"]
SIZES = [0, 100, BLOCK + 1, EXTENT + 5]
FRESHNESS = [0.0, 10.0, 10.0, 10.0, float("inf")]
# A program reads what it has just looked at, and so on: most steps are about the key of the step before.
SAME = None
KEY = st.sampled_from([SAME, SAME, SAME, *KEYS])


@dataclass(frozen=True)
class State:
    """What the store held from a moment on: version and bytes by key."""

    since_ns: int
    objects: dict[str, tuple[str, bytes]]


class ClientMachine(RuleBasedStateMachine):
    """One node, two clients, one writer."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="orc-model-", dir=base))
        self.clock = ManualClock()
        self.store = VersionedStore()
        self.states = [State(self.clock.now_ns(), {})]
        self.handles: list[tuple[NodeHandle, bytes]] = []
        self.node: ThreadNode | None = None
        self.last_key = KEYS[0]

    @initialize(freshness_s=st.sampled_from(FRESHNESS))
    def begin(self, freshness_s: float) -> None:
        self.freshness_s = freshness_s
        self.config = Config(
            CacheConfig(
                self.root, size_bytes=GIB, free_space_ratio=0.0, block_size_bytes=BLOCK, extent_size_bytes=EXTENT
            ),
            (MountConfig("/data", ("memory://",), freshness_s=freshness_s, prefetch="none"),),
            DaemonConfig(autostart=False),
        )
        for key in KEYS:
            self.put(key, BLOCK + 1)
        self._start()

    def _start(self) -> None:
        self.node = ThreadNode(self.config, {"memory://": self.store}, self.clock)
        self.clients: list[NodeClient] = [self.node.client(), self.node.client()]

    def _key(self, key: str | None) -> str:
        self.last_key = key or self.last_key
        return self.last_key

    # -- the dict --------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        now = {key: (stored.info.version, stored.data) for key, stored in self.store.objects.items()}
        self.states.append(State(self.clock.now_ns(), now))

    @property
    def now(self) -> dict[str, tuple[str, bytes]]:
        return self.states[-1].objects

    def _recent(self) -> list[dict[str, tuple[str, bytes]]]:
        """The states that were true at some moment no longer ago than the freshness."""
        oldest_ns = self.clock.now_ns() - self.freshness_s * 1e9
        ends = [state.since_ns for state in self.states[1:]] + [self.clock.now_ns()]
        return [state.objects for state, end_ns in zip(self.states, ends, strict=True) if end_ns >= oldest_ns]

    def _version_of(self, key: str, version: str) -> bytes:
        return next(
            data
            for state in self.states
            for one, (known, data) in state.objects.items()
            if one == key and known == version
        )

    # -- the outside writer and the clock --------------------------------------------------------------------------

    @rule(key=KEY, size=st.sampled_from(SIZES))
    def put(self, key: str | None, size: int) -> None:
        key = self._key(key)
        self.store.put(key, data_of(f"{key}{len(self.states)}", size))
        self._changed()

    @rule(key=KEY)
    def delete(self, key: str | None) -> None:
        self.store.delete(self._key(key))
        self._changed()

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    # -- the node --------------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self._stop()
        self._start()

    @rule(blocks=st.integers(1, 10))
    def evict(self, blocks: int) -> None:
        assert self.node is not None
        self.node.node.blocks.evict(blocks * BLOCK)

    # -- clients ---------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), key=KEY, refresh=st.booleans())
    def stat(self, which: int, key: str | None, refresh: bool) -> None:
        """What is said about a path was true within the freshness; with `refresh`, it is true now."""
        key = self._key(key)
        allowed = [state.get(key, (None, b""))[0] for state in ([self.now] if refresh else self._recent())]
        try:
            entry = self.clients[which].stat(f"/data/{key}", refresh=refresh)
        except NotFoundError:
            assert None in allowed
        else:
            assert entry.version in allowed
            assert entry.size_bytes == len(self._version_of(key, entry.version))

    @rule(which=st.integers(0, 1), refresh=st.booleans())
    def stat_directory(self, which: int, refresh: bool) -> None:
        """A directory is there as long as keys lie below it."""
        allowed = [_names(state, "d/") != {} for state in ([self.now] if refresh else self._recent())]
        try:
            assert self.clients[which].stat("/data/d", refresh=refresh).is_directory
            assert True in allowed
        except NotFoundError:
            assert False in allowed

    @rule(which=st.integers(0, 1), prefix=st.sampled_from(["", "d/"]), refresh=st.booleans())
    def list_directory(self, which: int, prefix: str, refresh: bool) -> None:
        """A listing is one state's, whole: never half of one and half of the next."""
        allowed = [_names(state, prefix) for state in ([self.now] if refresh else self._recent())]
        try:
            view = self.clients[which].list(f"/data/{prefix}", refresh=refresh)
        except NotFoundError:
            assert prefix
            assert {} in allowed
        else:
            assert {entry.name: entry.version for entry in view} in allowed

    @rule(which=st.integers(0, 1), key=KEY, start=st.integers(0, 9000), length=st.integers(1, 20_000))
    def read_file(self, which: int, key: str | None, start: int, length: int) -> None:
        """The bytes of one version that was there within the freshness; or stale, and then the one that is there."""
        key = self._key(key)
        try:
            self._read(which, key, start, length, self._recent())
        except StaleObjectError:
            self._read(which, key, start, length, [self.now])

    def _read(self, which: int, key: str, start: int, length: int, states: list[dict[str, tuple[str, bytes]]]) -> None:
        allowed = [state[key][1][start : start + length] if key in state else None for state in states]
        try:
            assert self.clients[which].read_file(f"/data/{key}", start, start + length) in allowed
        except NotFoundError:
            assert None in allowed

    @precondition(lambda self: len(self.handles) < 4)
    @rule(which=st.integers(0, 1), key=KEY)
    def open(self, which: int, key: str | None) -> None:
        """A handle is of one version, whatever follows."""
        key = self._key(key)
        try:
            handle = self.clients[which].open(f"/data/{key}")
        except NotFoundError:
            return
        self.handles.append((handle, self._version_of(key, handle.entry.version)))

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 3), start=st.integers(0, 20_000), length=st.integers(1, 20_000), cached=st.booleans())
    def read_handle(self, which: int, start: int, length: int, cached: bool) -> None:
        """The version that was opened, or stale; never another's bytes, however little of it is still here."""
        handle, data = self.handles[which % len(self.handles)]
        expected = data[start : start + length]
        if cached:
            buffer = bytearray(length)
            count = handle.readinto_cached(start, buffer)
            assert count is None or bytes(buffer[:count]) == expected
            return
        try:
            assert handle.read(start, length) == expected
        except StaleObjectError:
            key = handle.entry.path.removeprefix("/data/")
            assert self.now.get(key, ("gone", b""))[0] != handle.entry.version

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 3))
    def close_handle(self, which: int) -> None:
        self.handles.pop(which % len(self.handles))[0].close()

    # -- the end ---------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        while self.handles:
            self.handles.pop()[0].close()
        if self.node is not None:
            self.node.close()
            assert self.node.node.budget.used_bytes == 0

    def teardown(self) -> None:
        self._stop()
        shutil.rmtree(self.root)


def _names(state: dict[str, tuple[str, bytes]], prefix: str) -> dict[str, str]:
    """What a listing of `prefix` shows: version by name, "" for directories."""
    names: dict[str, str] = {}
    for key, (version, _) in state.items():
        if key.startswith(prefix):
            name, slash, _ = key[len(prefix) :].partition("/")
            names[name] = "" if slash else version
    return names


ClientMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestClientsBesideADict = ClientMachine.TestCase
