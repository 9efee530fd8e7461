"""The session answers every request. The device is one end of a packet socket, the kernel is the test."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.fuse.options import Mode, MountOptions
from orchestra.fuse.protocol import (
    ATTR_REPLY,
    DIRENT,
    ENTRY,
    ENTRY_REPLY,
    HEADER_IN,
    HEADER_OUT,
    OPCODE_COUNT,
    OPEN_REPLY,
    UNANSWERED,
    WRITING,
    InitFlag,
    Opcode,
)
from orchestra.fuse.session import Session
from orchestra.values import Entry, EntryKind
from tests.support.folder_client import FolderClient


class Kernel:
    """Asks a session running in a thread."""

    def __init__(self, folder: Path, mode: Mode = Mode.AUTO) -> None:
        self.client = FolderClient(folder)
        self._socket, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(20)
        options = MountOptions(mode=mode, uid=1000, gid=1001, umask=0o027)
        self.session = Session(self._device.fileno(), self.client, self.client.look("/"), options)
        self._thread = threading.Thread(target=self.session.run)
        self._thread.start()
        self._unique = 0

    def tell(self, opcode: int, nodeid: int, body: bytes) -> int:
        """Send a request; return its number."""
        self._unique += 2
        self._socket.send(
            HEADER_IN.pack(HEADER_IN.size + len(body), opcode, self._unique, nodeid, 0, 0, 0, 0, 0) + body
        )
        return self._unique

    def ask(self, opcode: int, nodeid: int, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return (errno, whole message) of its answer."""
        unique = self.tell(opcode, nodeid, body)
        code, answered, message = self.answer()
        assert answered == unique
        return code, message

    def answer(self) -> tuple[int, int, bytes]:
        """Return (errno, number, whole message) of the next answer."""
        message = self._socket.recv(1 << 21)
        length, code, unique = HEADER_OUT.unpack_from(message)
        assert length == len(message)
        return -code, unique, message

    def init(self, minor: int = 45, flags: int = (1 << 40) - 1) -> tuple[int, bytes]:
        body = struct.pack("<IIIII", 7, minor, 131072, flags & 0xFFFFFFFF, flags >> 32) + bytes(44)
        return self.ask(Opcode.INIT, 0, body)

    def lookup(self, name: bytes, parent: int = 1) -> tuple[int, ...]:
        """Return the fields of the entry that LOOKUP answered."""
        code, message = self.ask(Opcode.LOOKUP, parent, name + b"\0")
        assert code == 0
        return ENTRY_REPLY.unpack(message)[3:]

    def read_names(self, opcode: int, fh: int, offset: int = 0, size: int = 4096) -> list[tuple[bytes, int, int]]:
        """Return (name, nodeid, offset of the next) of one answer to READDIR or READDIRPLUS."""
        code, message = self.ask(opcode, 1, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0))
        assert code == 0
        assert len(message) - HEADER_OUT.size <= size
        found, at = [], HEADER_OUT.size
        while at < len(message):
            nodeid = 0
            if opcode == Opcode.READDIRPLUS:
                nodeid = ENTRY.unpack_from(message, at)[0]
                at += ENTRY.size
            _, next_offset, length, _ = DIRENT.unpack_from(message, at)
            start = at + DIRENT.size
            found.append((message[start : start + length], nodeid, next_offset))
            at = start + (length + 7 & ~7)
        return found

    def opendir(self) -> int:
        code, message = self.ask(Opcode.OPENDIR, 1, bytes(8))
        assert code == 0
        return int(OPEN_REPLY.unpack(message)[3])

    def close(self) -> None:
        self._socket.close()
        self._thread.join(20)
        assert not self._thread.is_alive(), "the session did not end with its device"
        self._device.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"hello")
    (tmp_path / "d").mkdir()
    return tmp_path


@pytest.fixture
def kernel(folder: Path) -> Iterator[Kernel]:
    kernel = Kernel(folder)
    kernel.init()
    yield kernel
    kernel.close()


def test_the_handshake_takes_only_what_the_kernel_offers(folder: Path) -> None:
    """A kernel without passthrough gets a session without it."""
    kernel = Kernel(folder)
    code, message = kernel.init(flags=int(InitFlag.ASYNC_READ | InitFlag.INIT_EXT))
    flags, flags2 = struct.unpack_from("<I", message, 16 + 12)[0], struct.unpack_from("<I", message, 16 + 32)[0]
    kernel.close()
    assert (code, flags, flags2) == (0, int(InitFlag.ASYNC_READ | InitFlag.INIT_EXT), 0)


