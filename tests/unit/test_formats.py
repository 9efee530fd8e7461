"""The bytes on disk. A cache that an older orchestra wrote is read by these formats: a byte that changes here changes
the meaning of every such cache, and demands another FORMAT_VERSION."""

from __future__ import annotations

import struct

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.blocks import formats
from orchestra.blocks.formats import BOOT_OFFSET, COMPLETE_OFFSET, MapHeader, PresenceMap, Seal, unpack_seal
from orchestra.metadata import records
from orchestra.metadata.records import Record, RecordBuilder, RecordEntry
from orchestra.observe import access_ring
from orchestra.values import EntryKind, ObjectId

BOOT = bytes(range(16))
DIGEST = bytes(range(16, 32))
SEAL = Seal(BOOT, DIGEST, 110_000, 0xDEADBEEF)
HEADER = MapHeader(4194304, 64, 3, 9_000_000, 123456789, DIGEST)

GOLDEN_SEAL = (
    "4f524353" "01000000" "000102030405060708090a0b0c0d0e0f" "101112131415161718191a1b1c1d1e1f"
    "b0ad010000000000" "efbeadde" "c7d0d987"
)  # fmt: skip
GOLDEN_MAP_HEAD = (
    "4f52434d" "01000000" "00004000" "40000000" "03000000" "00000000" "4054890000000000" "15cd5b0700000000"
    "101112131415161718191a1b1c1d1e1f" "f2d2d4ac" "00000000"
)  # fmt: skip
GOLDEN_MAP_NEW = GOLDEN_MAP_HEAD + "00" * 16 + "00" * 16 + "0000000000000000" * 3
GOLDEN_MAP_COMPLETE = (
    GOLDEN_MAP_HEAD + "000102030405060708090a0b0c0d0e0f" + "01" + "00" * 15
    + "0000000000000000" + "bebafeca53455250" + "0000000000000000"
)  # fmt: skip
GOLDEN_LISTING = (
    "4f52434c" "01000000" "000102030405060708090a0b0c0d0e0f" "15cd5b0700000000" "000000000000f83f"
    "0200000000000000" "03000000" "02000000" "0900000000000000" "0400000000000000" "89787473" "00000000"
    "0000000000000000" "0600000000000000" "0900000000000000"
    "0000000000000000" "0400000000000000" "0400000000000000"
    "0700000000000000" "0000000000000000"
    "01002a36fe9c9717" "0000000000000000"
    "0102"
    "61ff2e62696e" "737562"
    "22763122"
)  # fmt: skip


def must_be(raw: bytes, golden: str, module: object) -> None:
    assert raw.hex() == golden, (
        f"the bytes on disk changed: every existing cache would be misread. Raise FORMAT_VERSION in {module}, so that "
        "old files are dropped, and only then put the new bytes here"
    )


def test_a_change_of_format_is_a_change_of_version() -> None:
    """The golden bytes below are those of these versions; raising one means new golden bytes, and the reverse."""
    assert formats.FORMAT_VERSION == 1
    assert records.FORMAT_VERSION == 1


def test_the_digest_of_an_object_is_golden() -> None:
    """A file's name in the cache is this hash; another hash would orphan every cached file."""
    plain = ObjectId("s3://bucket/data/", "a/b.jpg", '"9b2cf535f27731c974343645a3985328"').digest()
    odd = ObjectId("file:///x/", "café-\udcff", "5-16").digest()
    reason = "the digest of an object changed: nothing cached would be found again. Raise CACHE_FORMAT in blocks/layout"
    assert plain == "dfc583bd84e9c627eef5e0f8938b544d", reason
    assert odd == "dac02ee11d40cc4fbd1c60507aebdb22", reason


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=6, max_size=6))
def test_different_objects_have_different_digests(parts: list[str]) -> None:
    """Store, key and version all count, and none can pose as the end of another."""
    one, two = ObjectId(*parts[:3]), ObjectId(*parts[3:])
    assert (one.digest() == two.digest()) == (one == two)
    assert len(one.digest()) == 32


def test_a_seal_is_golden() -> None:
    """The seal of a small object has these bytes, and reads back."""
    must_be(SEAL.pack(), GOLDEN_SEAL, formats.__name__)
    assert unpack_seal(SEAL.pack()) == SEAL


def test_a_new_map_is_golden() -> None:
    """A new presence map has these bytes: no boot vouches for it, no block is present."""
    must_be(HEADER.pack(), GOLDEN_MAP_NEW, formats.__name__)
    marks = PresenceMap.attach(bytearray(HEADER.pack()))
    assert marks is not None
    assert marks.header == HEADER
    assert not marks.is_complete()
    assert not marks.is_trusted(BOOT)
    assert marks.present_blocks() == []


def test_a_marked_map_is_golden() -> None:
    """Marks, the boot's id and completeness stand at these places."""
    raw = bytearray(HEADER.pack())
    marks = PresenceMap.attach(raw)
    assert marks is not None
    marks.set_trusted(BOOT)
    marks.set_present(65, 0xCAFEBABE)
    marks.set_complete()
    must_be(bytes(raw), GOLDEN_MAP_COMPLETE, formats.__name__)
    assert marks.is_trusted(BOOT)
    assert marks.is_complete()
    assert [marks.is_present(block) for block in (64, 65, 66)] == [False, True, False]
    assert marks.crc_of(65) == 0xCAFEBABE
    marks.set_absent(65)
    assert marks.present_blocks() == []
    assert not marks.is_complete(), "what lost a block is not complete"


