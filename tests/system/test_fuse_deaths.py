"""A mount goes on when its workers are killed, in the middle of what they do; and its end leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from orchestra.fuse import mount, registry, shared
from tests.support.fuse_mounts import needs_fuse
from tests.support.fuse_supervised import Supervised, beside, kill, wait_until

pytestmark = [pytest.mark.system, needs_fuse]

_LARGE = bytes(range(256)) * 16_384  # 4 MiB: passed through when it is cached


class Mount(Protocol):
    def __call__(self, *, workers: int = 1) -> Supervised: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    (folder / "d").mkdir(parents=True)
    for name in ("slow", "slow2", "small"):
        (folder / name).write_bytes(name.encode() * 10_000)
    (folder / "large").write_bytes(_LARGE)
    (folder / "slow-large").write_bytes(_LARGE)
    for index in range(40):
        (folder / "d" / f"f{index:02}").write_bytes(b"%d" % index)
    return folder


@pytest.fixture
def make(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    mounts: list[Supervised] = []

    def make(*, workers: int = 1) -> Supervised:
        mounts.append(Supervised(folder, tmp_path, workers=workers))
        return mounts[-1]

    yield make
    for mounted in mounts:
        mounted.close()


def _wait_gone(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], 60)[0], f"process {pid} is still there"
    finally:
        os.close(pidfd)


def _wait_detached(target: Path) -> None:
    with Path("/proc/self/mountinfo").open() as table:
        poll = select.poll()
        poll.register(table, select.POLLERR | select.POLLPRI)
        while mount.mount_at(str(target)) is not None:
            assert poll.poll(60_000), f"{target} is still mounted"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_held_by_a_killed_worker_gets_its_bytes_from_the_next(make: Mount, workers: int) -> None:
    """The process that has the READ is killed, and again its successor; the reader gets bytes, not an error."""
    mounted = make(workers=workers)
    os.stat(mounted.target / "small")
    with mounted.closed_gate():
        looked_up = beside(lambda: os.stat(mounted.target / "slow").st_size)
        first, _ = mounted.wait_held()
        kill(first)
        second, path = mounted.wait_held()
        assert (second != first, path) == (True, "/slow")
    assert looked_up.result(60) == 40_000
    with mounted.closed_gate():
        reading = beside((mounted.target / "slow").read_bytes)
        for _ in range(3):
            pid, _ = mounted.wait_held()
            kill(pid)
        mounted.wait_held()
    assert reading.result(60) == b"slow" * 10_000


def test_what_is_open_stays_open_and_is_the_same_version_after_a_death(make: Mount, folder: Path) -> None:
    """A passed-through file, a cached one, a directory half read: all go on; the counts are those of before."""
    mounted = make()
    with (
        (mounted.target / "large").open("rb", buffering=0) as large,
        (mounted.target / "slow-large").open("rb", buffering=0) as cached,
        os.scandir(mounted.target / "d") as names,
    ):
        seen = [next(names).name]
        assert cached.read(100) == _LARGE[:100]
        (before,) = mounted.workers
        kill(before)
        assert large.read(1 << 20) == _LARGE[: 1 << 20]
        cached.seek(3 << 20)
        assert cached.read() == _LARGE[3 << 20 :]
        seen += [entry.name for entry in names]
        assert sorted(seen) == sorted(os.listdir(folder / "d"))
    # Closed and opened again: passthrough and cached opens never mix on one inode, or the kernel answers EIO.
    for _ in range(2):
        assert (mounted.target / "large").read_bytes() == _LARGE
    (after,) = mounted.workers
    assert after != before


def test_a_worker_is_replaced_while_the_kernel_holds_a_notification_up(make: Mount, folder: Path) -> None:
    """A look-up that waits for the worker holds its folder, and what is told about a name there waits for that: if the
    worker told it itself it could not be killed, nobody would have the look-up sent again, and all would hang."""
    mounted = make()
    file = os.open(mounted.target / "small", os.O_RDONLY | os.O_DIRECT)
    with mounted.closed_gate():
        looked_up = beside(lambda: os.stat(mounted.target / "slow").st_size)
        pid, _ = mounted.wait_held()
        (folder / "small").write_bytes(b"another version")
        with pytest.raises(OSError) as caught:  # and the folder's kernel copy of "small" is doubted
            os.pread(file, 4096, 0)
        assert caught.value.errno == errno.ESTALE
        kill(pid)
        successor, path = mounted.wait_held()
        assert (successor != pid, path) == (True, "/slow")
    assert looked_up.result(60) == 40_000
    os.close(file)
    try:
        found = (mounted.target / "small").read_bytes()
    except OSError:  # faster than the notification, which waited for the look-up
        found = (mounted.target / "small").read_bytes()
    assert found == b"another version"


def test_a_file_replaced_while_its_worker_was_dead_is_stale_to_who_had_it_open(make: Mount, folder: Path) -> None:
    """The next worker knows the version that was opened, and never serves another's bytes."""
    mounted = make()
    with (mounted.target / "slow-large").open("rb", buffering=0) as file:
        assert file.read(10) == _LARGE[:10]
        kill(mounted.workers[0])
        (folder / "slow-large").write_bytes(b"new" * 1_500_000)
        file.seek(3 << 20)
        with pytest.raises(OSError) as caught:
            file.read()
    assert caught.value.errno is not None