def test_mode_passthrough_is_refused_where_the_kernel_has_none(folder: Path) -> None:
    """It says so instead of being slow."""
    kernel = Kernel(folder, Mode.PASSTHROUGH)
    code, _ = kernel.init(flags=int(InitFlag.INIT_EXT))
    kernel.close()
    assert code == errno.EPROTO
    assert "mode auto" in str(kernel.session.refusal)


def test_a_kernel_that_is_too_old_is_refused(folder: Path) -> None:
    """With the versions in the sentence."""
    kernel = Kernel(folder)
    code, _ = kernel.init(minor=31)
    kernel.close()
    assert code == errno.EPROTO
    assert "7.31" in str(kernel.session.refusal)


def test_what_changes_after_the_end_is_told_to_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that comes when the session has ended begins no process: the device's number may be another file's."""
    kernel = Kernel(folder)
    kernel.init()
    kernel.lookup(b"a")
    kernel.close()
    monkeypatch.setattr("orchestra.fuse.children.spawn", lambda *_, **__: pytest.fail("a process was begun"))
    kernel.session.notices.expire("/a")


def test_every_opcode_is_answered(kernel: Kernel) -> None:
    """Whatever the body: a request that stays unanswered would hang its caller for ever."""
    for opcode in range(OPCODE_COUNT + 20):
        if opcode not in UNANSWERED:
            kernel.ask(opcode, 1, bytes(80))
    assert kernel.lookup(b"a")[0] > 1


def test_messages_without_an_answer_get_none(kernel: Kernel) -> None:
    """Also when they make no sense: the next request's answer is the next message."""
    kernel.tell(Opcode.FORGET, 999, bytes(8))
    kernel.tell(Opcode.FORGET, 999, b"")
    kernel.tell(Opcode.BATCH_FORGET, 0, struct.pack("<II", 5, 0))
    kernel.tell(Opcode.INTERRUPT, 0, bytes(8))
    assert kernel.ask(Opcode.STATFS, 1)[0] == 0


@pytest.mark.parametrize("opcode", sorted(WRITING))
def test_writing_is_refused(kernel: Kernel, opcode: Opcode) -> None:
    """EROFS, should the kernel ever ask."""
    assert kernel.ask(opcode, 1, bytes(80))[0] == errno.EROFS


def test_a_number_that_was_never_given_is_stale(kernel: Kernel) -> None:
    """ESTALE, for everything that names an inode."""
    for opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.OPEN, Opcode.READ, Opcode.OPENDIR):
        assert kernel.ask(opcode, 77, b"x\0" + bytes(40))[0] == errno.ESTALE, opcode


