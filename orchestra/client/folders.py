"""Which path of the namespace a path of this machine is, when it lies in a mounted folder.

Owns: that translation, from the kernel's list of mounts and what each mount's process says of itself in the user's
state folder (written by fuse/registry.py). Leaves to others: reading anything through it. No living mount is asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from orchestra.client.locations import namespace_path
from orchestra.errors import UsageError

_FSTYPE = "fuse.orchestra"


@dataclass(frozen=True, slots=True)
class MountedFolder:
    """A folder of this machine that shows `root` of the namespace."""

    folder: str
    root: str

    def translate(self, path: str) -> str | None:
        """Return the path in the namespace of an absolute `path`, None if it lies elsewhere."""
        if not path.startswith(self.folder) or path[len(self.folder) : len(self.folder) + 1] not in ("", "/"):
            return None
        return "/" + (self.root.strip("/") + path[len(self.folder) :]).strip("/")


def mounted_folders() -> list[MountedFolder]:
    """Return the folders that are mounted now and whose process has said what it shows; inner ones first."""
    text = Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape")
    mounted = {_unescaped(line.split(" ")[4]) for line in text.splitlines() if f" - {_FSTYPE} " in line}
    found = []
    for file in (platformdirs.user_state_path("orchestra") / "fuse").glob("*.json"):
        try:
            record = json.loads(file.read_bytes())
            folder, root = str(record["folder"]), str(record["path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of a mount that ends or begins at this moment
        if folder in mounted:
            found.append(MountedFolder(folder, root))
    return sorted(found, key=lambda one: -len(one.folder))


def namespace_paths(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[str], str | None]:
    """Return each path's name in the namespace ("" for one that has none), and the first path that has none.

    `orchestra:///a/b` lies there by itself; a path of this machine if it lies in a mounted folder, links followed.
    Raises UsageError for what is no path.
    """
    folders = mounted_folders()
    real: dict[str, str] = {}
    translated = []
    stranger: str | None = None
    for path in paths:
        try:
            text = os.fsdecode(path)
        except TypeError as error:
            raise UsageError(f"expected the path of a sample, got {path!r}") from error
        inside = namespace_path(text)
        if inside is None:
            inside = _in_folders(text, folders) or _in_folders(_resolved(text, real), folders)
        if inside is None and stranger is None:
            stranger = text
        translated.append(inside or "")
    return translated, stranger


def _in_folders(path: str, folders: Sequence[MountedFolder]) -> str | None:
    for folder in folders:
        inside = folder.translate(path)
        if inside is not None:
            return inside
    return None


def _resolved(path: str, known: dict[str, str]) -> str:
    """`path`, absolute and with the links of its folder followed, once a folder."""
    folder, name = os.path.split(os.path.abspath(path))
    if folder not in known:
        known[folder] = os.path.realpath(folder)
    return f"{known[folder].rstrip('/')}/{name}"


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
