"""What a mount can be told, as plain values, and the limits of the FUSE face with their reasons."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from orchestra.units import KIB, MIB


class Mode(enum.StrEnum):
    """How opened files are served; see docs and DESIGN section 6."""

    AUTO = "auto"  # large complete objects by passthrough, everything else by the process and the kernel's page cache
    PASSTHROUGH = "passthrough"  # every complete object by passthrough; refuses to mount where the kernel forbids it
    PAGECACHE = "pagecache"  # no OPEN and RELEASE messages at all; warm reads come from the kernel's page cache


# The largest request the kernel makes with its default fs.fuse.max_pages_limit of 256 pages.
READ_BYTES_MAX = 1 * MIB
PAGES_MAX = READ_BYTES_MAX // 4096
# A warm re-read of a 110 kB file costs this process 27 us when the kernel keeps it (OPEN and RELEASE, answered at once)
# and 150 us by passthrough (a hand-over, an open and two ioctls more). Copying 1 MiB once costs more than that.
PASSTHROUGH_SIZE_BYTES = 1 * MIB
# An OPEN that a process answers costs its reader 20 us where both share a core and 140 where they do not; a native one
# costs 4. The kernel stops asking only for good and for all files of a mount, which ends passthrough too: so a mount
# first shows, by so many OPENs, that it is one of small files (docs/decisions/0006-opens-of-small-files.md).
SMALL_OPENS_MAX = 256
# ... or mostly of small ones: by passthrough a GiB costs 0.1 to 0.2 s less than through the page cache, so that an OPEN
# costs what passthrough saves for some 500 kB. A quarter of that, as there is no way back.
OPEN_WORTH_BYTES = 128 * 1024
# Read-ahead requests are "background" for the kernel, whose default lets 12 of them wait; 64 readers of uncached files
# would queue behind one another in the kernel.
BACKGROUND_MAX = 1024
# Enough for the 64 concurrent readers asked for, twice; a waiting thread costs about 100 kB.
THREADS_MAX = 128
# Requests that may queue behind busy threads before the loop stops taking new ones (nothing is refused: they then
# wait in the kernel). The kernel makes one request a waiting reader and BACKGROUND_MAX read-aheads.
BACKLOG_MAX = 4096
# Hints to the kernel that may wait to be sent; more are dropped, and the freshness alone does their work.
ASIDE_MAX = 1024
# 8 KiB is what the kernel insists on; the rest lets one read carry 4,000 forgets.
REQUEST_BYTES_MAX = 64 * KIB
# The kernel needs room for max_write in every read of the device; a read-only mount never uses it.
WRITE_BYTES_MAX = 4096
assert REQUEST_BYTES_MAX >= WRITE_BYTES_MAX + 4096, "the kernel answers EINVAL to reads into a smaller buffer"
# Two requests in flight for a sequential reader, so that the reader copies one while the other is filled.
READ_AHEAD_KIB = 2048
# As much as this is asked for at once, and kept in memory, for each reader of a large file.
READ_AHEAD_KIB_MAX = 1024 * 1024
# Handles kept open for reads in progress; each is one or two descriptors.
HANDLES_MAX = 256
# Without RELEASE nobody says that a file is done with, and an evicted extent occupies its disk until it is closed:
# 64 of 256 MiB are 16 GiB at the very worst.
PAGECACHE_HANDLES_MAX = 64
# Worker processes of one mount; each costs 50 MB, and more than there are cores gain nothing.
WORKERS_MAX = 16
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4096
# A listing hands over attributes with its names: 8 us a name here, against 40 us for the look-up that the file's first
# use would cost. Not for huge directories (few of whose files are used), unless look-ups show that they are wanted, and
# not when so many inodes are known already: each is 500 bytes here and 1 kB in the kernel until it is forgotten.
PRIMED_ENTRIES_MAX = 20_000
PRIMED_INODES_MAX = 250_000
# Listings that the kernel's copies were made from, remembered to tell an unchanged one; each is a mapped file.
LISTINGS_MAX = 1024
# How often a request looks for a daemon that is down; a quarter of what a person notices, and 128 threads do it.
DAEMON_RETRY_S = 0.5
# How long open files of a mount that was asked to end are still served after it has left the tree.
DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Everything about a mount but its client and its folder."""

    root: str = "/"  # the namespace path shown as the mount's root
    source: str = "orchestra"  # what `df` and mountinfo call it: as it was asked for, so that `mount -a` knows it again
    mode: Mode = Mode.AUTO
    uid: int = 0
    gid: int = 0
    umask: int = 0
    allow_other: bool = False
    attr_timeout_s: float | None = None  # None: what the client's freshness says
    daemon_wait_s: float = 0.0  # how long a miss waits for a daemon that somebody else restarts, before EIO
    threads_max: int = THREADS_MAX
    passthrough_size_bytes: int = PASSTHROUGH_SIZE_BYTES
    small_opens_max: int = SMALL_OPENS_MAX  # of `auto`, before the kernel is told not to ask any more
    read_ahead_kib: int = READ_AHEAD_KIB
    cache_dir: Path | None = None  # refused when it lies inside the mount point
