"""How a mount begins and ends: cleanly, by signals, by death of its process; and what it refuses to begin on."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import orchestra
from orchestra.errors import MountError
from orchestra.fuse import mount, watcher
from orchestra.fuse.options import MountOptions
from tests.support.fuse_mounts import MakeServer, device_for_everybody, needs_fuse, servers
from tests.support.fuse_server import Server

pytestmark = [pytest.mark.system, needs_fuse]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeServer]:
    with servers(tmp_path) as make:
        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * 100_000)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that nothing is mounted on afterwards."""
    target = tmp_path / "target"
    target.mkdir()
    yield target
    while mount.mount_at(str(target)) is not None:
        mount.unmount(str(target), lazy=True)


def _wait_detached(target: Path) -> None:
    """Wait until nothing is mounted on `target`: poll(2) on mountinfo wakes at every change of the table."""
    with Path("/proc/self/mountinfo").open() as table:
        poll = select.poll()
        poll.register(table, select.POLLERR | select.POLLPRI)
        while mount.mount_at(str(target)) is not None:
            assert poll.poll(20_000), f"{target} is still mounted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_cleanly(make: MakeServer, folder: Path, number: signal.Signals) -> None:
    """The folder is a plain empty one again, and the process ends with status 0."""
    server = make(folder)
    assert (server.target / "file").stat().st_size == 100_000
    server.process.send_signal(number)
    assert server.process.wait(20) == 0
    assert not server.is_mounted()
    assert os.listdir(server.target) == []


def test_a_busy_mount_is_detached_and_goes_on_for_those_who_have_it_open(make: MakeServer, folder: Path) -> None:
    """SIGTERM with a file open: the name is gone at once, the open file reads on, and its close ends the process."""
    server = make(folder)
    with open(server.target / "file", "rb", buffering=0) as file:  # noqa: PTH123 - the descriptor is the point
        server.process.send_signal(signal.SIGTERM)
        _wait_detached(server.target)
        assert os.listdir(server.target) == []
        assert file.read() == b"x" * 100_000
    assert server.process.wait(20) == 0


def test_a_second_signal_ends_a_busy_mount_at_once(make: MakeServer, folder: Path) -> None:
    """Whoever has it open gets an error instead of waiting."""
    server = make(folder)
    with open(server.target / "file", "rb", buffering=0) as file:  # noqa: PTH123 - as above
        server.process.send_signal(signal.SIGTERM)
        _wait_detached(server.target)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        with pytest.raises(OSError) as caught:
            file.read()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)


def test_a_killed_process_leaves_no_dead_mount(make: MakeServer, folder: Path) -> None:
    """SIGKILL of who holds it: the folder is detached, and can be mounted again."""
    server = make(folder)
    server.process.kill()
    server.process.wait(20)
    _wait_detached(server.target)
    assert os.listdir(server.target) == []
    again = make(folder, "again")
    assert (again.target / "file").stat().st_size == 100_000


def test_the_watcher_leaves_a_living_mount_alone(make: MakeServer, folder: Path) -> None:
    """Only what answers "not connected" is detached."""
    server = make(folder)
    assert not watcher.detach_if_dead(str(server.target))
    assert (server.target / "file").stat().st_size == 100_000


def test_a_killed_watcher_is_not_missed_at_the_end(make: MakeServer, folder: Path) -> None:
    """A signal still unmounts, and the status is 0."""
    server = make(folder)
    watcher_pid, *_ = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert b"watcher.py" in Path(f"/proc/{watcher_pid}/cmdline").read_bytes()
    os.kill(int(watcher_pid), signal.SIGKILL)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not server.is_mounted()


def test_a_signal_after_the_folder_was_detached_ends_the_process_and_what_is_open_is_served(
    make: MakeServer, folder: Path
) -> None:
    """As `systemctl restart` does it with a file open: nothing waits for whoever has it open, who reads on to the end
    of the file; the worker goes with its last file."""
    server = make(folder)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    with ExitStack() as stack:
        pidfds = [os.pidfd_open(int(pid)) for pid in children]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        with open(server.target / "file", "rb", buffering=0) as file:  # noqa: PTH123 - as above
            mount.unmount(str(server.target), lazy=True)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            assert file.read() == b"x" * 100_000
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 20)[0], "a process of the mount stays"