def test_a_defect_below_is_answered_eio_and_the_loop_goes_on(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    """An exception nobody foresaw reaches the log, not the kernel."""
    kernel.client.defects.add("/a")
    assert kernel.ask(Opcode.LOOKUP, 1, b"a\0")[0] == errno.EIO
    assert "ZeroDivisionError" in caplog.text
    assert kernel.lookup(b"d")[0] > 1


def test_attributes_are_the_mounts_and_the_entrys(kernel: Kernel) -> None:
    """Owner and umask from the options; size from the entry; one link."""
    fields = kernel.lookup(b"a")
    size, mode, nlink, uid, gid = fields[7], fields[15], fields[16], fields[17], fields[18]
    assert (size, oct(mode), nlink, uid, gid) == (5, oct(0o100440), 1, 1000, 1001)


def test_a_files_attributes_never_expire_and_its_name_does(kernel: Kernel) -> None:
    """An inode is one version, so only the way to it can change."""
    fields = kernel.lookup(b"a")
    assert (fields[2], fields[3]) == (60, 86_400)


def test_a_name_over_255_bytes_is_too_long(kernel: Kernel) -> None:
    """Counted in bytes."""
    assert kernel.ask(Opcode.LOOKUP, 1, "ä".encode() * 128 + b"\0")[0] == errno.ENAMETOOLONG


def test_names_that_no_path_can_spell_are_hidden_and_counted(kernel: Kernel) -> None:
    """The kernel would refuse the whole directory; offsets of the others are kept."""
    names = ["/..", "/.", "/a//b", "/nul\0", "/" + "n" * 256, "/"]
    kernel.client.extra = [Entry(name, EntryKind.FILE, 0, 0, "v") for name in names]
    bad = [entry.name for entry in kernel.client.extra]
    assert "b" in bad  # "a//b" has the name "b": the client splits keys, only the last part reaches us
    found = [name for name, _, _ in kernel.read_names(Opcode.READDIR, kernel.opendir())]
    assert found == [b".", b"..", b"a", b"b", b"d"]
    assert kernel.session.counters.names_hidden == 5


def test_a_directory_of_hidden_names_only_still_ends(kernel: Kernel) -> None:
    """More hidden names in a row than one answer holds do not look like the end."""
    extra = [Entry(f"/{'x' * 250}{index:06}", EntryKind.FILE, 0, 0, "v") for index in range(1500)]
    kernel.client.extra = [*extra, Entry("/zz", EntryKind.FILE, 0, 0, "v")]
    fh = kernel.opendir()
    found = kernel.read_names(Opcode.READDIR, fh)
    assert [name for name, _, _ in kernel.read_names(Opcode.READDIR, fh, found[-1][2])] == [b"zz"]


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
def test_a_directory_can_be_read_on_from_any_offset(kernel: Kernel, folder: Path, opcode: Opcode) -> None:
    """In small answers, from every offset, the rest is the same."""
    for index in range(30):
        (folder / f"f{index:02}").touch()
    fh = kernel.opendir()
    whole: list[tuple[bytes, int, int]] = []
    while piece := kernel.read_names(opcode, fh, whole[-1][2] if whole else 0, 600):
        whole += piece
    names = [name for name, _, _ in whole]
    assert names == [b".", b"..", b"a", b"d", *(b"f%02d" % index for index in range(30))]
    for position, (_, _, offset) in enumerate(whole[:-1]):
        assert kernel.read_names(opcode, fh, offset, 600)[0][0] == names[position + 1]


def test_readdirplus_counts_a_look_up_for_every_name_but_the_dots(kernel: Kernel) -> None:
    """Forgetting each once leaves only the root."""
    found = kernel.read_names(Opcode.READDIRPLUS, kernel.opendir())
    nodeids = [nodeid for _, nodeid, _ in found]
    assert nodeids[:2] == [0, 0]
    assert len(kernel.session.table) == 3
    pairs = b"".join(struct.pack("<QQ", nodeid, 1) for nodeid in nodeids[2:])
    kernel.tell(Opcode.BATCH_FORGET, 0, struct.pack("<II", 2, 0) + pairs)
    assert kernel.ask(Opcode.STATFS, 1)[0] == 0
    assert len(kernel.session.table) == 1


@pytest.mark.parametrize("limit", ["PRIMED_ENTRIES_MAX", "PRIMED_INODES_MAX"])
def test_a_huge_directory_or_table_hands_over_names_only(
    kernel: Kernel, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing millions of names makes no millions of inodes."""
    monkeypatch.setattr(f"orchestra.fuse.directories.{limit}", 1)
    found = kernel.read_names(Opcode.READDIRPLUS, kernel.opendir())
    assert [(name, nodeid) for name, nodeid, _ in found] == [(b".", 0), (b"..", 0), (b"a", 0), (b"d", 0)]
    assert len(kernel.session.table) == 1


def test_a_huge_directory_whose_names_are_looked_up_hands_over_attributes(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ls -l` looks the first names up, and the next answer spares it the rest."""
    monkeypatch.setattr("orchestra.fuse.directories.PRIMED_ENTRIES_MAX", 1)
    fh = kernel.opendir()
    nodeid = kernel.lookup(b"a")[0]
    assert kernel.read_names(Opcode.READDIRPLUS, fh)[2][1] == nodeid
    assert kernel.read_names(Opcode.READDIRPLUS, fh)[2][1] == 0


def test_the_version_is_an_extended_attribute(kernel: Kernel) -> None:
    """Asked for its size, in a buffer that is too small, and in one that is not."""
    nodeid = kernel.lookup(b"a")[0]
    version = kernel.client.look("/a").version.encode()
    name = b"user.orchestra.version\0"
    code, message = kernel.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", 0, 0) + name)
    assert (code, struct.unpack_from("<I", message, 16)[0]) == (0, len(version))
    assert kernel.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", 1, 0) + name)[0] == errno.ERANGE
    assert kernel.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", 99, 0) + name)[1][16:] == version
    assert kernel.ask(Opcode.LISTXATTR, nodeid, struct.pack("<II", 99, 0))[1][16:] == name
    assert kernel.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", 99, 0) + b"user.other\0")[0] == errno.ENODATA
    assert kernel.ask(Opcode.GETXATTR, 1, struct.pack("<II", 99, 0) + name)[0] == errno.ENODATA


def test_a_handle_dropped_while_it_is_read_is_closed_by_its_reader(kernel: Kernel) -> None:
    """RELEASE during a waiting read (an interrupted one) closes nothing under the reader."""
    kernel.client.uncache("/a")
    nodeid = ENTRY_REPLY.unpack(kernel.ask(Opcode.LOOKUP, 1, b"a\0")[1])[3]
    code, message = kernel.ask(Opcode.OPEN, nodeid, bytes(8))
    fh = OPEN_REPLY.unpack(message)[3]
    assert code == 0
    kernel.client.hold("/a")
    unique = kernel.tell(Opcode.READ, nodeid, struct.pack("<QQIIQII", fh, 0, 4096, 0, 0, 0, 0))
    kernel.client.wait_held(1)
    kernel.tell(Opcode.INTERRUPT, 0, struct.pack("<Q", unique))
    assert kernel.answer()[:2] == (errno.EINTR, unique)
    assert kernel.ask(Opcode.RELEASE, nodeid, struct.pack("<QIIQ", fh, 0, 0, 0))[0] == 0
    assert kernel.client.handles_open == 1
    kernel.client.release("/a")
    kernel.client.wait_no_handles()


def test_getattr_of_the_root_is_answered(kernel: Kernel) -> None:
    """A directory with one link, owned as the mount says."""
    code, message = kernel.ask(Opcode.GETATTR, 1, bytes(16))
    fields = ATTR_REPLY.unpack(message)
    assert (code, fields[6], oct(fields[15]), fields[16]) == (0, 1, oct(0o040550), 1)


def test_a_listing_that_did_not_change_keeps_the_kernels_copy(kernel: Kernel, folder: Path) -> None:
    """The same view: keep; a newer one: start anew; a newer one while the old is open: no copy at all."""

    def flags() -> tuple[int, int]:
        code, message = kernel.ask(Opcode.OPENDIR, 1, bytes(8))
        assert code == 0
        _, _, _, fh, bits, _ = OPEN_REPLY.unpack(message)
        return fh, bits

    cache, keep = 8, 8 | 2
    first, bits = flags()
    assert bits == cache
    second, bits = flags()
    assert bits == keep
    (folder / "new").touch()
    os.utime(folder, ns=(1, 1))
    third, bits = flags()
    assert bits == 0
    for fh in (first, second, third):
        assert kernel.ask(Opcode.RELEASEDIR, 1, struct.pack("<QIIQ", fh, 0, 0, 0))[0] == 0
    assert flags()[1] == cache


@pytest.mark.parametrize(("mode", "limit"), [(Mode.AUTO, "HANDLES_MAX"), (Mode.PAGECACHE, "PAGECACHE_HANDLES_MAX")])
def test_handles_of_half_read_files_are_bounded(
    folder: Path, mode: Mode, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is closed and opened again when it is next read; one read to its end is closed at once."""
    monkeypatch.setattr(f"orchestra.fuse.files.{limit}", 3)
    for index in range(5):
        (folder / f"f{index}").write_bytes(bytes([index]) * 5000)
    kernel = Kernel(folder, mode)
    kernel.init()
    nodeids = [kernel.lookup(f"f{index}".encode())[0] for index in range(5)]
    for offset, open_count in ((0, 3), (904, 3), (1904, 0)):
        for index, nodeid in enumerate(nodeids):
            code, message = kernel.ask(Opcode.READ, nodeid, struct.pack("<QQIIQII", 0, offset, 4000, 0, 0, 0, 0))
            assert (code, message[HEADER_OUT.size :]) == (0, bytes([index]) * min(4000, 5000 - offset))
        kernel.ask(Opcode.STATFS, 1)  # the loop closes a handle after its answer is out, and before the next
        assert kernel.client.handles_open == open_count
    kernel.close()
