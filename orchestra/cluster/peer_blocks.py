"""What POST /v1/peer/blocks looks like between nodes: many small objects in one answer; pure.

Owns: the body of the request, the frames of the answer. Leaves to others: sending (peer_batch), answering (the daemon's
api), proofs (proof).

The answer is one stream, in chunks of whole frames, in the order in which the objects are ready. A frame is a head of
32 bytes and the object's bytes; `index` is the object's place in the request, `places` tell who else holds it (see
cluster.heat). A frame of status WORKING and no bytes says that the node is at work on what is still missing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from orchestra.cluster.peer_wire import ExtentPart
from orchestra.values import ByteRange, ObjectId

BLOCKS: Final = "/v1/peer/blocks"
# An object of more goes alone, by sendfile: what a request costs is little beside its bytes then.
SMALL_BYTES_MAX: Final = 256 * 1024
BATCH_COUNT_MAX: Final = 256
# What one batch brings: as much as one block, so that no batch holds up what is asked for after it for longer.
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
# 256 keys of 1,024 bytes, and their versions.
BODY_BYTES_MAX: Final = 1024 * 1024
OK: Final = 200
WORKING: Final = 102
_FRAME = struct.Struct("<16sIIIHH")
FRAME_HEAD_BYTES: Final = _FRAME.size

# store's place among the stores, key, version, size, digest
_Entry = tuple[int, bytes, bytes, int, bytes]


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    stores: list[bytes]
    entries: list[_Entry]
    priority: int
    held_only: bool


_decode = msgspec.msgpack.Decoder(_Body).decode


@dataclass(frozen=True, slots=True)
class Frame:
    """The head of one object in the answer."""

    digest: bytes
    places: int
    length: int
    checksum: int
    status: int
    index: int

    def pack(self) -> bytes:
        """Return the bytes on the wire."""
        return _FRAME.pack(self.digest, self.places, self.length, self.checksum, self.status, self.index)


def unpack_frame(raw: bytes | bytearray | memoryview, offset: int = 0) -> Frame:
    """Return the head that begins at `offset`."""
    return Frame(*_FRAME.unpack_from(raw, offset))


def encode_blocks(parts: Sequence[ExtentPart]) -> bytes:
    """Return the body that asks for these whole small objects; the most urgent one's priority holds for all, and all or
    none are wanted only if held."""
    stores: dict[bytes, int] = {}
    entries: list[_Entry] = []
    for part in parts:
        name = part.object_id
        store = stores.setdefault(_raw(name.store_id), len(stores))
        entries.append((store, _raw(name.key), _raw(name.version), part.size_bytes, bytes.fromhex(part.digest)))
    body = _Body(list(stores), entries, min(part.priority for part in parts), parts[0].held_only)
    return msgspec.msgpack.encode(body)


def parse_blocks(body: bytes) -> list[ExtentPart]:
    """Return what was asked for. Raises ValueError that says what is wrong with it."""
    try:
        asked = _decode(body)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a list of objects: {error}") from error
    if not 1 <= len(asked.entries) <= BATCH_COUNT_MAX or not 0 <= asked.priority <= 9:
        raise ValueError(f"a batch of {len(asked.entries)} objects")
    return [_part(asked, entry) for entry in asked.entries]


def _part(asked: _Body, entry: _Entry) -> ExtentPart:
    store, key, version, size_bytes, digest = entry
    if not 0 <= store < len(asked.stores):
        raise ValueError("a store that is not named")
    if not 1 <= size_bytes <= SMALL_BYTES_MAX:
        raise ValueError(f"an object of {size_bytes} bytes in a batch of small ones")
    object_id = ObjectId(_text(asked.stores[store]), _text(key), _text(version))
    if b"\0" in key or b"\0" in version or b"\0" in asked.stores[store]:
        raise ValueError("a NUL in a name")
    if object_id.digest() != digest.hex():
        raise ValueError("a digest that is not the object's")
    return ExtentPart(
        *(object_id, digest.hex(), size_bytes, 0, ByteRange(0, size_bytes)),
        priority=asked.priority,
        held_only=asked.held_only,
    )


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
