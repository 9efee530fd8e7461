"""The bytes on disk: the seal of a small object and the presence map of an extent. Golden-tested; a change of a byte
is a change of FORMAT_VERSION.

A *seal* says which object a file holds: format, boot id, digest, size, crc32c. It is an extended attribute of the
object's file (so the file itself holds exactly the object's bytes), or a file beside it where the cache's file
system has no extended attributes.

A *presence map* is a header and one eight-byte entry per block: state and crc32c. It names the inode of its extent
file, so that a map can never be read together with another incarnation of the extent (evicted and filled again between
two calls of a reader).

Both carry the id of the boot in which the bytes were last known good. After a power loss the page cache's promises are
void: what another boot wrote is verified against its checksums before its first use.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

import crc32c

FORMAT_VERSION = 1
SEAL_ATTRIBUTE = "user.orchestra.seal"

_SEAL = struct.Struct("<4sI16s16sQII")  # magic, format, boot id, digest, size, crc of the bytes, crc of the seal
_SEAL_MAGIC = b"ORCS"
SEAL_SIZE_BYTES = _SEAL.size


@dataclass(frozen=True, slots=True)
class Seal:
    """What a small object's file holds."""

    boot_id: bytes
    digest: bytes
    size_bytes: int
    crc: int

    def pack(self) -> bytes:
        """Return the bytes on disk."""
        return pack_seal(self.boot_id, self.digest, self.size_bytes, self.crc)


def pack_seal(boot_id: bytes, digest: bytes, size_bytes: int, crc: int) -> bytes:
    """Return the one seal that those bytes of that object may have in that boot."""
    head = _SEAL.pack(_SEAL_MAGIC, FORMAT_VERSION, boot_id, digest, size_bytes, crc, 0)[:-4]
    return head + crc32c.crc32c(head).to_bytes(4, "little")


def unpack_seal(raw: bytes) -> Seal | None:
    """Return the seal, or None for anything that is not an intact seal of this format."""
    if len(raw) != _SEAL.size:
        return None
    magic, version, boot, digest, size, crc, own_crc = _SEAL.unpack(raw)
    if magic != _SEAL_MAGIC or version != FORMAT_VERSION or own_crc != crc32c.crc32c(raw[:-4]):
        return None
    return Seal(boot, digest, size, crc)


# magic, format, block size, first block, block count, extent bytes, inode of the extent, digest | boot id, complete
_MAP_FIXED = struct.Struct("<4sIIIIIQQ16s")
_MAP_MAGIC = b"ORCM"
_CRC_OFFSET = _MAP_FIXED.size  # crc32c of the fixed part, which never changes
BOOT_OFFSET = 64
COMPLETE_OFFSET = 80
ENTRIES_OFFSET = 96
_ENTRY = struct.Struct("<II")  # crc32c, state; eight bytes, aligned, so one store on every machine we run on
ENTRY_SIZE_BYTES = _ENTRY.size
ABSENT = 0
PRESENT = 0x50524553
_COMPLETE = b"\x01"

assert _CRC_OFFSET + 4 <= BOOT_OFFSET, "the fixed part and its checksum end before what changes"
assert ENTRIES_OFFSET % ENTRY_SIZE_BYTES == 0, "entries are aligned"


@dataclass(frozen=True, slots=True)
class MapHeader:
    """The part of a presence map that never changes."""

    block_size_bytes: int
    first_block: int
    block_count: int
    extent_bytes: int
    extent_inode: int
    digest: bytes

    def pack(self) -> bytes:
        """Return a whole new map: this header, all blocks absent, no boot vouches for it yet."""
        head = _MAP_FIXED.pack(
            _MAP_MAGIC,
            FORMAT_VERSION,
            self.block_size_bytes,
            self.first_block,
            self.block_count,
            0,
            self.extent_bytes,
            self.extent_inode,
            self.digest,
        )
        raw = bytearray(ENTRIES_OFFSET + self.block_count * ENTRY_SIZE_BYTES)
        raw[: len(head)] = head
        struct.pack_into("<I", raw, _CRC_OFFSET, crc32c.crc32c(head))
        return bytes(raw)


