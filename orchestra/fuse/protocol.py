"""The kernel's FUSE protocol (7.45) as bytes: numbers, structs, and functions that pack and unpack messages.

Owns: the layout of every message that a read-only file system sees, little-endian, golden-tested. Leaves to others:
what to answer. Nothing here does I/O, and nothing here knows a path.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

KERNEL_MAJOR = 7
KERNEL_MINOR = 45
ROOT_NODEID = 1
# Set in the number of a request that the kernel sends again; the answer bears the same number.
RESENT_BIT = 1 << 63


class Opcode(enum.IntEnum):
    """What the kernel asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


# The opcodes are an index into the session's table; the rest of the table answers ENOSYS.
OPCODE_COUNT = 64
# The messages that have no answer: answering one would be an error on the device.
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})
# Everything that would change the tree; a read-only mount refuses it with EROFS (the kernel does so first).
WRITING = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.RENAME2,
        Opcode.LINK,
        Opcode.WRITE,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
        Opcode.COPY_FILE_RANGE_64,
    }
)


class InitFlag(enum.IntFlag):
    """Bits of INIT; those from 32 up travel in `flags2` and count only with INIT_EXT."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39


class OpenFlag(enum.IntFlag):
    """Bits of the answers to OPEN and OPENDIR."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7
# With this flag a name is looked up again at its next use; without it, what is mounted below would be detached too.
EXPIRE_ONLY = 1

# ioctls of /dev/fuse: _IOW(229, 1, 16 bytes), _IOW(229, 2, u32), _IOR(229, 0, u32).
BACKING_OPEN = 0x4010E501
BACKING_CLOSE = 0x4004E502
DEV_IOC_CLONE = 0x8004E500
BACKING_MAP = struct.Struct("<iIQ")

HEADER_IN = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
HEADER_OUT = struct.Struct("<IiQ")  # len, -errno, unique
BODY = HEADER_IN.size  # where the body of a request begins
HEAD = HEADER_OUT.size

INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags
INIT_IN_FLAGS2 = struct.Struct("<I")
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH11H")
LOOKUP_COUNT = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")
BATCH_FORGET_IN = struct.Struct("<II")
GETATTR_IN = struct.Struct("<IIQ")
OPEN_IN = struct.Struct("<II")
READ_IN = struct.Struct("<QQI")  # fh, offset, size; also READDIR and READDIRPLUS
RELEASE_IN = struct.Struct("<QI")  # fh, flags
INTERRUPT_IN = struct.Struct("<Q")
ACCESS_IN = struct.Struct("<I")
GETXATTR_IN = struct.Struct("<II")

_ATTR = "6Q10I"
ATTR = struct.Struct("<" + _ATTR)
ENTRY = struct.Struct("<QQQQII" + _ATTR)  # nodeid, generation, entry_valid, attr_valid, their nanoseconds, attr
ENTRY_REPLY = struct.Struct("<IiQQQQQII" + _ATTR)
ATTR_REPLY = struct.Struct("<IiQQII" + _ATTR)
OPEN_REPLY = struct.Struct("<IiQQIi")
STATFS_REPLY = struct.Struct("<IiQ5Q4I6I")
GETXATTR_REPLY = struct.Struct("<IiQII")
DIRENT = struct.Struct("<QQII")  # ino, offset of the next entry, name's length, type; the name follows, padded to 8
INVAL_ENTRY = struct.Struct("<IiQQII")

S_IFDIR = 0o040000
S_IFREG = 0o100000
DT_DIR = S_IFDIR >> 12
DT_REG = S_IFREG >> 12
ACCESS_WRITE = 2

Attr = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]
# Seconds and nanoseconds, as timeouts travel.
Timeout = tuple[int, int]

# The kernel counts timeouts in jiffies and treats years as "for ever"; a day asks again soon enough after a mistake.
TIMEOUT_LIMIT_S = 86_400.0


def timeout_of(seconds: float) -> Timeout:
    """Return `seconds` (inf allowed) as the kernel reads it, cut at a day."""
    if seconds <= 0:
        return (0, 0)
    whole = min(seconds, TIMEOUT_LIMIT_S)
    return (int(whole), int((whole - int(whole)) * 1_000_000_000))


def error_reply(unique: int, errno_code: int) -> bytes:
    """Return the answer that carries an errno; 0 is plain success without a body."""
    return HEADER_OUT.pack(HEAD, -errno_code, unique)


def data_reply(unique: int, data: bytes) -> bytes:
    """Return a successful answer with `data` as its body."""
    return HEADER_OUT.pack(HEAD + len(data), 0, unique) + data


