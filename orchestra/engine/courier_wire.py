"""What the daemon and its courier say to each other over their socket pair, and how.

A message is its length, its kind, a number, and a body. The daemon begins with SETUP, names each lane's server once
(SERVER), and then sends errands (CARRY), has one go first (HASTEN) and takes one back (CANCEL); the courier begins with
READY and answers each errand that was not taken back once: PLACED, ANSWERED (the server said something else), STALLED
or FAILED.

An errand is sent when the courier has a turn of its lane for it: it gets them (GRANT), keeps them from one errand to
the next, and gives them back (RETURNED) when it is asked to (SHED), as soon as it can. So the next request leaves when
an answer is here, without the daemon, and never are there more in flight than turns that the daemon holds.

Owns: these bytes. Both ends are of one installation and live no longer than a daemon, so there is no version of it.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from multidict import CIMultiDict

from orchestra.blocks.store import Placed
from orchestra.stores.carrying import Errand, Server
from orchestra.stores.range_client import RangeAnswer
from orchestra.values import ByteRange

_HEAD = struct.Struct("<IBQ")  # length of what follows the length, kind, number
_LENGTH = struct.Struct("<I")
_CARRY = struct.Struct("<HIQQQQ32sH")  # lane, block, inode, start, stop, size, digest, length of the version
_ANSWER = struct.Struct("<HI")  # status, length of the headers
# Of an answer that is handed on: an error's document, or a body so short that its length is what is wrong.
ANSWER_BYTES_MAX = 64 * 1024


class Kind(IntEnum):
    """Of a message."""

    SETUP = 1
    SERVER = 2
    CARRY = 3
    CANCEL = 4
    READY = 5
    PLACED = 6
    ANSWERED = 7
    STALLED = 8
    FAILED = 9
    GRANT = 10
    SHED = 11
    RETURNED = 12
    HASTEN = 13


@dataclass(frozen=True, slots=True)
class Setup:
    """What a courier has to know of the cache directory."""

    cache_dir: str
    block_size_bytes: int
    extent_size_bytes: int
    boot_id: str  # in hex

    def pack(self) -> bytes:
        """Return the message."""
        return message(Kind.SETUP, 0, json.dumps(asdict(self)).encode())


@dataclass(slots=True)
class Place:
    """Where the bytes go: a block of an object; `inode` is that of its extent's file, 0 for a small object."""

    digest: str
    block: int
    inode: int


def message(kind: Kind, number: int, body: bytes = b"") -> bytes:
    """Return the bytes of a message."""
    return _HEAD.pack(_HEAD.size - _LENGTH.size + len(body), kind, number) + body


def server_message(lane: int, server: Server) -> bytes:
    """Say where the errands of a lane go."""
    return message(Kind.SERVER, lane, json.dumps(asdict(server)).encode())


def turns_message(kind: Kind, lane: int, count: int) -> bytes:
    """GRANT, SHED or RETURNED."""
    return message(kind, lane, _LENGTH.pack(count))


def unpack_turns(body: bytes) -> int:
    """Return the count."""
    count: int = _LENGTH.unpack(body)[0]
    return count


def carry_message(number: int, lane: int, place: Place, errand: Errand) -> bytes:
    """Ask for an errand."""
    version = errand.version.encode("utf-8", "surrogateescape")
    span = errand.byte_range
    fixed = _CARRY.pack(
        lane,
        place.block,
        place.inode,
        span.start,
        span.stop,
        errand.size_bytes,
        place.digest.encode(),
        len(version),
    )
    length = _HEAD.size - _LENGTH.size + len(fixed) + len(version) + len(errand.request)
    return b"".join((_HEAD.pack(length, Kind.CARRY, number), fixed, version, errand.request))


def unpack_carry(body: bytes, servers: dict[int, Server]) -> tuple[int, Place, Errand]:
    """Return the lane's number, the place and the errand."""
    lane, block, inode, start, stop, size, digest, version_length = _CARRY.unpack_from(body)
    request_at = _CARRY.size + version_length
    version = body[_CARRY.size : request_at].decode("utf-8", "surrogateescape")
    errand = Errand(servers[lane], body[request_at:], ByteRange(start, stop), size, version)
    return lane, Place(digest.decode(), block, inode), errand


def placed_message(number: int, placed: Placed) -> bytes:
    """Say that an errand is done."""
    return message(Kind.PLACED, number, _LENGTH.pack(placed.crc) + placed.path.encode("utf-8", "surrogateescape"))


def unpack_placed(body: bytes) -> Placed:
    """Return what was written."""
    return Placed(body[_LENGTH.size :].decode("utf-8", "surrogateescape"), _LENGTH.unpack_from(body)[0])


def answer_message(number: int, answer: RangeAnswer) -> bytes:
    """Hand on an answer that is not what was asked for."""
    if len(answer.data) > ANSWER_BYTES_MAX:
        return message(Kind.FAILED, number)
    headers = json.dumps(list(answer.headers.items())).encode()
    return message(Kind.ANSWERED, number, _ANSWER.pack(answer.status, len(headers)) + headers + bytes(answer.data))


def unpack_answer(body: bytes) -> RangeAnswer:
    """Return the answer."""
    status, length = _ANSWER.unpack_from(body)
    headers: list[tuple[str, str]] = json.loads(body[_ANSWER.size : _ANSWER.size + length])
    return RangeAnswer(status, CIMultiDict(headers), memoryview(body)[_ANSWER.size + length :])


class Messages:
    """Cuts what was received into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield (kind, number, body) of each message that is whole now; the iterator must be used up."""
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= _HEAD.size:
            length, kind, number = _HEAD.unpack_from(data, at)
            stop = at + _LENGTH.size + length
            if stop > len(data):
                break
            yield kind, number, data[at + _HEAD.size : stop]
            at = stop
        self._rest = data[at:]


class Conversation(asyncio.Protocol):
    """Either end of the socket pair."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._messages = Messages()
        self._saying: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def say(self, said: bytes) -> None:
        """Send it with whatever else is said in this turn of the loop: a call to the kernel for many errands."""
        if not self._saying:
            self._loop.call_soon(self._flush)
        self._saying.append(said)

    def _flush(self) -> None:
        said, self._saying = b"".join(self._saying), []
        if self._transport is not None:
            self._transport.write(said)


def setup_of(body: bytes) -> Setup:
    """Inverse of Setup.pack."""
    known: dict[str, Any] = json.loads(body)
    return Setup(**known)


def server_of(body: bytes) -> Server:
    """Return what `server_message` named."""
    known: dict[str, Any] = json.loads(body)
    return Server(**known)
