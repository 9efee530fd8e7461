"""Memory of freed batches stays with the process, for the next batch.

Owns: what glibc is told about it. Leaves to others: everything that allocates.
"""

from __future__ import annotations

# glibc gives freed memory at the end of its heap back to the kernel when there is more than a threshold of it, 128 KiB
# at first. An epoch frees and allocates a batch again and again, and the page faults cost more than everything else:
# 78 us of CPU for opening and reading a file of 110 kB, 21 us without them. When a block of mapped memory is freed,
# glibc takes its size for the size below which it maps none, and twice that (32 MiB here, a batch of 290 such files)
# for what it may keep. This is its own rule for programs that free large blocks, so no setting of it is overruled.
_TEACHING_SIZE_BYTES = 16 * 1024 * 1024
assert _TEACHING_SIZE_BYTES <= 32 * 1024 * 1024, "glibc learns from no larger block"

_is_kept = False


def keep_freed_memory() -> None:
    """Have up to 32 MiB of what this process frees kept for its next allocation. Costs 10 us once a process."""
    global _is_kept
    if not _is_kept:
        _is_kept = True
        bytearray(_TEACHING_SIZE_BYTES)  # mapped, not touched, and freed here
