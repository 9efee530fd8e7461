"""Carries out read-ahead: listens to misses (engine) and to reads (access notes), and has the engine fetch ahead."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from orchestra.blocks.geometry import Geometry
from orchestra.engine.engine import Access, Engine, Wanted
from orchestra.errors import OrchestraError
from orchestra.fetch.budget import Priority
from orchestra.observe.access_ring import AccessNote
from orchestra.prefetch.readahead import Streams
from orchestra.values import ByteRange

log = logging.getLogger(__name__)

# Objects whose streams are remembered; a training job has a few hundred open.
_STREAMS_MAX = 1024


@dataclass(slots=True)
class _Followed:
    wanted: Wanted
    streams: Streams


class PrefetchRunner:
    """Follows streams. One event loop; every task is waited for by `close`."""

    def __init__(self, engine: Engine, geometry: Geometry) -> None:
        self._engine = engine
        self._geometry = geometry
        self._followed: OrderedDict[bytes, _Followed] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.blocks_asked = 0
        engine.on_access(self._on_miss)

    @property
    def is_following(self) -> bool:
        """Whether some stream still has blocks to fetch, so that access notes are worth reading often."""
        return bool(self._tasks)

    def on_notes(self, notes: Iterable[AccessNote]) -> None:
        """Reads that were served from disk move streams on as well."""
        for note in notes:
            followed = self._followed.get(note.digest)
            if followed is not None:
                self._advance(followed, range(note.first_block, note.first_block + note.block_count))

    def ahead(self, wanted: Wanted) -> None:
        """Fetch that range in the background: the reader is on its way there."""
        if wanted.byte_range.length:
            self._start(wanted)

    def _on_miss(self, access: Access) -> None:
        wanted = access.wanted
        if wanted.mount.config.prefetch == "none" or self._geometry.is_small(wanted.info.size_bytes):
            return
        digest = bytes.fromhex(access.digest)
        followed = self._followed.get(digest)
        if followed is None:
            followed = self._followed[digest] = _Followed(wanted, Streams())
            if len(self._followed) > _STREAMS_MAX:
                self._followed.popitem(last=False)
        self._followed.move_to_end(digest)
        self._advance(followed, access.blocks)

    def _advance(self, followed: _Followed, blocks: range) -> None:
        info = followed.wanted.info
        count = self._geometry.block_count(info.size_bytes)
        ahead = followed.streams.read(blocks, count)
        for block in ahead:
            # One task a block: each is a request of its own, and a failure of one says nothing of the others.
            block_range = self._geometry.block_range(info.size_bytes, block)
            self._start(Wanted(followed.wanted.mount, info, block_range))
            self.blocks_asked += 1

    def _start(self, wanted: Wanted) -> None:
        task = asyncio.create_task(self._fetch(wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, wanted: Wanted) -> None:
        try:
            await self._engine.ensure(wanted, Priority.READAHEAD)
        except (OrchestraError, OSError) as error:
            # Nobody asked for these bytes yet; whoever does will see the error, if it is still there.
            log.info("reading ahead in %s failed: %s", wanted.info.key, error)

    async def close(self) -> None:
        """Stop reading ahead."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @staticmethod
    def rest_of(wanted: Wanted, stop: int) -> Wanted:
        """What lies between the end of `wanted` and `stop`."""
        stop = max(wanted.byte_range.stop, min(stop, wanted.info.size_bytes))
        return Wanted(wanted.mount, wanted.info, ByteRange(wanted.byte_range.stop, stop))
