"""Checks that the namespace holds exactly the bucket's objects, every byte of them.

Owns: the comparison. Leaves to others: reading the bucket (bucket.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestra.errors import OrchestraError

_STEP_BYTES = 1 << 20


def digest_of(content: bytes) -> str:
    """Return the sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def folder_digests(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield relative path, sha256 and size of every file below `folder`, read as any program reads files."""
    for parent, _, names in os.walk(folder, onerror=_fail):
        for name in names:
            path = Path(parent, name)
            digest = hashlib.sha256()
            size = 0
            with path.open("rb") as file:
                while chunk := file.read(_STEP_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
            yield path.relative_to(folder).as_posix(), digest.hexdigest(), size


def fsspec_digests(url: str, config_path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield relative path, sha256 and size of every file below `url`, read through fsspec."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url, config=str(config_path))
    for name in filesystem.find(root):
        content = filesystem.cat_file(name)
        yield name.removeprefix(root).lstrip("/"), digest_of(content), len(content)


def compare(seen: Iterator[tuple[str, str, int]], expected: Mapping[str, str]) -> tuple[int, int]:
    """Return number and bytes of the files in `seen`, all of which are as `expected` says, and none is missing.

    Raises OrchestraError that names the first difference.
    """
    files = size_bytes = 0
    for name, digest, size in seen:
        if name not in expected:
            raise OrchestraError(f"verification failed: {name} is in the namespace and not in the bucket")
        if digest != expected[name]:
            raise OrchestraError(f"verification failed: the bytes of {name} are not those of the bucket")
        files += 1
        size_bytes += size
    if files != len(expected):
        raise OrchestraError(f"verification failed: the bucket has {len(expected)} objects, the namespace {files}")
    return files, size_bytes


def _fail(error: OSError) -> None:
    raise error
