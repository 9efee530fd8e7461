"""The bytes of the kernel's protocol, as include/uapi/linux/fuse.h lays them out."""

from __future__ import annotations

import errno
import math

import pytest

from orchestra.fuse import protocol
from orchestra.fuse.protocol import InitFlag, timeout_of

_ATTR: protocol.Attr = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
# ino, size, blocks, atime, mtime, ctime as u64, then ten u32.
_ATTR_HEX = "".join(n.to_bytes(8, "little").hex() for n in range(1, 7)) + "".join(
    n.to_bytes(4, "little").hex() for n in range(7, 17)
)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("HEADER_IN", 40),
        ("HEADER_OUT", 16),
        ("INIT_OUT", 64),
        ("ATTR", 88),
        ("ENTRY", 128),
        ("ENTRY_REPLY", 16 + 128),
        ("ATTR_REPLY", 16 + 16 + 88),
        ("OPEN_REPLY", 16 + 16),
        ("STATFS_REPLY", 16 + 80),
        ("GETXATTR_REPLY", 16 + 8),
        ("DIRENT", 24),
        ("BACKING_MAP", 16),
        ("INVAL_ENTRY", 16 + 16),
    ],
)
def test_structs_have_the_sizes_of_the_kernel_header(name: str, size: int) -> None:
    """Every struct is as long as the kernel's, headers included where the name says reply."""
    assert getattr(protocol, name).size == size


def test_an_error_travels_negative() -> None:
    """ENOENT to request 7 is a bare header with -2."""
    assert protocol.error_reply(7, errno.ENOENT).hex() == "10000000feffffff0700000000000000"


def test_a_data_reply_is_a_header_and_the_bytes() -> None:
    """Length counts the header."""
    assert protocol.data_reply(1, b"abc").hex() == "13000000000000000100000000000000616263"


def test_an_entry_reply_carries_both_timeouts() -> None:
    """nodeid 5, generation 0, an hour and a half second for the name, two seconds for the attributes."""
    message = protocol.entry_reply(3, 5, (3600, 500_000_000), (2, 0), _ATTR)
    assert message.hex() == (
        "90000000000000000300000000000000"
        "05000000000000000000000000000000100e00000000000002000000000000000065cd1d00000000" + _ATTR_HEX
    )


def test_a_negative_entry_has_no_number_and_a_timeout() -> None:
    """The kernel remembers that the name is not there."""
    message = protocol.negative_entry_reply(3, (60, 0))
    assert message[16:24] == bytes(8)
    assert message[32:40] == (60).to_bytes(8, "little")
    assert message[56:] == bytes(88)


def test_an_attr_reply_is_golden() -> None:
    """Timeout, padding, attributes."""
    assert protocol.attr_reply(9, (1, 2), _ATTR).hex() == (
        "780000000000000009000000000000000100000000000000" + "0200000000000000" + _ATTR_HEX
    )


def test_an_open_reply_carries_a_backing_id() -> None:
    """fh, flags, backing id."""
    assert protocol.open_reply(1, 2, 0xA0, 3).hex() == (
        "20000000000000000100000000000000" + "0200000000000000a000000003000000"
    )


def test_an_init_reply_splits_its_flags() -> None:
    """Bits from 32 up travel in flags2."""
    message = protocol.init_reply(
        2,
        minor=45,
        max_readahead_bytes=0x100000,
        flags=InitFlag.INIT_EXT | InitFlag.PASSTHROUGH | InitFlag.MAX_PAGES,
        max_background=1024,
        max_write_bytes=4096,
        max_pages=256,
        max_stack_depth=1,
    )
    assert message.hex() == (
        "50000000000000000200000000000000"
        "070000002d0000000000100000004040"
        "00040003001000000100000000010000"
        "20000000010000000000" + "00" * 22
    )


def test_an_init_request_is_read_with_its_second_word_of_flags() -> None:
    """flags2 counts only where INIT_EXT is set."""
    body = bytes.fromhex("070000002d0000000000020000004040" + "20000000") + bytes(44)
    major, minor, readahead, offered = protocol.unpack_init(memoryview(body))
    assert (major, minor, readahead) == (7, 45, 0x20000)
    assert offered == InitFlag.INIT_EXT | InitFlag.MAX_PAGES | InitFlag.PASSTHROUGH
    without = bytes.fromhex("070000002d0000000000020000004000" + "20000000") + bytes(44)
    assert protocol.unpack_init(memoryview(without))[3] == InitFlag.MAX_PAGES


def test_forgets_are_read_up_to_their_count() -> None:
    """What lies behind the counted pairs is not looked at."""
    body = bytes.fromhex("0200000000000000") + b"".join(n.to_bytes(8, "little") for n in (5, 1, 6, 2, 7, 3))
    assert list(protocol.unpack_forgets(memoryview(body))) == [(5, 1), (6, 2)]


def test_a_name_is_expired_with_its_length_and_a_nul() -> None:
    """The notification's code stands where an errno would, unasked for (unique 0)."""
    message = protocol.expire_entry_message(4, b"ab", protocol.EXPIRE_ONLY)
    assert message.hex() == "23000000030000000000000000000000" + "04000000000000000200000001000000" + "616200"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, (0, 0)), (-1, (0, 0)), (1.5, (1, 500_000_000)), (60, (60, 0)), (math.inf, (86_400, 0)), (1e9, (86_400, 0))],
)
def test_timeouts_are_cut_at_a_day(seconds: float, expected: tuple[int, int]) -> None:
    """Immutable means a day, strict means not at all."""
    assert timeout_of(seconds) == expected


def test_no_writing_request_is_one_without_an_answer() -> None:
    """EROFS is never sent to a message that must not be answered."""
    assert not protocol.WRITING & protocol.UNANSWERED
