"""Attaching a FUSE connection to a folder and detaching it: checks, mount(2), fusermount3, the list of mounts.

Owns: everything said to the kernel outside /dev/fuse's own protocol, and the one-line errors of a mount that cannot be.
Leaves to others: serving it. Nothing here ever asks a living mount for anything (that could wait for ourselves): what
is mounted is read from /proc/self/mountinfo.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from orchestra.errors import MountError
from orchestra.fuse.options import READ_BYTES_MAX, MountOptions

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
_SUBTYPE = "orchestra"
FSTYPE = "fuse.orchestra"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_FUSERMOUNT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MountedFolder:
    """One line of mountinfo. `device` is "major:minor", as in /sys/class/bdi; `user_id` who mounted a FUSE mount."""

    folder: str
    fstype: str
    source: str
    device: str
    options: str
    user_id: int | None = None


def parse_mountinfo(text: str) -> list[MountedFolder]:
    """Return the mounts in the order they were made."""
    found = []
    for line in text.split("\n"):  # a folder's name may have what str.splitlines takes for a line's end
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(tail) >= 2:
            user = re.search(r"(?:^|,)user_id=(\d+)", tail[2]) if len(tail) > 2 else None
            user_id = int(user[1]) if user else None
            found.append(
                MountedFolder(_unescape(fields[4]), tail[0], _unescape(tail[1]), fields[2], fields[5], user_id)
            )
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounted_folders() -> list[MountedFolder]:
    """Return what this process sees mounted."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape"))


def mount_at(folder: str) -> MountedFolder | None:
    """Return what is mounted on `folder` (the topmost), or None."""
    return next((mount for mount in reversed(mounted_folders()) if mount.folder == folder), None)


def resolve_folder(folder: str) -> str:
    """Return `folder` absolute and without links, without touching what may be mounted on it."""
    path = os.path.abspath(folder)
    if path == "/":
        return path
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    return resolved if mount_at(resolved) else os.path.realpath(resolved)


def is_dead(folder: str) -> bool:
    """Whether a FUSE mount on `folder` has lost its process ("Transport endpoint is not connected")."""
    try:
        os.statvfs(folder)  # always asks the process; stat could be answered from the kernel's cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def check_mount_point(folder: str, cache_dir: Path | None = None) -> str:
    """Return the resolved folder, ready to be mounted on; a dead FUSE mount on it is detached first.

    Raises MountError with one sentence.
    """
    target = resolve_folder(folder)
    if cache_dir is not None and Path(os.path.realpath(cache_dir)).is_relative_to(target):
        raise MountError(
            f"the cache directory {cache_dir} lies inside the mount point {target}: the mount would wait for itself; "
            "choose another folder"
        )
    mounted = mount_at(target)
    if mounted is not None:
        _clear_dead(mounted, target)
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        raise MountError(f"the mount point {target} does not exist: create it with mkdir -p {target}") from None
    except NotADirectoryError:
        raise MountError(f"the mount point {target} is not a folder") from None
    except OSError as error:
        raise MountError(f"the mount point {target} cannot be used: {error.strerror}") from error
    if names:
        raise MountError(
            f"the mount point {target} is not empty ({len(names)} names would be hidden): use an empty folder"
        )
    return target


def _clear_dead(mounted: MountedFolder, target: str) -> None:
    if not (mounted.fstype.startswith("fuse") and is_dead(target)):
        raise MountError(f"{target} is already a mount ({mounted.fstype}): unmount it or use another folder")
    log.warning("%s was a dead FUSE mount (its process is gone): detached it", target)
    unmount(target, lazy=True)


# -- attach -------------------------------------------------------------------------------------------------------


def attach(target: str, options: MountOptions) -> int:
    """Mount an unserved FUSE connection on `target` and return its /dev/fuse descriptor (close-on-exec).

    With mount(2) where that is permitted, else through fusermount3. Raises MountError.
    """
    if not os.path.exists(DEVICE):
        raise MountError(
            f"{DEVICE} does not exist: load the kernel module (modprobe fuse), or give the container the device"
        )
    if os.geteuid() != 0:
        return _attach_by_fusermount(target, options)
    try:
        device_fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"{DEVICE} cannot be opened: {error.strerror}") from error
    try:
        _mount(target, mount_data(device_fd, options), options.source)
    except BaseException:
        os.close(device_fd)
        raise
    return device_fd


