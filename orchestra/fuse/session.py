"""One FUSE connection: the loop that reads requests, and the table that says who answers which.

Owns: the handshake (INIT), forgetting, interrupts, and the promise that every request is answered whatever happens.
Leaves to others: names, directories and files answer for themselves; mount.py makes the device; supervisor.py ends it.

Hits are answered in the loop's thread: a hand-over to a worker costs more than the answer. Whatever would wait goes to
the channel's threads, so a reader of an uncached file never holds up another. A session knows nothing of how its
device came to be, so that several of them may serve one mount (each on a cloned descriptor, with a shared table).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from orchestra.client.contract import Client
from orchestra.errors import MountError
from orchestra.fuse import protocol
from orchestra.fuse.channel import Channel
from orchestra.fuse.counters import Counters
from orchestra.fuse.details import Details
from orchestra.fuse.directories import Directories
from orchestra.fuse.files import Files
from orchestra.fuse.inodes import Inode, InodeTable
from orchestra.fuse.names import Attributes, Names
from orchestra.fuse.notices import Notices
from orchestra.fuse.options import (
    BACKGROUND_MAX,
    PAGES_MAX,
    READ_BYTES_MAX,
    WRITE_BYTES_MAX,
    Mode,
    MountOptions,
)
from orchestra.fuse.protocol import (
    BODY,
    HEADER_IN,
    OPCODE_COUNT,
    RESENT_BIT,
    UNANSWERED,
    WRITING,
    InitFlag,
    Opcode,
)
from orchestra.fuse.shared import INIT_FLAGS
from orchestra.values import Entry

log = logging.getLogger(__name__)

Handler = Callable[[int, int, int], None]  # unique, nodeid, end of the request in the buffer

# ASYNC_READ: read-aheads are asked for at the same time. ASYNC_DIO would do so for the parts of a large direct read,
# but then its reader sleeps uninterruptibly until all are answered; without it a signal ends the read at once.
# DO_READDIRPLUS without its AUTO: the kernel would guess when attributes are wanted; directories.py knows more.
# EXPLICIT_INVAL_DATA: an inode is one version, so the kernel need never drop pages because attributes moved.
# NO_EXPORT_SUPPORT: our numbers die with the session; a file handle made of one must not outlive it.
_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.DO_READDIRPLUS
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.INIT_EXT
    | InitFlag.HAS_EXPIRE_ONLY
    | InitFlag.NO_EXPORT_SUPPORT
    | InitFlag.HAS_RESEND
)
# One stacked file system: the backing files lie on a plain one. 2 would forbid an overlay on top of the mount.
_STACK_DEPTH = 1
# The device has no more requests: unmounted, aborted, or our descriptor was closed.
_ENDED = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})


class Session:
    """Serves `client` on an open /dev/fuse descriptor until the mount is gone.

    `root` is the entry shown as the mount's root. `counters` may be read from any thread.
    """

    def __init__(
        self, device_fd: int, client: Client, root: Entry, options: MountOptions, *, table: InodeTable | None = None
    ) -> None:
        self.counters = Counters()
        self.table = table or InodeTable(root)
        self.channel = Channel(
            device_fd, self.counters, threads_max=options.threads_max, daemon_wait_s=options.daemon_wait_s
        )
        self.refusal: MountError | None = None  # why the handshake failed
        self._device_fd = device_fd
        self._options = options
        self._incoming = self.table.memory.request_buffer(self.table.slot)
        attributes = Attributes(client, root, options)
        self.notices = Notices(device_fd, self.table, self.counters)
        self._names = Names(client, self.table, self.channel, attributes, self._incoming, self.notices)
        self._directories = Directories(client, self.table, self.channel, attributes, self._incoming)
        self._files = Files(client, self.table, self.channel, options, self._incoming, self._names.suspect)
        self.details = Details(client, self.table, self.channel, self._incoming)
        self._handlers = self._table_of_handlers()
        self.other_devices: tuple[int, ...] = ()  # where the requests of other workers are answered

    def take_over(self) -> None:
        """Go on where another worker of this slot was killed: finish its last FORGET, and have what it left unanswered
        sent again. Before `run`."""
        self._accept(InitFlag(self.table.memory.words[INIT_FLAGS]))
        length, opcode, unique, nodeid, *_ = HEADER_IN.unpack_from(self._incoming)
        if length >= BODY and opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
            items = self._forgets_in(opcode, nodeid, length)
            self.table.forget_asked(unique, items, self.table.forgets_done(unique))
        self.channel.send(protocol.resend_message())
        self.channel.run_aside(self.details.renew)

    def run(self) -> None:
        """Answer requests until the mount is gone; returns then. Raises what a signal handler raises."""
        incoming = [self._incoming]
        readv, device_fd, unpack = os.readv, self._device_fd, HEADER_IN.unpack_from
        handlers, requests, buffer = self._handlers, self.counters.requests, self._incoming
        misses = self._files.misses
        os.set_blocking(device_fd, True)  # one who died may have left it otherwise
        try:
            while True:
                if misses.waiting and not misses.wait():
                    continue
                try:
                    end = readv(device_fd, incoming)
                except OSError as error:
                    if error.errno in _ENDED:
                        return
                    if error.errno == errno.ENOENT:  # the asker was killed before we read its request
                        continue
                    if error.errno == errno.EAGAIN:  # another worker took it
                        if not misses.waiting:
                            os.set_blocking(device_fd, True)
                        continue
                    raise
                if end < BODY:  # a device that has closed; /dev/fuse itself answers ENODEV
                    return
                _, opcode, unique, nodeid, _, _, _, _, _ = unpack(buffer)
                index = opcode if opcode < OPCODE_COUNT else 0
                requests[index] += 1
                try:
                    if unique >= RESENT_BIT and self._is_done(index, unique):
                        continue
                    handlers[index](unique, nodeid, end)
                except Exception as error:  # noqa: BLE001 - the outermost frame of a request: log it and answer
                    self._answer_failure(index, unique, error)
        finally:
            self._files.close()
            self.channel.close()
            self.notices.close()

    def _is_done(self, opcode: int, unique: int) -> bool:
        """Whether a request that came again needs nothing more; takes back what a dead worker had counted for it."""
        self.counters.resent += 1
        if not self.table.settle(unique):
            return False
        self.channel.send_error(unique, 0)
        return True

    def _answer_failure(self, opcode: int, unique: int, error: Exception) -> None:
        if opcode in UNANSWERED:
            self.counters.errors_unforeseen += 1
            log.error("a %s was dropped", Opcode(opcode).name, exc_info=error)
            return
        self.channel.send_failure(unique, error)

    def _table_of_handlers(self) -> list[Handler]:
        table: list[Handler] = [self._with(errno.ENOSYS)] * OPCODE_COUNT
        for opcode in WRITING:
            table[opcode] = self._with(errno.EROFS)
        table[Opcode.INIT] = self._init
        table[Opcode.DESTROY] = self._with(0)
        table[Opcode.FORGET] = self._forget
        table[Opcode.BATCH_FORGET] = self._batch_forget
        table[Opcode.INTERRUPT] = self._interrupt
        table[Opcode.NOTIFY_REPLY] = self._ignore
        table[Opcode.STATFS] = self.details.statfs
        table[Opcode.ACCESS] = self._access
        table[Opcode.READLINK] = self._with(errno.EINVAL)
        # Python's open() asks every file whether it is a terminal, and the kernel asks us, whatever we answered before.
        table[Opcode.IOCTL] = self._with(errno.ENOTTY)
        table[Opcode.LOOKUP] = self._names.lookup
        table[Opcode.GETATTR] = self._names.getattr
        table[Opcode.GETXATTR] = self.details.getxattr
        table[Opcode.LISTXATTR] = self.details.listxattr
        table[Opcode.OPEN] = self._files.open
        table[Opcode.READ] = self._files.read
        table[Opcode.RELEASE] = self._files.release
        table[Opcode.OPENDIR] = self._directories.opendir
        table[Opcode.READDIR] = self._directories.readdir
        table[Opcode.READDIRPLUS] = self._directories.readdirplus
        table[Opcode.RELEASEDIR] = self._directories.releasedir
        return table

    def _with(self, errno_code: int) -> Handler:
        """Return a handler that always answers the same. ENOSYS: the kernel then never asks again, or does without
        (FLUSH, FSYNC, STATX, POLL, LSEEK: data to the end, as it should be)."""

        def answer(unique: int, nodeid: int, end: int) -> None:
            self.channel.send_error(unique, errno_code)

        return answer

    def _ignore(self, unique: int, nodeid: int, end: int) -> None:
        """A message without an answer that means nothing here."""

    # -- the session itself ---------------------------------------------------------------------------------------

    def _init(self, unique: int, nodeid: int, end: int) -> None:
        major, minor, readahead, offered = protocol.unpack_init(memoryview(self._incoming)[BODY:end])
        if major != protocol.KERNEL_MAJOR or minor < 36:  # 7.36 (Linux 5.16) brought INIT_EXT
            self._refuse(
                unique, f"the kernel speaks FUSE {major}.{minor}, and orchestra needs 7.36 (Linux 5.16) or later"
            )
            return
        flags = _WANTED & offered
        mode = self._options.mode
        if mode is not Mode.PAGECACHE and offered & InitFlag.PASSTHROUGH:
            flags |= InitFlag.PASSTHROUGH
        elif mode is Mode.PASSTHROUGH:
            self._refuse(
                unique, "mode passthrough needs Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH; use mode auto"
            )
            return
        self.table.memory.put(INIT_FLAGS, int(flags))
        self._accept(flags)
        self.channel.send(
            protocol.init_reply(
                unique,
                minor=min(minor, protocol.KERNEL_MINOR),
                max_readahead_bytes=max(readahead, READ_BYTES_MAX),
                flags=flags,
                max_background=BACKGROUND_MAX,
                max_write_bytes=WRITE_BYTES_MAX,
                max_pages=PAGES_MAX,
                max_stack_depth=_STACK_DEPTH if flags & InitFlag.PASSTHROUGH else 0,
            )
        )

    def _accept(self, flags: InitFlag) -> None:
        """Go by what was agreed with the kernel."""
        self._files.passthrough_allowed = bool(flags & InitFlag.PASSTHROUGH)
        if flags & InitFlag.HAS_EXPIRE_ONLY:
            self.notices.flags = protocol.EXPIRE_ONLY

    def _refuse(self, unique: int, sentence: str) -> None:
        self.refusal = MountError(sentence)
        self.channel.send_error(unique, errno.EPROTO)

    def _forget(self, unique: int, nodeid: int, end: int) -> None:
        self._forget_all(unique, self._forgets_in(Opcode.FORGET, nodeid, end))

    def _batch_forget(self, unique: int, nodeid: int, end: int) -> None:
        self._forget_all(unique, self._forgets_in(Opcode.BATCH_FORGET, nodeid, end))

    def _forgets_in(self, opcode: int, nodeid: int, end: int) -> list[tuple[int, int]]:
        """Return the (number, look-ups) pairs of the request that was read last."""
        if opcode == Opcode.FORGET:
            return [(nodeid, protocol.LOOKUP_COUNT.unpack_from(self._incoming, BODY)[0])]
        return list(protocol.unpack_forgets(self._incoming[BODY:end]))

    def _forget_all(self, unique: int, items: list[tuple[int, int]]) -> None:
        for inode in self.table.forget_asked(unique, items):
            self._forgotten(inode)

    def _forgotten(self, inode: Inode) -> None:
        if inode.entry.is_directory:
            self._directories.forgotten(inode.nodeid)
        else:
            self._files.drop(inode.nodeid)

    def _interrupt(self, unique: int, nodeid: int, end: int) -> None:
        (target,) = protocol.INTERRUPT_IN.unpack_from(self._incoming, BODY)
        if not self.channel.interrupt(target):
            # Whichever worker has it; a device that does not knows no such request, and says so to nobody.
            for device_fd in self.other_devices:
                self.channel.interrupt_at(device_fd, target)

    def _access(self, unique: int, nodeid: int, end: int) -> None:
        (mask,) = protocol.ACCESS_IN.unpack_from(self._incoming, BODY)
        self.channel.send_error(unique, errno.EROFS if mask & protocol.ACCESS_WRITE else 0)
