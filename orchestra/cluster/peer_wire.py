"""What a request for blocks looks like between nodes; pure.

Owns: the target of GET /v1/peer/extents, its headers, the statuses, the causes why a peer gave nothing. Leaves to
others: sending (peer_client), answering (the daemon's api), proofs (proof).

A request names the object in full, because its owner may have to fetch it: store, key, version and size. The digest in
the path follows from them and is checked, so what is asked for can only ever be that version of that object.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote

from orchestra.values import ByteRange, ObjectId

EXTENTS: Final = "/v1/peer/extents/"
CHECKSUMS: Final = "Orchestra-Crc32c"
RING: Final = "Orchestra-Ring"
# Who else holds the extent because it is read so often: see cluster.heat.
COPIES: Final = "Orchestra-Copies"
# A key of 1,024 bytes is 3 KiB percent-encoded; the checksums of a part of 1,024 blocks are 9 KiB.
HEAD_BYTES_MAX: Final = 16 * 1024
# A peer that only says that it works on it is believed for as long as a read of its store may take with all its tries.
WORKING_MAX_S: Final = 130.0
_TARGET = re.compile(r"/v1/peer/extents/([0-9a-f]{32})/(0|[1-9][0-9]{0,8})\?([\x21-\x7e]+)\Z", re.ASCII)
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})\Z", re.ASCII)
_FIELDS = frozenset(("store", "key", "version", "size", "priority", "held"))
# Object sizes and file positions are signed 64-bit numbers everywhere else, too.
_SIZE_BYTES_MAX = (1 << 63) - 1


class Cause(enum.StrEnum):
    """Why a peer did not give what it was asked for; each is counted."""

    CONNECT_REFUSED = "connect_refused"  # nobody listens there, or no way leads there
    CONNECT_TIMEOUT = "connect_timeout"
    NO_PROGRESS = "no_progress"  # neither a byte nor a sign of work for the stall timeout
    CUT_SHORT = "cut_short"
    CHECKSUM = "checksum"  # bytes came that are not the object's
    UNREADABLE = "unreadable"  # the answer is none that a node gives, or of another length
    REFUSED = "refused"  # the proof, or blocks of another size
    NOT_MOUNTED = "not_mounted"  # it does not know the store
    NOT_HELD = "not_held"  # asked only for what it holds
    NOT_KEPT = "not_kept"  # there is no room for it there
    ELSEWHERE = "elsewhere"  # it waits for another node itself
    STALE = "stale"  # its store says that the version is gone
    STORE_FAILED = "store_failed"  # it could not read its store


# A peer that is gone or broken is left alone for a while; one that only cannot help with this block is not.
BROKEN_CAUSES: Final = frozenset(
    {
        *(Cause.CONNECT_REFUSED, Cause.CONNECT_TIMEOUT, Cause.NO_PROGRESS, Cause.CUT_SHORT),
        *(Cause.CHECKSUM, Cause.UNREADABLE, Cause.REFUSED),
    }
)
_STATUS_OF = {
    Cause.REFUSED: 403,
    Cause.NOT_HELD: 404,
    Cause.STALE: 412,
    Cause.ELSEWHERE: 421,
    Cause.NOT_MOUNTED: 424,
    Cause.STORE_FAILED: 502,
    Cause.NOT_KEPT: 507,
}
_CAUSE_OF = {status: cause for cause, status in _STATUS_OF.items()}


class PeerError(Exception):
    """A peer gave nothing. Never leaves the cluster's packages and the fetch stage."""

    def __init__(self, cause: Cause, text: str) -> None:
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class ExtentPart:
    """Neighbouring blocks of one extent of one version of an object, as one node asks another for them.

    `file_range` lies within the extent. `priority` is the asker's (0: a reader waits). `held_only`: not to be fetched
    for this.
    """

    object_id: ObjectId
    digest: str
    size_bytes: int
    extent_index: int
    file_range: ByteRange
    priority: int = 0
    held_only: bool = False

    @property
    def target(self) -> str:
        """What stands in the request line."""
        name = self.object_id
        held = "&held=1" if self.held_only else ""
        return (
            f"{EXTENTS}{self.digest}/{self.extent_index}?store={_quoted(name.store_id)}&key={_quoted(name.key)}"
            f"&version={_quoted(name.version)}&size={self.size_bytes}&priority={self.priority}{held}"
        )

    @property
    def range_header(self) -> str:
        """The value of the header Range."""
        return f"bytes={self.file_range.start}-{self.file_range.stop - 1}"


def parse_part(target: str, range_header: str) -> ExtentPart:
    """Return what was asked for. Raises ValueError that says what is wrong with it."""
    match = _TARGET.match(target)
    if match is None:
        raise ValueError("not the address of an extent")
    pairs = parse_qsl(match[3], keep_blank_values=True, strict_parsing=True, errors="surrogateescape", max_num_fields=8)
    fields = dict(pairs)
    if len(fields) != len(pairs) or not fields.keys() <= _FIELDS:
        raise ValueError("a field that is not known, or stands twice")
    object_id = ObjectId(fields.get("store", ""), fields.get("key", ""), fields.get("version", ""))
    size_bytes = _number(fields.get("size", ""), _SIZE_BYTES_MAX)
    span = _RANGE.match(range_header)
    if span is None or int(span[2]) < int(span[1]):
        raise ValueError("not a range of bytes")
    if any("\0" in text for text in (object_id.store_id, object_id.key, object_id.version)):
        raise ValueError("a NUL in a name")
    if object_id.digest() != match[1]:
        raise ValueError("the digest is not that of the object")
    return ExtentPart(
        object_id,
        match[1],
        size_bytes,
        int(match[2]),
        ByteRange(int(span[1]), int(span[2]) + 1),
        priority=_number(fields.get("priority", "0"), 9),
        held_only=fields.get("held") == "1",
    )


def status_of(cause: Cause) -> int:
    """The status that says so."""
    return _STATUS_OF.get(cause, 500)


def cause_of(status: int) -> Cause:
    """Why an answer with that status holds no bytes."""
    return _CAUSE_OF.get(status, Cause.REFUSED if 400 <= status < 500 else Cause.STORE_FAILED)


def encode_checksums(checksums: Sequence[int]) -> str:
    """The header's value: eight hex digits a block."""
    return "".join(f"{checksum:08x}" for checksum in checksums)


def parse_checksums(text: str, count: int) -> tuple[int, ...]:
    """Return `count` checksums. Raises ValueError."""
    if len(text) != 8 * count:
        raise ValueError(f"{count} checksums were expected, not {text[:80]!r}")
    return tuple(int(text[at : at + 8], 16) for at in range(0, len(text), 8))


def encode_places(places: int) -> str:
    """The header's value: a bit for each place in the ring's order, in hex."""
    return f"{places:x}"


def parse_places(text: str) -> int:
    """Return those places; none for what cannot be understood: they only spare the owner work."""
    is_number = 1 <= len(text) <= 4 and all(letter in "0123456789abcdef" for letter in text)
    return int(text, 16) if is_number else 0


def _quoted(text: str) -> str:
    return quote(text, safe="/:", errors="surrogateescape")


def _number(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > most:
        raise ValueError(f"not a number of at most {most}: {text[:40]!r}")
    return int(text)
