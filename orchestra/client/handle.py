"""An open object: reads from the cache directory, and has the daemon fetch what is missing there."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestra.blocks.reader import CorruptBlockError, LocalObject
from orchestra.errors import StoreError, UsageError
from orchestra.values import ByteRange, Entry

if TYPE_CHECKING:
    from orchestra.client.node import NodeClient

# After the daemon said "present" a reader may still find nothing: evicted again, or found damaged. It asks once more,
# and then has the bytes sent, which always works.
_LOCAL_TRIES_MAX = 2
# A long read goes in windows: the first is waited for while the next are being fetched, so that copying and fetching
# overlap. Four blocks of 4 MiB are 40 ms of copying, about one round trip to a store.
_WINDOW_BLOCKS = 4


class NodeHandle:
    """See `orchestra.client.contract.Handle`."""

    __slots__ = ("_block_size", "_client", "_digest", "_entry", "_local")

    def __init__(self, client: NodeClient, entry: Entry, digest: str, local: LocalObject) -> None:
        self._client = client
        self._entry = entry
        self._digest = bytes.fromhex(digest)
        self._local = local
        self._block_size = local.block_size_bytes

    @property
    def entry(self) -> Entry:
        """What was opened."""
        return self._entry

    @property
    def digest_hex(self) -> str:
        """The object's name in the cache."""
        return self._digest.hex()

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """See Handle."""
        view = self._writable(offset, buffer)
        if not view:
            return 0
        try:
            count = self._local.readinto(offset, view)
        except CorruptBlockError:
            count = None  # found again below, and told to the daemon
        if count is not None:
            self._note(self._client.note_hit, offset, count)
            return count
        window = _WINDOW_BLOCKS * self._block_size
        at = 0
        while at < len(view):
            stop = min(len(view), at + window - (offset + at) % window)
            self._read_missing(offset + at, view[at:stop], ahead_stop=offset + len(view))
            at = stop
        return len(view)

    def readinto_cached(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        """See Handle."""
        view = self._writable(offset, buffer)
        return self._try_local(offset, view) if view else 0

    def readinto_fetched(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        """See Handle."""
        view = self._writable(offset, buffer)
        if not view:
            return 0
        self._local.forget()
        try:
            count = self._local.readinto(offset, view)
        except CorruptBlockError:
            return None
        if count is not None:
            self._note(self._client.note_miss, offset, count)
        return count

    def read_here(self, *, fetched: bool = False) -> bytes | None:
        """See Handle."""
        size = self._entry.size_bytes
        if 0 < size <= self._block_size:
            if fetched:
                self._local.forget()
            return self._try_whole(self._client.note_miss if fetched else self._client.note_hit)
        buffer = bytearray(size)
        read = self.readinto_fetched if fetched else self.readinto_cached
        return bytes(buffer) if read(0, buffer) is not None else None

    def read(self, offset: int, length: int) -> bytes:
        """See Handle."""
        if length < 0:
            raise UsageError(f"cannot read {length} bytes")
        size = self._entry.size_bytes
        if not offset and 0 < size <= length and size <= self._block_size:
            data = self._try_whole(self._client.note_hit)
            if data is not None:
                return data
        return self._read_bytes(offset, max(0, min(length, size - offset)))

    def _read_bytes(self, offset: int, length: int) -> bytes:
        """Read into the buffer of a BytesIO, whose value is its buffer: a bytearray would have to be copied, and the
        page faults of 300 MB cost as much as reading them."""
        if offset < 0:
            raise UsageError(f"cannot read from offset {offset}")
        if not length:
            return b""
        window = _WINDOW_BLOCKS * self._block_size
        if length > window and self._local.missing_blocks(ByteRange(offset, offset + 1)):
            # Have the store send while the memory is being made.
            digest = self._digest.hex()
            self._client.ensure(self._entry, digest, offset, offset + 1, ahead_stop=offset + length, suspect=False)
        result = io.BytesIO()
        result.seek(length - 1)
        result.write(b"\0")
        with result.getbuffer() as view:
            self.readinto(offset, view)
        return result.getvalue()

    def backing_fd(self) -> int | None:
        """See Handle."""
        fd = self._local.complete_fd()
        if fd is None and self._entry.size_bytes:
            # What we have open may have been evicted and fetched anew meanwhile.
            self._local.forget()
            fd = self._local.complete_fd()
        return fd

    def close(self) -> None:
        """See Handle."""
        self._local.close()

    def _writable(self, offset: int, buffer: bytearray | memoryview) -> memoryview:
        """The part of `buffer` that the object fills from `offset` on."""
        if offset < 0:
            raise UsageError(f"cannot read from offset {offset}")
        view = memoryview(buffer)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        return view[: max(0, self._entry.size_bytes - offset)]

    def _try_local(self, offset: int, view: memoryview) -> int | None:
        try:
            count = self._local.readinto(offset, view)
        except CorruptBlockError:
            return None
        if count is not None:
            self._note(self._client.note_hit, offset, count)
        return count

    def _try_whole(self, note: Callable[[bytes, int, int, int], None]) -> bytes | None:
        try:
            data = self._local.read_small()
        except CorruptBlockError:
            return None
        if data is not None:
            note(self._digest, 0, 1, len(data))
        return data

    def _note(self, note: Callable[[bytes, int, int, int], None], offset: int, size_bytes: int) -> None:
        first = offset // self._block_size
        note(self._digest, first, (offset + size_bytes - 1) // self._block_size - first + 1, size_bytes)

    def _read_missing(self, offset: int, view: memoryview, *, ahead_stop: int) -> None:
        """Fill all of `view`, asking the daemon. Raises StaleObjectError, StoreError."""
        suspect = False
        digest = self._digest.hex()
        for _ in range(_LOCAL_TRIES_MAX):
            try:
                count = self._local.readinto(offset, view)
                if count is not None:
                    self._note(self._client.note_miss, offset, count)
                    return
                suspect = False
            except CorruptBlockError:
                suspect = True
            is_kept = self._client.ensure(
                self._entry, digest, offset, offset + len(view), ahead_stop=ahead_stop, suspect=suspect
            )
            self._local.forget()
            if not is_kept:
                break
        else:
            try:
                if self._local.readinto(offset, view) is not None:
                    self._note(self._client.note_miss, offset, len(view))
                    return
            except CorruptBlockError:
                pass  # the bytes over the socket are checked at their source
        count = self._client.read_through(self._entry, digest, offset, view)
        if count != len(view):
            raise StoreError(f"{self._entry.path}: asked for {len(view)} bytes at {offset}, got {count}")
        self._note(self._client.note_miss, offset, count)
