"""Which files a dataset has, with what labels: from class folders, from lists of paths, from IDs and dictionaries.

Owns: finding files, their order, matching labels, keeping millions of paths small. Leaves to others: reading them
(locations), what samples become (the faces).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import xxhash

from orchestra.client.locations import list_folder
from orchestra.client.reading import in_parallel
from orchestra.errors import UsageError


class PackedNames(Sequence[str]):
    """Strings in one run of bytes: a million of them are two objects to pickle, to share by fork and to collect."""

    __slots__ = ("_data", "_ends")

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        ends = array("q", [0])
        for name in encoded:
            ends.append(ends[-1] + len(name))
        self._data = b"".join(encoded)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} names")
        return os.fsdecode(self._data[self._ends[index] : self._ends[index + 1]])

    def digest(self) -> str:
        """Return 32 hex digits that stand for these names in this order."""
        return xxhash.xxh3_128_hexdigest(self._data + self._ends.tobytes())


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files in their order; `labels` has one for each, or there are none; `classes` are the names of class folders."""

    paths: PackedNames
    labels: Sequence[Any] | None
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return a text that is the same for the same files with the same labels in the same order."""
        labels = "" if self.labels is None else repr(list(self.labels))
        return f"{self.paths.digest()}-{xxhash.xxh3_64_hexdigest(labels.encode())}"


def find_files(
    source: Any, labels: Any = None, *, folder: str | os.PathLike[str] = "", suffix: str = "", config: str | None = None
) -> FileSet:
    """Return the files that `source` means.

    A folder: the files below it that end in `suffix`, sorted; if they lie in class folders and `labels` is None, the
    label is the number of the class in the order of the names. Anything else is a sequence of paths or IDs; the file of
    an ID is `folder`/ID`suffix`. `labels` is a mapping from ID (or from the path below the folder, without `suffix`),
    or a sequence of as many labels. Raises UsageError, NotFoundError.
    """
    classes: tuple[str, ...] = ()
    if isinstance(source, (str, os.PathLike)):
        root = os.fspath(source).rstrip("/") or "/"
        folders, files = list_folder(root, config)
        names = _files_below(root, folders, files, suffix, config)
        if not names:
            raise UsageError(f"{root} holds no files{f' that end in {suffix}' if suffix else ''}")
        if labels is None and folders and not any("/" not in name for name in names):
            classes = tuple(sorted({name.split("/", 1)[0] for name in names}))
            number = {name: index for index, name in enumerate(classes)}
            labels = [number[name.split("/", 1)[0]] for name in names]
        ids: list[Any] = [name.removesuffix(suffix) for name in names]
        paths = [_join(root, name) for name in names]
    else:
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise UsageError(f"expected a folder or a list of paths or IDs (partition['train']), got {_kind(source)}")
        ids = list(source)
        paths = [_join(os.fspath(folder), f"{one}{suffix}") for one in ids]
    return FileSet(PackedNames(paths), _labels_of(ids, labels), classes)


def _files_below(root: str, folders: Sequence[str], files: Sequence[str], suffix: str, config: str | None) -> list[str]:
    """Return the paths below `root`, relative to it, of all files that end in `suffix`; sorted."""
    found = [name for name in files if name.endswith(suffix)]
    level = list(folders)
    while level:
        # One level at a time, many folders at a time: a thousand classes cost a few round trips, not a thousand.
        listed = in_parallel(lambda name: list_folder(_join(root, name), config), level)
        below: list[str] = []
        for name, (inner_folders, inner_files) in zip(level, listed, strict=True):
            found += [f"{name}/{one}" for one in inner_files if one.endswith(suffix)]
            below += [f"{name}/{one}" for one in inner_folders]
        level = below
    return sorted(found)


def _join(folder: str, name: str) -> str:
    if not folder or PurePath(name).is_absolute():
        return name
    return f"{folder.rstrip('/')}/{name}"


def _kind(thing: object) -> str:
    return type(thing).__name__


def _labels_of(ids: Sequence[Any], labels: Any) -> Sequence[Any] | None:
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        missing = next((one for one in ids if one not in labels), None)
        if missing is not None:
            raise UsageError(f"labels: none for {missing!r}")
        found = [labels[one] for one in ids]
    elif isinstance(labels, str) or not isinstance(labels, Iterable):
        raise UsageError(f"labels: expected a dictionary by ID or a label for each file, got {_kind(labels)}")
    else:
        found = list(labels)
        if len(found) != len(ids):
            raise UsageError(f"labels: {len(found)} for {len(ids)} files")
    if all(type(label) is int and abs(label) < 1 << 62 for label in found):
        return array("q", found)  # 8 bytes each, where a list of objects grows in every forked worker
    return found
