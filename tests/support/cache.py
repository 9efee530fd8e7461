"""A cache directory with its block store, opened as a daemon opens it, for tests of blocks without a daemon.

Blocks are 4 KiB and extents 16 KiB, so that a few kilobytes cross every border.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestra.blocks.accounts import Accounts, SpaceLimit
from orchestra.blocks.disk import Disk
from orchestra.blocks.eviction import make_policy
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.index import BlockIndex
from orchestra.blocks.layout import empty_tmp, prepare
from orchestra.blocks.reader import LocalObject
from orchestra.blocks.rules import Origin
from orchestra.blocks.scan import adopt_ready, find_files
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.units import GIB
from orchestra.values import ObjectId

BLOCK = 4096
EXTENT = 4 * BLOCK
GEOMETRY = Geometry(BLOCK, EXTENT)
BOOT = b"this boot".ljust(16)
LATER_BOOT = b"a later boot".ljust(16)


def data_of(name: str, size_bytes: int) -> bytes:
    """Bytes that differ for every name and at every offset."""
    piece = f"<{name}>".encode()
    return b"".join(piece + at.to_bytes(8, "big") for at in range(size_bytes // (len(piece) + 8) + 1))[:size_bytes]


def digest_of(name: str) -> str:
    """The digest of an object of that name."""
    return ObjectId("test://", name, "v").digest()


def full_disk(*, free_bytes: int, total_bytes: int = GIB) -> Callable[[], os.statvfs_result]:
    """A statvfs that always says so many bytes are free."""
    values = (1, 1, total_bytes, free_bytes, free_bytes, 1_000_000, 1_000_000, 1_000_000, 0, 255)
    return lambda: os.statvfs_result(values)


class Cache:
    """One opening of a cache directory; `crash` and `close` end it, a new Cache on the same root is the next daemon."""

    def __init__(
        self,
        root: Path,
        *,
        capacity_bytes: int = GIB,
        free_space_ratio: float = 0.0,
        statvfs: Callable[[], os.statvfs_result] | None = None,
        disk: Disk | None = None,
        boot_id: bytes = BOOT,
        eviction: str = "lru",
        clock: Clock | None = None,
    ) -> None:
        self.boot_id = boot_id
        self.layout, self.geometry = prepare(root, GEOMETRY)
        adopted_count = adopt_ready(self.layout, self.geometry)
        empty_tmp(self.layout)
        self.index = BlockIndex(self.layout.index, boot_id=boot_id)
        rows, self.was_clean = self.index.load()
        limit = SpaceLimit(capacity_bytes, free_space_ratio, statvfs or (lambda: os.statvfs(root)))
        new_policy = partial(make_policy, eviction)
        self.accounts = Accounts(new_policy(), limit, self.index, make_policy=new_policy, clock=clock)
        self.accounts.load(rows)
        self.store = BlockStore(self.layout, self.geometry, self.accounts, boot_id=boot_id, disk=disk)
        if adopted_count or not self.was_clean:
            self.store.recount()
        self.store.flush()

    def put(self, name: str, data: bytes) -> None:
        """Write all blocks of an object."""
        for block in range(self.geometry.block_count(len(data))):
            self.put_block(name, data, block)

    def put_block(self, name: str, data: bytes, block: int) -> None:
        """Write one block of an object."""
        span = self.geometry.block_range(len(data), block)
        self.store.write_block(digest_of(name), len(data), block, data[span.start : span.stop])

    def offer(self, name: str, data: bytes, block: int, origin: Origin) -> bool:
        """Write one block as the engine does: if it would be kept. Returns whether it was."""
        if not self.store.admits(digest_of(name), len(data), block, origin):
            return False
        self.put_block(name, data, block)
        return True

    def open(self, name: str, size_bytes: int, *, verify_always: bool = False) -> LocalObject:
        """A reader of an object."""
        return LocalObject(
            self.layout,
            self.geometry,
            digest_of(name),
            size_bytes,
            boot_id=self.boot_id,
            verify_always=verify_always,
        )

    def get(self, name: str, size_bytes: int) -> bytes | None:
        """The whole object as a reader sees it, None if anything is missing."""
        local = self.open(name, size_bytes)
        try:
            buffer = bytearray(size_bytes)
            return None if local.readinto(0, memoryview(buffer)) is None else bytes(buffer)
        finally:
            local.close()

    def missing(self, name: str, size_bytes: int) -> list[int]:
        """The blocks that a reader does not find."""
        local = self.open(name, size_bytes)
        try:
            return [
                block
                for block in range(self.geometry.block_count(size_bytes))
                if local.missing_blocks(self.geometry.block_range(size_bytes, block))
            ]
        finally:
            local.close()

    def verify(self, name: str, size_bytes: int) -> int:
        """Have every file of the object verified; returns how many blocks were bad."""
        blocks = range(self.geometry.block_count(size_bytes))
        firsts = [run.start for _, run in self.geometry.extents_of(blocks)]
        return sum(self.store.verify(digest_of(name), size_bytes, block) for block in firsts)

    def check(self) -> None:
        """The accounts say what the files are; nothing is unfinished and nothing is half."""
        found = find_files(self.layout)
        accounts = {name: self.accounts.size_of(name) for name in self.accounts.names()}
        assert accounts == found.sizes, f"accounts {accounts} are not files {found.sizes}"
        assert self.accounts.used_bytes == sum(found.sizes.values())
        assert not found.halves and not found.strangers
        assert not list(self.layout.tmp.iterdir())

    def close(self) -> None:
        """Stop as a daemon does that was told to."""
        assert self.store.close()
        self.index.mark_clean(True)
        self.index.close()

    def crash(self) -> None:
        """Let go of everything as a dead process does: nothing more is written."""
        self.index.close()