def test_a_listing_is_golden() -> None:
    """A published listing has these bytes: columns of a fixed order, names sorted as bytes."""
    builder = RecordBuilder()
    builder.add(RecordEntry(b"sub", EntryKind.DIRECTORY, 0, 0, ""))
    builder.add(RecordEntry(b"a\xff.bin", EntryKind.FILE, 7, 1_700_000_000_000_000_001, '"v1"'))
    builder.hidden_count = 2
    raw = builder.pack(boot_id=BOOT, fetched_ns=123456789, wall_s=1.5, requests=3)
    must_be(raw, GOLDEN_LISTING, records.__name__)


def test_an_access_ring_is_golden() -> None:
    """Reader and daemon may be of different releases for a moment: the ring they share has these places and sizes."""
    layout = (
        access_ring._MAGIC, access_ring._FORMAT, access_ring._HEADER.format, access_ring._TOTALS.format,
        access_ring._NOTE.format, access_ring._TOTALS_OFFSET, access_ring._NOTES_OFFSET, access_ring.RING_SIZE_BYTES,
    )  # fmt: skip
    golden = (b"ORCA", 1, "<4sIQ", "<QQQQ", "<16sIIQ", 32, 64, 64 + 2048 * 32)
    assert layout == golden, "the access ring changed: raise _FORMAT in observe/access_ring, then change this"


SEAL_BYTES = len(SEAL.pack())


@pytest.mark.parametrize("at", range(SEAL_BYTES))
def test_a_seal_with_any_byte_changed_is_no_seal(at: int) -> None:
    """Whatever bit of a seal rots, it vouches for nothing."""
    raw = bytearray(SEAL.pack())
    raw[at] ^= 0x10
    assert unpack_seal(bytes(raw)) is None


@pytest.mark.parametrize("raw", [b"", b"ORCS", SEAL.pack()[:-1], SEAL.pack() + b"\0", b"\0" * SEAL_BYTES])
def test_what_is_no_seal_is_refused(raw: bytes) -> None:
    """Cut short, too long, empty, zeros after a power loss: none is a seal."""
    assert unpack_seal(raw) is None


def test_a_seal_of_another_version_is_refused() -> None:
    """A seal that is intact but of a later format is not guessed at."""
    body = SEAL.pack()[:4] + struct.pack("<I", formats.FORMAT_VERSION + 1) + SEAL.pack()[8:-4]
    assert unpack_seal(body + struct.pack("<I", crc32c.crc32c(body))) is None


@pytest.mark.parametrize("at", range(60))
def test_a_map_with_any_fixed_byte_changed_is_no_map(at: int) -> None:
    """Whatever bit of a map's header rots, it marks nothing."""
    raw = bytearray(HEADER.pack())
    raw[at] ^= 0x10
    assert PresenceMap.attach(raw) is None


@pytest.mark.parametrize("length", [0, 1, 59, 95, len(HEADER.pack()) - 1])
def test_a_map_cut_short_is_no_map(length: int) -> None:
    """A map without all its entries is refused, wherever it ends."""
    assert PresenceMap.attach(bytearray(HEADER.pack()[:length])) is None
    assert PresenceMap.attach(bytearray(HEADER.pack() + b"\0")) is None


def test_a_torn_mark_is_no_mark() -> None:
    """An entry that is only partly written, in any order of its bytes, does not say present."""
    raw = bytearray(HEADER.pack())
    marks = PresenceMap.attach(raw)
    assert marks is not None
    marks.set_present(66, 0x01020304)
    entry = formats.ENTRIES_OFFSET + 2 * formats.ENTRY_SIZE_BYTES
    whole = bytes(raw[entry : entry + 8])
    for missing in range(4, 8):
        raw[entry : entry + 8] = whole[:missing] + b"\0" + whole[missing + 1 :]
        assert not marks.is_present(66)


def test_places_that_change_lie_outside_the_checksum() -> None:
    """Boot id and completeness may be written at any time without making the header look damaged."""
    raw = bytearray(HEADER.pack())
    raw[BOOT_OFFSET : BOOT_OFFSET + 16] = b"\xff" * 16
    raw[COMPLETE_OFFSET] = 1
    assert PresenceMap.attach(raw) is not None


def listing(*names: bytes) -> bytes:
    builder = RecordBuilder()
    for name in names:
        builder.add(RecordEntry(name, EntryKind.FILE, len(name), 5, f'"{len(name)}"'))
    return builder.pack(boot_id=BOOT, fetched_ns=1, wall_s=1.0, requests=1)


def test_a_record_with_any_byte_changed_is_no_record() -> None:
    """Whatever bit of a listing rots, in its header or in a row, it is not believed."""
    raw = listing(b"a", b"bb", b"ccc")
    padding = range(records._HEADER.size - 4, records._HEADER.size)
    for at in set(range(len(raw))) - set(padding):
        spoiled = bytearray(raw)
        spoiled[at] ^= 0x10
        with pytest.raises(ValueError, match=r"another format|damaged"):
            Record(memoryview(bytes(spoiled)), (0, 0))


@pytest.mark.parametrize("length", [0, 4, 91, 95, 100])
def test_a_record_cut_short_is_no_record(length: int) -> None:
    """A listing without its end is not believed, wherever it ends."""
    with pytest.raises(ValueError, match=r"too short|damaged"):
        Record(memoryview(listing(b"a", b"bb", b"ccc")[:length]), (0, 0))