def test_64_readers_survive_a_worker_that_is_killed_among_them(make: Mount, folder: Path) -> None:
    """Every one of them has its READ in flight, and every one gets its bytes."""
    for index in range(64):
        (folder / f"slow{index:02}").write_bytes(b"%02d" % index * 5_000)
    mounted = make()
    sizes = [os.stat(mounted.target / f"slow{index:02}").st_size for index in range(64)]
    assert sizes == [10_000] * 64
    for _ in range(64):
        mounted.wait_held()  # the look-ups
    with mounted.closed_gate():
        reading = [beside((mounted.target / f"slow{index:02}").read_bytes) for index in range(64)]
        holders = {mounted.wait_held()[0] for _ in range(64)}
        (holder,) = holders
        kill(holder)
    assert [future.result(60) for future in reading] == [b"%02d" % index * 5_000 for index in range(64)]


def test_deaths_in_a_row_leave_the_inode_table_exact(make: Mount, folder: Path) -> None:
    """A tree is walked while workers die; everything is found, and a forgotten name is looked up anew."""
    mounted = make()
    for _ in range(6):
        walk = beside(lambda: sorted(p.name for p in mounted.target.rglob("*")))
        kill(mounted.workers[0])
        assert walk.result(60) == sorted(p.name for p in folder.rglob("*"))
        Path("/proc/sys/vm/drop_caches").write_text("2")  # the kernel forgets what it can
        assert (mounted.target / "d" / "f07").read_bytes() == b"7"


def test_what_a_killed_worker_held_goes_to_one_that_lives(make: Mount) -> None:
    """With nobody to stand by, the other worker has it sent again; nobody waits for the start of a third."""
    mounted = make(workers=2)
    os.stat(mounted.target / "slow")
    mounted.wait_held()
    with mounted.closed_starts(), mounted.closed_gate():
        for pid in set(mounted.children()[1:]) - set(mounted.workers):
            kill(pid)  # who stood by, or was about to
        reading = beside((mounted.target / "slow").read_bytes)
        holder, _ = mounted.wait_held()
        (other,) = set(mounted.workers) - {holder}
        kill(holder)
        assert mounted.wait_held() == (other, "/slow")
    assert reading.result(60) == b"slow" * 10_000


def test_workers_and_who_stands_by_killed_at_once_are_started_one_by_one(make: Mount) -> None:
    """One is enough to answer, and is there soonest if it is alone and goes before all other programs; in the end there
    are as many as there were."""
    mounted = make(workers=2)
    mounted.wait_child_count(4)
    watcher, *workers = mounted.children()
    with mounted.closed_starts():
        reading = beside((mounted.target / "small").read_bytes)
        for pid in workers:
            kill(pid)
        wait_until(lambda: len(mounted.children()) == 2 and not set(workers) & set(mounted.children()))
        found, starting = mounted.children()
        assert found == watcher
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, starting) == -20)
    assert reading.result(60) == b"small" * 10_000
    mounted.wait_child_count(4)
    wait_until(lambda: starting in mounted.workers)
    threads = os.listdir(f"/proc/{starting}/task")
    assert len(threads) > 1
    usual = os.getpriority(os.PRIO_PROCESS, mounted.process.pid)
    wait_until(lambda: {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in threads} == {usual})


def test_where_the_kernel_cannot_send_again_a_death_ends_the_mount(make: Mount) -> None:
    """Before Linux 6.9: a reader gets an error instead of waiting for ever, and the folder is a plain one."""
    mounted = make()
    os.stat(mounted.target / "slow")
    mounted.wait_held()
    descriptors = Path(f"/proc/{mounted.process.pid}/fd")
    memory = next(fd for fd in descriptors.iterdir() if "memfd:orchestra-fuse" in os.readlink(fd))
    with memory.open("r+b") as words:
        words.seek(shared.INIT_FLAGS * shared.WORD_BYTES)
        words.write(bytes(shared.WORD_BYTES))
    with mounted.closed_gate():
        reading = beside((mounted.target / "slow").read_bytes)
        holder, _ = mounted.wait_held()
        kill(holder)
        with pytest.raises(OSError) as caught:
            reading.result(60)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert mounted.process.wait(60) == 1
    assert not mounted.is_mounted()