class PresenceMap:
    """A mapped presence map. Readers map it read-only; only the daemon calls the `set_` methods.

    The daemon writes a block's bytes before it marks the block, and processes of one boot see both through the page
    cache, so a mark never runs ahead of its bytes.
    """

    __slots__ = ("_raw", "header")

    def __init__(self, raw: mmap.mmap | bytearray, header: MapHeader) -> None:
        self._raw = raw
        self.header = header

    @classmethod
    def attach(cls, raw: mmap.mmap | bytearray) -> PresenceMap | None:
        """Return the map held by `raw`, or None if it is damaged, cut short or of another format."""
        if len(raw) < ENTRIES_OFFSET:
            return None
        magic, version, block, first, count, _, extent, inode, digest = _MAP_FIXED.unpack_from(raw)
        crc = struct.unpack_from("<I", raw, _CRC_OFFSET)[0]
        if magic != _MAP_MAGIC or version != FORMAT_VERSION or crc != crc32c.crc32c(raw[: _MAP_FIXED.size]):
            return None
        if len(raw) != ENTRIES_OFFSET + count * ENTRY_SIZE_BYTES:
            return None
        return cls(raw, MapHeader(block, first, count, extent, inode, digest))

    def is_trusted(self, boot_id: bytes) -> bool:
        """Whether the marks were made (or verified) in this boot."""
        return self._raw[BOOT_OFFSET : BOOT_OFFSET + 16] == boot_id

    def is_complete(self) -> bool:
        """Whether every block of the extent is present."""
        return self._raw[COMPLETE_OFFSET] == 1

    def is_present(self, block_index: int) -> bool:
        """Whether that block (index within the object) is present."""
        offset = ENTRIES_OFFSET + (block_index - self.header.first_block) * ENTRY_SIZE_BYTES
        return bool(_ENTRY.unpack_from(self._raw, offset)[1] == PRESENT)

    def crc_of(self, block_index: int) -> int:
        """The crc32c of a present block's bytes."""
        offset = ENTRIES_OFFSET + (block_index - self.header.first_block) * ENTRY_SIZE_BYTES
        return int(_ENTRY.unpack_from(self._raw, offset)[0])

    def present_blocks(self) -> list[int]:
        """Indexes (within the object) of all present blocks."""
        first = self.header.first_block
        return [first + i for i in range(self.header.block_count) if self.is_present(first + i)]

    def set_present(self, block_index: int, crc: int) -> None:
        """Mark a block whose bytes are in the extent file; the last one makes the extent complete."""
        offset = ENTRIES_OFFSET + (block_index - self.header.first_block) * ENTRY_SIZE_BYTES
        _ENTRY.pack_into(self._raw, offset, crc, PRESENT)

    def set_absent(self, block_index: int) -> None:
        """Take a block's mark away (its bytes were found bad)."""
        self._raw[COMPLETE_OFFSET : COMPLETE_OFFSET + 1] = b"\x00"
        offset = ENTRIES_OFFSET + (block_index - self.header.first_block) * ENTRY_SIZE_BYTES
        _ENTRY.pack_into(self._raw, offset, 0, ABSENT)

    def set_complete(self) -> None:
        """Say that every block is present; call only when it is so."""
        self._raw[COMPLETE_OFFSET : COMPLETE_OFFSET + 1] = _COMPLETE

    def set_trusted(self, boot_id: bytes) -> None:
        """Vouch for all marks in this boot."""
        self._raw[BOOT_OFFSET : BOOT_OFFSET + 16] = boot_id

    def detach(self) -> None:
        """Unmap."""
        if isinstance(self._raw, mmap.mmap):
            self._raw.close()