def mount_data(device_fd: int, options: MountOptions) -> str:
    """Return the option text of mount(2); `rootmode` is octal."""
    text = f"fd={device_fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    text += f",default_permissions,max_read={READ_BYTES_MAX}"
    return text + (",allow_other" if options.allow_other else "")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)  # a CDLL call lets other threads run, which may have to answer the kernel


def _mount(target: str, data: str, source: str) -> None:
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    arguments = (os.fsencode(source), os.fsencode(target), FSTYPE.encode(), ctypes.c_ulong(flags), data.encode())
    if _libc().mount(*arguments) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise MountError(
            f"mounting on {target} is not permitted: it needs CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN)"
        )
    if code == errno.ENODEV:
        raise MountError("this kernel has no FUSE: load the module (modprobe fuse)")
    raise MountError(f"mounting on {target} failed: {os.strerror(code)}")


def _attach_by_fusermount(target: str, options: MountOptions) -> int:
    source = options.source.replace("\\", "\\\\").replace(",", "\\,")
    words = ["ro", "nosuid", "nodev", "default_permissions", f"fsname={source}", f"subtype={_SUBTYPE}"]
    words.append(f"max_read={READ_BYTES_MAX}")
    if options.allow_other:
        words.append("allow_other")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            _fusermount("-o", ",".join(words), "--", target, comm_fd=theirs.fileno())
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise MountError(f"mounting on {target} failed: fusermount3 sent no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _fusermount(*arguments: str, comm_fd: int | None = None) -> None:
    environment = dict(os.environ)
    if comm_fd is not None:
        environment["_FUSE_COMMFD"] = str(comm_fd)
    try:
        done = subprocess.run(
            ["fusermount3", *arguments],
            env=environment,
            pass_fds=() if comm_fd is None else (comm_fd,),
            capture_output=True,
            text=True,
            timeout=_FUSERMOUNT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise MountError(
            "mounting without root needs fusermount3: install the package fuse3, or mount as root"
        ) from None
    except subprocess.TimeoutExpired:
        raise MountError(
            f"fusermount3 {' '.join(arguments)} did not end within {_FUSERMOUNT_TIMEOUT_S:.0f} s"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[:1] or [f"exit status {done.returncode}"]
        raise MountError(reason[0])


# -- detach -------------------------------------------------------------------------------------------------------


class BusyError(MountError):
    """Files of the mount are open, or a process has its working directory there."""

    code = "mount_busy"


def unmount(target: str, *, lazy: bool = False) -> None:
    """Detach `target`; `lazy`: also when it is busy (open files go on being served). Raises BusyError, MountError."""
    if os.geteuid() != 0:
        try:
            _fusermount("-u", *(["-z"] if lazy else []), "--", target)
        except MountError as error:
            raise (BusyError if "busy" in error.message else MountError)(error.message) from None
        return
    if _libc().umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise BusyError(f"{target} is busy: close the files open on it, or detach it with --lazy")
    raise MountError(f"unmounting {target} failed: {os.strerror(code)}")


# -- tuning -------------------------------------------------------------------------------------------------------


def raise_read_ahead(target: str, read_ahead_kib: int) -> int | None:
    """Let the kernel read that far ahead on `target`; return what holds now, None where that is not ours to change.

    The kernel starts every FUSE mount with 128 KiB, and never asks for more at once than it reads ahead.
    """
    mounted = mount_at(target)
    if mounted is None:
        return None
    knob = Path("/sys/class/bdi") / mounted.device / "read_ahead_kb"
    try:
        knob.write_text(str(read_ahead_kib))
        return int(knob.read_text())
    except OSError as error:
        log.info("the read-ahead of %s stays as it is: %s", target, error.strerror)
        return None