def test_a_supervisor_that_cannot_start_a_worker_tries_again(make: Mount) -> None:
    """No descriptor, or no memory, for one more process: it holds the mount, and goes on when there is one."""
    mounted = make()
    watcher, *workers = mounted.children()
    pid = mounted.process.pid
    lowest = min(set(range(100)) - {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")})
    assert lowest > 8, "what it polls must stay within the limit"
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for worker in workers:
        kill(worker)
    wait_until(lambda: mounted.children() == [watcher])
    reading = beside((mounted.target / "small").read_bytes)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    assert reading.result(60) == b"small" * 10_000


def test_who_stood_by_is_replaced(make: Mount) -> None:
    """Soon, as the next death may come soon."""
    mounted = make()
    mounted.wait_child_count(3)
    _, *both = mounted.children()
    (spare,) = set(both) - set(mounted.workers)
    kill(spare)
    wait_until(lambda: len(set(mounted.children()) - {spare}) == 3)


def test_a_killed_watcher_is_replaced(make: Mount) -> None:
    """The next one is as good, also after an upgrade: it detaches the folder when all others are killed."""
    mounted = make()
    with registry.opened_pids(mounted.workers) as pidfds:
        mounted.process.send_signal(signal.SIGHUP)
        assert registry.wait_all_ended(pidfds, 60)
    for _ in range(2):
        watcher = _watcher_of(mounted)
        kill(watcher)
        wait_until(lambda killed=watcher: _watcher_of(mounted) not in (0, killed))  # type: ignore[misc]
    assert (mounted.target / "small").read_bytes() == b"small" * 10_000
    watcher = _watcher_of(mounted)
    os.kill(mounted.process.pid, signal.SIGSTOP)
    for pid in {*mounted.children(), mounted.process.pid} - {watcher}:
        os.kill(pid, signal.SIGKILL)
    _wait_detached(mounted.target)
    _wait_gone(watcher)


def _watcher_of(mounted: Supervised) -> int:
    """Its pid, 0 if there is none."""
    for pid in mounted.children():
        with contextlib.suppress(OSError):
            if b"watcher.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return 0


def test_a_killed_supervisor_leaves_no_mount_and_open_files_go_on(make: Mount) -> None:
    """The folder is a plain one again; what was open is served to its end, and then nothing is left."""
    mounted = make()
    workers = mounted.children()
    with (mounted.target / "large").open("rb", buffering=0) as large, (mounted.target / "slow").open("rb") as slow:
        mounted.process.send_signal(signal.SIGKILL)
        _wait_detached(mounted.target)
        assert os.listdir(mounted.target) == []
        assert large.read() == _LARGE
        assert slow.read() == b"slow" * 10_000
    for pid in workers:
        _wait_gone(pid)


def test_supervisor_and_workers_killed_at_once_leave_no_dead_mount(make: Mount) -> None:
    """The watcher, whom nobody shot, detaches the folder."""
    mounted = make()
    watcher, *workers = mounted.children()
    os.kill(mounted.process.pid, signal.SIGSTOP)
    for pid in (mounted.process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    _wait_detached(mounted.target)
    assert os.listdir(mounted.target) == []
    _wait_gone(watcher)


def test_all_killed_while_the_kernel_holds_a_notification_up_leave_no_dead_mount(make: Mount, folder: Path) -> None:
    """Who tells the kernel cannot end then, and the mount is not dead by itself: the watcher ends the connection."""
    mounted = make()
    file = os.open(mounted.target / "small", os.O_RDONLY | os.O_DIRECT)
    with mounted.closed_gate():
        looked_up = beside(lambda: os.stat(mounted.target / "slow").st_size)
        mounted.wait_held()
        (folder / "small").write_bytes(b"another version")
        with pytest.raises(OSError):
            os.pread(file, 4096, 0)
        _, *workers = mounted.children()
        os.kill(mounted.process.pid, signal.SIGSTOP)
        for pid in (mounted.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        _wait_detached(mounted.target)
    with pytest.raises(OSError):
        looked_up.result(60)
    os.close(file)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upgrade_exchanges_every_process_under_a_reader(make: Mount, workers: int) -> None:
    """SIGHUP: the same mount and supervisor pid, other workers; a read in flight gets its bytes."""
    mounted = make(workers=workers)
    (mounted.target / "slow").stat()
    mounted.wait_held()
    with mounted.closed_gate():
        reading = beside((mounted.target / "slow").read_bytes)
        mounted.wait_held()
        with registry.opened_pids(mounted.workers) as pidfds:
            assert len(pidfds) == workers
            mounted.wait_child_count(workers + 2)  # the watcher, and who stands by with the old program
            mounted.process.send_signal(signal.SIGHUP)
            assert registry.wait_all_ended(pidfds, 60)
        mounted.wait_held()
    assert reading.result(60) == b"slow" * 10_000
    assert mounted.is_mounted()
    assert (mounted.target / "small").read_bytes() == b"small" * 10_000
    assert mounted.close() == 0


def test_a_signal_ends_supervisor_and_workers(make: Mount) -> None:
    """SIGTERM: unmounted, status 0, no process left, also with two workers."""
    mounted = make(workers=2)
    assert (mounted.target / "large").read_bytes() == _LARGE
    pids = mounted.children()
    assert mounted.close() == 0
    for pid in pids:
        _wait_gone(pid)
    assert registry.record_of(str(mounted.target)) is None
