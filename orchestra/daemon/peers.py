"""What other nodes ask of this one: blocks that it holds, or fetches for them.

Owns: checking what they ask for, reading through, opening the files. Leaves to others: HTTP (api.peer), fetching
(engine), who asks whom (fetch.shared).
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.reader import FilePlace, LocalObject
from orchestra.blocks.store import BlockStore
from orchestra.cluster.peer_wire import Cause, ExtentPart, PeerError
from orchestra.engine.engine import Engine, Wanted
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import OrchestraError, StaleObjectError
from orchestra.fetch.budget import Priority
from orchestra.namespace.paths import normalize_path
from orchestra.values import ByteRange, ObjectInfo

# How long a node waits, for another node, for a flight that may itself wait for a node: see fetch.shared. A dead owner
# is given up within 2.5 s.
ELSEWHERE_S = 3.0
# Blocks that are sent at one time; the disk and the network are each one.
_THREADS = 8
# A peer that takes nothing for so long is left to the loop, so that no peer ever holds a thread by being slow or dead.
# On a link of 1 Gbit/s a full send buffer of 4 MiB is empty after 32 ms.
_PAUSE_MAX_MS = 50


class HeldPart:
    """Bytes in an open file; closed by whoever asked, and kept open while a thread sends from it."""

    __slots__ = ("_local", "_lock", "_users_count", "place", "places")

    def __init__(self, local: LocalObject, place: FilePlace, places: int) -> None:
        """`places` tell who else holds it: see cluster.heat."""
        self._local = local
        self._lock = threading.Lock()
        self._users_count = 1
        self.place = place
        self.places = places

    def use(self) -> None:
        """Keep the file open until `close` was called once more."""
        with self._lock:
            self._users_count += 1

    def close(self) -> None:
        """Let go of the file. Any thread."""
        with self._lock:
            self._users_count -= 1
            is_unused = not self._users_count
        if is_unused:
            self._local.close()


class CountsReads(Protocol):
    """What is told of each part that other nodes ask for; see daemon.nodes.hot."""

    def asked(self, part: ExtentPart) -> None:
        """Another node asks for that part."""
        ...

    def places_of(self, part: ExtentPart) -> int:
        """Who else holds it because it is read so often; see cluster.heat."""
        ...


class PeerService:
    """Answers for this node's blocks. One event loop."""

    def __init__(
        self,
        engine: Engine,
        blocks: BlockStore,
        geometry: Geometry,
        is_first_owner: Callable[[str, int], bool],
        read_small: Callable[[str, int], bytes | None],
    ) -> None:
        """`read_small` gives a whole small object (digest and size) if it is here and right. `is_first_owner` says of
        an extent (digest and index) whether this node reads it through without asking others to."""
        self._engine = engine
        self._blocks = blocks
        self._geometry = geometry
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="for-peers")
        self._is_first_owner = is_first_owner
        self._read_small = read_small
        # Set where there are copies of what is read often.
        self.hot: CountsReads | None = None

    def places_of(self, part: ExtentPart) -> int:
        """Who else holds that part because it is read so often, as the answer tells the asker."""
        return 0 if self.hot is None else self.hot.places_of(part)

    def held(self, part: ExtentPart) -> HeldPart | None:
        """Return those blocks if they are here now. Raises PeerError for what cannot be asked for."""
        blocks = self._blocks_of(part)
        if self.hot is not None:
            self.hot.asked(part)
        return self._open(part, blocks)

    async def bring(self, part: ExtentPart, *, suspect: bool = False) -> HeldPart:
        """Return those blocks, fetched first if they are not here. Raises PeerError; cancelling leaves fetches running
        that others may wait for."""
        blocks = self._blocks_of(part)
        if part.held_only:
            raise PeerError(Cause.NOT_HELD, "not held")
        wanted = self._wanted(part, blocks, is_for_peer=True)
        limit_s = None if self._is_first_owner(part.digest, part.extent_index) else ELSEWHERE_S
        try:
            async with asyncio.timeout(limit_s):
                is_kept = await self._engine.ensure(
                    wanted, Priority(min(part.priority, max(Priority))), suspect=suspect
                )
        except TimeoutError as error:
            raise PeerError(Cause.ELSEWHERE, "it waits for another node itself") from error
        except StaleObjectError as error:
            raise PeerError(Cause.STALE, str(error)) from error
        except OrchestraError as error:
            raise PeerError(Cause.STORE_FAILED, str(error)) from error
        opened = self._open(part, blocks) if is_kept else None
        if opened is None:
            raise PeerError(Cause.NOT_KEPT, "it cannot be kept here")
        return opened

    async def ensure(self, part: ExtentPart, priority: Priority) -> bool:
        """Make those blocks present, for this node's own sake; False if there is no room to keep them. Raises
        PeerError, what the engine raises."""
        return await self._engine.ensure(self._wanted(part, self._blocks_of(part), is_for_peer=False), priority)

    async def look_at(self, part: ExtentPart) -> int | None:
        """Check what is held of the extent of those blocks, and drop all of it if a block is bad. Return how many are,
        None where nothing is held. Raises PeerError."""
        first = self._blocks_of(part).start
        if not self._blocks.holds(part.digest, part.size_bytes, first):
            return None
        verify = partial(self._blocks.verify, part.digest, part.size_bytes, first, is_doubted=True)
        bad = await asyncio.get_running_loop().run_in_executor(self._engine.writers, verify)
        return bad if bad or self._blocks.holds(part.digest, part.size_bytes, first) else None

    def _wanted(self, part: ExtentPart, blocks: range, *, is_for_peer: bool) -> Wanted:
        size = part.size_bytes
        start = self._geometry.block_range(size, blocks.start).start
        stop = self._geometry.block_range(size, blocks.stop - 1).stop
        info = ObjectInfo(part.object_id.key, size, 0, part.object_id.version)
        return Wanted(self._mount_of(part.object_id.store_id), info, ByteRange(start, stop), is_for_peer=is_for_peer)

    def may_hold(self, part: ExtentPart) -> bool:
        """Whether there is a file that may hold that small object. Costs no system call. Raises PeerError for what
        cannot be asked for."""
        key = part.object_id.key
        if not self._geometry.is_small(part.size_bytes) or f"/{key}" != _normal(key):
            raise PeerError(Cause.REFUSED, "no such object of one block")
        if self.hot is not None:
            self.hot.asked(part)
        return self._blocks.holds(part.digest, part.size_bytes, 0)

    async def read_held(self, parts: Sequence[ExtentPart]) -> list[bytes | None]:
        """Return the bytes of those small objects that are here; the disk is waited for in another thread."""
        for part in parts:
            self._blocks.touch(part.digest, 0)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read_all, parts)

    async def bring_small(self, part: ExtentPart) -> bytes:
        """As `bring`, the bytes of a small object."""
        (await self.bring(part)).close()
        data = self._read(part)
        if data is None:  # what is here and cannot be read is damaged, and fetched anew
            (await self.bring(part, suspect=True)).close()
            data = self._read(part)
        if data is None:
            raise PeerError(Cause.NOT_KEPT, "it left as soon as it came")
        return data

    def _read_all(self, parts: Sequence[ExtentPart]) -> list[bytes | None]:
        return [self._read(part) for part in parts]

    def _read(self, part: ExtentPart) -> bytes | None:
        return self._read_small(part.digest, part.size_bytes)

    async def send(self, socket_fd: int, held: HeldPart) -> int:
        """Send as many of the bytes as the peer takes without a pause; return how many. A thread does it: the disk may
        have to be waited for, and a loop that also serves others wakes up for every piece."""
        # Both descriptors are the thread's own: when this is cancelled, what is closed here could be another file's
        # number before the thread is done.
        duplicate = os.dup(socket_fd)
        held.use()

        def done(_: object) -> None:
            os.close(duplicate)
            held.close()

        sending = self._threads.submit(_send_quickly, duplicate, held.place)
        sending.add_done_callback(done)
        return await asyncio.wrap_future(sending)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False)

    async def warm(self, place: FilePlace) -> None:
        """Return when the bytes are in the page cache: what sends them would hold up everybody while the disk reads."""
        if _is_resident(place):
            return
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, os.pread, place.fd, place.length, place.offset)

    def _open(self, part: ExtentPart, blocks: range) -> HeldPart | None:
        if not self._blocks.holds(part.digest, part.size_bytes, blocks.start):
            return None
        self._blocks.touch(part.digest, blocks.start)
        local = self._blocks.open_object(part.digest, part.size_bytes)
        place = local.place_of(blocks)
        if place is None:
            local.close()
            return None
        return HeldPart(local, place, self.places_of(part))

    def _blocks_of(self, part: ExtentPart) -> range:
        """The blocks of the object that are asked for. Raises PeerError unless they are whole ones of that extent, as
        this node cuts objects."""
        geometry, span = self._geometry, part.file_range
        key = part.object_id.key
        if not 0 <= part.extent_index < geometry.extent_count(part.size_bytes) or f"/{key}" != _normal(key):
            raise PeerError(Cause.REFUSED, "no such extent")
        length = geometry.extent_length(part.size_bytes, part.extent_index)
        is_whole = span.start % geometry.block_size_bytes == 0 and (
            span.stop % geometry.block_size_bytes == 0 or span.stop == length
        )
        if not span.length or span.stop > length or not is_whole:
            raise PeerError(Cause.REFUSED, f"these are no blocks of {geometry.block_size_bytes} bytes")
        first = part.extent_index * geometry.extent_size_bytes
        return geometry.blocks_of(ByteRange(first + span.start, first + span.stop))

    def _mount_of(self, store_id: str) -> OpenedMount:
        for mount in self._engine.mounts:
            if mount.opened is not None and mount.opened.store_id == store_id:
                return mount
        raise PeerError(Cause.NOT_MOUNTED, f"{store_id} is not mounted on this node")


def _priority_of(part: ExtentPart) -> Priority:
    return Priority(min(part.priority, Priority.BACKGROUND))


def _normal(key: str) -> str:
    try:
        return normalize_path(f"/{key}")
    except OrchestraError:
        return ""


def _send_quickly(socket_fd: int, place: FilePlace) -> int:
    sent = 0
    poll = select.poll()
    poll.register(socket_fd, select.POLLOUT)
    while sent < place.length:
        try:
            count = os.sendfile(socket_fd, place.fd, place.offset + sent, place.length - sent)
        except BlockingIOError:
            if not poll.poll(_PAUSE_MAX_MS):
                break
            continue
        if not count:
            break
        sent += count
    return sent


def _is_resident(place: FilePlace) -> bool:
    """Whether the first, the middle and the last byte can be read without the disk; also where that cannot be told."""
    one = bytearray(1)
    try:
        for at in (0, place.length // 2, place.length - 1):
            os.preadv(place.fd, [one], place.offset + at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot tell
        return True
    return True