def entry_reply(unique: int, nodeid: int, entry_timeout: Timeout, attr_timeout: Timeout, attr: Attr) -> bytes:
    """Return the answer to LOOKUP: the name leads to `nodeid` for `entry_timeout`."""
    return ENTRY_REPLY.pack(
        ENTRY_REPLY.size,
        0,
        unique,
        nodeid,
        0,
        entry_timeout[0],
        attr_timeout[0],
        entry_timeout[1],
        attr_timeout[1],
        *attr,
    )


_NO_ATTR: Attr = (0,) * 16


def negative_entry_reply(unique: int, entry_timeout: Timeout) -> bytes:
    """Return the answer to LOOKUP that says "no such name" for `entry_timeout`; the kernel remembers it."""
    return entry_reply(unique, 0, entry_timeout, (0, 0), _NO_ATTR)


def attr_reply(unique: int, attr_timeout: Timeout, attr: Attr) -> bytes:
    """Return the answer to GETATTR."""
    return ATTR_REPLY.pack(ATTR_REPLY.size, 0, unique, attr_timeout[0], attr_timeout[1], 0, *attr)


def open_reply(unique: int, fh: int, flags: int, backing_id: int = 0) -> bytes:
    """Return the answer to OPEN and OPENDIR."""
    return OPEN_REPLY.pack(OPEN_REPLY.size, 0, unique, fh, flags, backing_id)


def statfs_reply(
    unique: int, *, blocks: int, blocks_free: int, files: int, block_size_bytes: int, name_bytes_max: int
) -> bytes:
    """Return the answer to STATFS of a file system that nobody may write to: nothing is available."""
    return STATFS_REPLY.pack(
        STATFS_REPLY.size,
        0,
        unique,
        blocks,
        blocks_free,
        0,
        files,
        0,
        block_size_bytes,
        name_bytes_max,
        block_size_bytes,
        0,
        *(0,) * 6,
    )


def xattr_size_reply(unique: int, size_bytes: int) -> bytes:
    """Return the answer to GETXATTR or LISTXATTR that only says how large a buffer is needed."""
    return GETXATTR_REPLY.pack(GETXATTR_REPLY.size, 0, unique, size_bytes, 0)


def expire_entry_message(parent_nodeid: int, name: bytes, flags: int) -> bytes:
    """Return the notification that makes the kernel look `name` up again at its next use."""
    size = INVAL_ENTRY.size + len(name) + 1
    return INVAL_ENTRY.pack(size, NOTIFY_INVAL_ENTRY, 0, parent_nodeid, len(name), flags) + name + b"\0"


def resend_message() -> bytes:
    """Return the notification that makes the kernel send every unanswered request again."""
    return HEADER_OUT.pack(HEAD, NOTIFY_RESEND, 0)


def init_reply(
    unique: int,
    *,
    minor: int,
    max_readahead_bytes: int,
    flags: InitFlag,
    max_background: int,
    max_write_bytes: int,
    max_pages: int,
    max_stack_depth: int,
) -> bytes:
    """Return the answer to INIT; `flags` must be a part of what the kernel offered."""
    bits = int(flags)
    return HEADER_OUT.pack(HEAD + INIT_OUT.size, 0, unique) + INIT_OUT.pack(
        KERNEL_MAJOR,
        minor,
        max_readahead_bytes,
        bits & 0xFFFFFFFF,
        max_background,
        max_background * 3 // 4,  # congestion threshold, the kernel's own ratio
        max_write_bytes,
        1,  # time granularity, ns
        max_pages,
        0,
        bits >> 32,
        max_stack_depth,
        0,  # request timeout: none
        *(0,) * 11,
    )


def unpack_init(body: memoryview) -> tuple[int, int, int, InitFlag]:
    """Return (major, minor, max_readahead, flags offered) of an INIT request's body."""
    major, minor, max_readahead, flags = INIT_IN.unpack_from(body)
    if flags & InitFlag.INIT_EXT and len(body) >= INIT_IN.size + INIT_IN_FLAGS2.size:
        flags |= INIT_IN_FLAGS2.unpack_from(body, INIT_IN.size)[0] << 32
    return major, minor, max_readahead, InitFlag(flags)


def unpack_forgets(body: memoryview) -> Iterator[tuple[int, int]]:
    """Return the (nodeid, look-ups) pairs of a BATCH_FORGET request's body."""
    (count, _) = BATCH_FORGET_IN.unpack_from(body)
    start = BATCH_FORGET_IN.size
    return FORGET_ONE.iter_unpack(body[start : start + count * FORGET_ONE.size])