def test_an_ordinary_umount_ends_the_process(make: MakeServer, folder: Path) -> None:
    """`umount` from outside is as good as a signal, and watcher and worker go too."""
    server = make(folder)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert len(children) >= 2
    subprocess.run(["umount", str(server.target)], check=True)
    assert server.process.wait(20) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_mount_over_a_dead_one_clears_it_first(make: MakeServer, folder: Path, tmp_path: Path, target: Path) -> None:
    """A FUSE mount whose process is gone ("Transport endpoint is not connected") does not stand in the way."""
    os.close(mount.attach(str(target), MountOptions()))
    assert mount.is_dead(str(target))
    server = Server(folder, target)
    try:
        assert (target / "file").stat().st_size == 100_000
    finally:
        server.close()


def test_an_aborted_connection_ends_the_process_and_the_mount(make: MakeServer, folder: Path) -> None:
    """`echo 1 > /sys/fs/fuse/connections/N/abort`, the way out of last resort, leaves nothing behind."""
    control = Path("/sys/fs/fuse/connections")
    if not any(control.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "fusectl", str(control)], check=False)
    server = make(folder)
    (control / str(os.minor(os.stat(server.target).st_dev)) / "abort").write_text("1")
    assert server.process.wait(20) == 0
    assert not server.is_mounted()


def test_the_watcher_ends_the_connection_of_a_folder_of_any_name(make: MakeServer, folder: Path) -> None:
    """As the kernel spells it in mountinfo: blanks and backslashes are escaped, other ends of lines are not."""
    server = make(folder, "a\tb c\n\\040\x0c\x85\u2028")
    mounted = mount.mount_at(str(server.target))
    assert mounted is not None
    watcher.abort(str(server.target), mounted.device)
    assert server.process.wait(20) == 0
    assert not server.is_mounted()


def test_the_read_ahead_of_a_mount_is_raised(make: MakeServer, folder: Path) -> None:
    """The kernel's 128 KiB would make four requests of every MiB."""
    server = make(folder, read_ahead_kib=3072)
    mounted = mount.mount_at(str(server.target))
    assert mounted is not None
    assert Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").read_text().strip() == "3072"


def test_mount_points_that_cannot_be_are_refused_with_one_sentence(folder: Path, tmp_path: Path, target: Path) -> None:
    """Missing, a file, not empty, a mount already, a loop of links: each its own words, and nothing is mounted."""
    (tmp_path / "a file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    server = Server(folder, target)
    before = mount.mounted_folders()
    cases = {
        "missing": "does not exist: create it with mkdir -p",
        "a file": "is not a folder",
        "a file/below": "is not a folder",
        "full": r"is not empty \(1 names would be hidden\)",
        "target": r"is already a mount \(fuse.orchestra\)",
        "loop": "cannot be used: Too many levels of symbolic links",
    }
    try:
        for name, words in cases.items():
            with pytest.raises(MountError, match=words):
                mount.check_mount_point(str(tmp_path / name))
    finally:
        assert mount.mounted_folders() == before
        server.close()


def test_a_cache_directory_inside_the_mount_point_is_refused(target: Path) -> None:
    """Such a mount would wait for itself."""
    with pytest.raises(MountError, match="lies inside the mount point"):
        mount.check_mount_point(str(target), cache_dir=target / "cache")
    with pytest.raises(MountError, match="lies inside the mount point"):
        mount.check_mount_point(str(target), cache_dir=target)
    assert mount.check_mount_point(str(target), cache_dir=target.parent) == str(target)


def test_a_path_that_is_not_there_or_is_a_file_cannot_be_mounted(folder: Path, tmp_path: Path, target: Path) -> None:
    """The root is asked for before anything is mounted."""
    for root in ("/nope", "/file"):
        with pytest.raises(AssertionError, match="did not come up"):
            Server(folder, target, root=root)
        assert mount.mount_at(str(target)) is None


def test_mode_passthrough_says_when_it_may_not(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the privilege the mode that promises passthrough refuses to begin."""
    command = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable]
    with pytest.raises(AssertionError, match="needs CAP_SYS_ADMIN: mount as root, or use mode auto"):
        Server(folder, target, launcher=command, mode="passthrough")


def test_mounting_without_the_privilege_is_refused_with_its_name(folder: Path, target: Path) -> None:
    """mount(2) says EPERM to a root without CAP_SYS_ADMIN, as in a plain container."""
    command = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable]
    with pytest.raises(AssertionError, match="is not permitted: it needs CAP_SYS_ADMIN"):
        Server(folder, target, launcher=command)


def test_no_fuse_device_is_said_so(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do about it."""
    monkeypatch.setattr(mount, "DEVICE", "/dev/no-fuse-here")
    with pytest.raises(MountError, match="does not exist: load the kernel module"):
        mount.attach(str(target), MountOptions())


# -- without root -------------------------------------------------------------------------------------------------


_NOBODY = 65534
_SITE_PACKAGES = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))


