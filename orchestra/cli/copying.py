"""`orchestra cp`: files of the namespace copied to this machine.

Owns: names on the local side, going on after a file that cannot be copied. Leaves to others: walking (files), the copy
of one file (client.export).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import click

from orchestra.cli.files import walk
from orchestra.cli.output import printable
from orchestra.cli.session import Session, pass_session
from orchestra.client.contract import Client
from orchestra.client.export import export_file
from orchestra.errors import DaemonUnavailableError, IsADirectoryPathError, NotFoundError, OrchestraError, ReadOnlyError
from orchestra.values import Entry

# Copies of `cp -r` in flight: hides a store's latency for small files, and stays far below the limit of open files.
COPIES_AT_ONCE_MAX = 16
# Copies handed out before waiting for them, so that a tree of any size takes bounded memory.
COPIES_BATCH = 1024
# What the next file meets as well: the disk of this machine is full, or cannot be written at all.
_HOPELESS_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("-r", "-R", "--recursive", is_flag=True, help="Copy a folder and everything below it.")
@pass_session
def cp(session: Session, source: str, target: str, recursive: bool) -> None:
    """Copy a file, or a folder with -r, to this machine.

    SRC is a path of the namespace (/imagenet/a.jpg), DST a local file or folder. A local file is replaced in one step.
    """
    if not source.startswith(("/", "orchestra://")) or target.startswith("orchestra://"):
        raise ReadOnlyError(
            f"cannot copy {source} to {target}: this version reads the namespace, and cannot write to it"
        )
    client = session.client
    path = "/" + source.removeprefix("orchestra://").lstrip("/") if source.startswith("orchestra://") else source
    try:
        root = client.stat(path)
    except NotFoundError as error:
        if Path(source).exists():
            raise ReadOnlyError(
                f"cannot copy the local {source} to {target}: this version reads the namespace, and cannot write to it"
            ) from error
        raise
    if root.is_directory and not recursive:
        raise IsADirectoryPathError(f"{root.path} is a folder; copy it with: orchestra cp -r")
    destination = Path(target)
    if destination.is_dir():
        destination = destination / root.name
    elif target.endswith("/") and not root.is_directory:
        raise OrchestraError(f"cannot write {target}: no such folder")
    if root.is_directory:
        _TreeCopy(client, root).run(destination)
    else:
        _copy_file(client, root, destination)


class _TreeCopy:
    """Copies a tree. What cannot be copied is said in a line of its own, and the rest goes on."""

    def __init__(self, client: Client, root: Entry) -> None:
        self._client = client
        self._root = root
        self._failed = 0
        self._lock = threading.Lock()

    def run(self, destination: Path) -> None:
        """Raises OrchestraError in the end if anything was left out, and at once where no other file would fare better:
        a full disk here, no daemon."""
        from concurrent.futures import ThreadPoolExecutor  # 10 ms that no other command needs

        _make_folder(destination)
        files = self._make_folders(destination)
        executor = ThreadPoolExecutor(COPIES_AT_ONCE_MAX, thread_name_prefix="orchestra-cp")
        try:
            while batch := list(islice(files, COPIES_BATCH)):
                for _ in executor.map(self._copy, batch):
                    pass
        finally:
            executor.shutdown(cancel_futures=True)
        if self._failed:
            what = "1 file or folder" if self._failed == 1 else f"{self._failed} files or folders"
            raise OrchestraError(f"{what} of {self._root.path} could not be copied; the rest is in {destination}")

    def _make_folders(self, destination: Path) -> Iterator[tuple[Entry, Path]]:
        """Make the local folder of each directory below the root and yield each file with its local path."""
        for entry in walk(self._list, self._root):
            below = entry.path[len(self._root.path) :].strip("/")
            # A key of a store may be named so; here it would write outside the destination.
            if any(part in ("", ".", "..") for part in below.split("/") if below) or "\0" in below:
                self._fail(OrchestraError(f"refusing to copy {entry.path}: its name would leave {destination}"))
            elif not entry.is_directory:
                yield entry, destination / below
            elif below:
                try:
                    _make_folder(destination / below)
                except _LocalError as error:
                    self._fail(error)

    def _list(self, path: str) -> Iterable[Entry]:
        try:
            return self._client.list(path)
        except OrchestraError as error:
            if path == self._root.path:
                raise
            self._fail(error)
            return ()

    def _copy(self, copy: tuple[Entry, Path]) -> None:
        entry, local = copy
        try:
            _copy_file(self._client, entry, local)
        except OrchestraError as error:
            self._fail(error)

    def _fail(self, error: OrchestraError) -> None:
        if isinstance(error, DaemonUnavailableError) or error.errno_code in _HOPELESS_ERRNOS:
            raise error
        with self._lock:
            self._failed += 1
            click.echo(f"orchestra: {printable(error.message)}", err=True)


class _LocalError(OrchestraError):
    """A file or folder of this machine cannot be written."""

    code = "local"

    def __init__(self, message: str, errno_code: int | None) -> None:
        super().__init__(message)
        self.errno_code = errno_code or errno.EIO


def _make_folder(local: Path) -> None:
    try:
        local.mkdir(exist_ok=True)
    except OSError as error:
        raise _LocalError(f"cannot make the folder {local}: {error.strerror}", error.errno) from error


def _copy_file(client: Client, entry: Entry, local: Path) -> None:
    try:
        export_file(client, entry, local)
    except OSError as error:
        if isinstance(error, OrchestraError):
            raise
        raise _LocalError(f"cannot write {os.fspath(local)}: {error.strerror or error}", error.errno) from error
