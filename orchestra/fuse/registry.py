"""What is known of this user's mounts beside the kernel's own list: process, path, mode, log.

Owns: one small JSON file a mount in the user's state folder (`~/.local/state/orchestra/fuse/`), written when the mount
is ready and removed at its end. Leaves to others: whether it is mounted, which mountinfo alone says. A file left by a
killed process is recognised by the process's start time.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import platformdirs

from orchestra.fuse.mount import FSTYPE, mounted_folders


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What the process of a mount says of itself; `pid_start` tells it from a later process of the same number."""

    folder: str
    path: str
    mode: str
    pid: int
    pid_start: str
    log: str | None
    workers: list[int] | None = None  # the processes that answer, where they are not `pid` itself


@dataclass(frozen=True, slots=True)
class KnownMount:
    """A mount that the kernel lists, with its process's own record if that is alive, and who mounted it."""

    folder: str
    record: MountRecord | None
    user_id: int | None = None


def state_folder() -> Path:
    """Return the folder of records and logs."""
    return platformdirs.user_state_path("orchestra") / "fuse"


def log_file_of(folder: str) -> Path:
    """Return where the background process of a mount on `folder` writes its log."""
    return state_folder() / f"{_file_stem(folder)}.log"


def _record_file_of(folder: str) -> Path:
    return state_folder() / f"{_file_stem(folder)}.json"


def _file_stem(folder: str) -> str:
    # A file name holds 255 bytes; the end of a long path tells mounts apart.
    return quote(os.fsencode(folder).lstrip(b"/"), safe="")[-200:] or "root"


def start_of_process(pid: int) -> str:
    """Return a text that no other process of this boot with that number has had; "" if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


def write_record(record: MountRecord) -> None:
    """Publish the record of a mount."""
    state_folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    target = _record_file_of(record.folder)
    draft = target.with_suffix(f".{record.pid}")
    draft.write_text(json.dumps(asdict(record)))
    draft.replace(target)


def remove_record(record: MountRecord) -> None:
    """Take back the record of a mount, unless a later mount has replaced it."""
    if _read(record.folder) == record:
        _record_file_of(record.folder).unlink(missing_ok=True)


def _read(folder: str) -> MountRecord | None:
    try:
        return MountRecord(**json.loads(_record_file_of(folder).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def record_of(folder: str) -> MountRecord | None:
    """Return the record of the living process that serves `folder`, None if none is known."""
    record = _read(folder)
    if record is None or record.folder != folder or start_of_process(record.pid) != record.pid_start:
        return None
    return record


def known_mounts() -> list[KnownMount]:
    """Return every orchestra mount that this process sees."""
    return [KnownMount(m.folder, record_of(m.folder), m.user_id) for m in mounted_folders() if m.fstype == FSTYPE]


@contextmanager
def opened_pids(pids: Sequence[int]) -> Iterator[list[int]]:
    """Give descriptors of these processes; of those that live."""
    with ExitStack() as stack:
        found = []
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfd)
            found.append(pidfd)
        yield found


def wait_all_ended(pidfds: Sequence[int], timeout_s: float) -> bool:
    """Wait until these processes are gone; return whether they are. Each may take `timeout_s`."""
    return all(select.select([pidfd], [], [], timeout_s)[0] for pidfd in pidfds)


def wait_ended(record: MountRecord, timeout_s: float) -> bool:
    """Wait until the process of a record is gone; return whether it is."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return True
    try:
        if start_of_process(record.pid) != record.pid_start:
            return True
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)