def _as_nobody() -> list[str]:
    """Return a command that runs a Python, which has what orchestra needs, as nobody; skip if none can."""
    paths = f"{Path(orchestra.__file__).parents[1]}{os.pathsep}{_SITE_PACKAGES}"
    for python in (sys.executable, "/usr/bin/python3"):
        environment = ["env", "HOME=/nonexistent", f"PYTHONPATH={paths}", "PYTHONDONTWRITEBYTECODE=1", python]
        command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *environment]
        if (
            subprocess.run(
                [*command, "-c", "import orchestra.fuse.worker"], check=False, capture_output=True
            ).returncode
            == 0
        ):
            return command
    pytest.skip("nobody cannot run this Python")


@pytest.fixture
def nobodys(tmp_path: Path) -> Iterator[Path]:
    """A folder of nobody's with `store` and `mnt`, and a device that everybody may open (as udev makes it)."""
    if shutil.which("fusermount3") is None:
        pytest.skip("mounting without root needs fusermount3")
    folder = Path(tempfile.mkdtemp(prefix="orchestra-nobody-"))
    for name in ("store", "mnt"):
        (folder / name).mkdir()
        os.chown(folder / name, _NOBODY, _NOBODY)
    (folder / "store" / "file").write_bytes(b"y" * 2_000_000)
    folder.chmod(0o755)
    with device_for_everybody():
        yield folder
    shutil.rmtree(folder)


def test_a_user_mounts_through_fusermount3(nobodys: Path) -> None:
    """Without root: mounted, read through the process, unmounted by a signal; passthrough is refused."""
    server = Server(nobodys / "store", nobodys / "mnt", launcher=_as_nobody(), uid=_NOBODY, gid=_NOBODY)
    try:
        as_nobody = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        read = subprocess.run([*as_nobody, "cat", str(server.target / "file")], capture_output=True, check=True)
        assert read.stdout == b"y" * 2_000_000
        assert server.counters()["backing_refused"] == 1
        with pytest.raises(PermissionError):
            os.listdir(server.target)  # not even root, since --allow-other was not given
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert not server.is_mounted()
    finally:
        server.close()


def test_a_killed_process_of_a_user_leaves_no_dead_mount(nobodys: Path) -> None:
    """The worker detaches it through fusermount3."""
    server = Server(nobodys / "store", nobodys / "mnt", launcher=_as_nobody())
    try:
        server.process.kill()
        server.process.wait(20)
        _wait_detached(server.target)
    finally:
        server.close()


def test_fusermount3s_own_words_reach_the_user(nobodys: Path) -> None:
    """--allow-other without user_allow_other in /etc/fuse.conf, which fusermount3 refuses."""
    with pytest.raises(AssertionError, match="allow_other"):
        Server(nobodys / "store", nobodys / "mnt", launcher=_as_nobody(), allow_other=True)
