"""Blocks that the courier fetches and writes, from reserving their room to publishing them.

Owns: which parts go that way, and the order of the steps. Leaves to others: the process (courier), turns, signatures
and retries (stores), and all that is unusual: NotCarriedError says that the engine is to bring the part itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.store import BlockStore
from orchestra.engine.courier import Courier
from orchestra.engine.courier_wire import Place
from orchestra.fetch.budget import Priority
from orchestra.fetch.fetcher import Fetcher
from orchestra.stores.carrying import NotCarriedError
from orchestra.values import ByteRange

if TYPE_CHECKING:
    from orchestra.engine.engine import Wanted


class CarriedParts:
    """One event loop."""

    def __init__(self, courier: Courier, blocks: BlockStore, fetcher: Fetcher) -> None:
        self.courier = courier
        self._blocks = blocks
        self._fetcher = fetcher

    def takes(self, wanted: Wanted, part: range, priority: Priority) -> bool:
        """Whether that part goes this way: of a load, a block alone. Who waits for one gets it from the daemon."""
        return (
            priority is Priority.LOAD and self.courier.is_ready and len(part) == 1 and wanted.mount.placing is not None
        )

    async def bring(self, wanted: Wanted, block: int, span: ByteRange, priority: Priority, marks: list[int]) -> None:
        """Have a block of the store's fetched and written, and publish it.

        Raises what the store raises, and NotCarriedError: bring it in the usual way.
        """
        store = wanted.mount.placing
        assert store is not None, "takes says so"
        digest = wanted.digest
        try:
            placing = self._blocks.placing(digest, wanted.info.size_bytes, block)
        except (CacheFullError, OSError) as error:
            raise NotCarriedError from error
        with placing:
            carrier = self.courier.carrier(Place(digest, block, placing.inode))
            await self._fetcher.place(store, wanted.info, span, priority, marks, carrier)
            self._fetcher.release(span.length)
            if not placing.publish(carrier.placed):
                raise NotCarriedError
