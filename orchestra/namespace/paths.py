"""What a path in the namespace may look like. Pure.

A path is absolute, its components are separated by single slashes as far as the mount point, and below the mount point
it is the store's key as it stands (so "/m/a//b" names the key "a//b"). "." and ".." are refused rather than resolved:
a key may not be a way out of its mount.
"""

from __future__ import annotations

from orchestra.errors import NameTooLongError, UsageError

# Linux's NAME_MAX and PATH_MAX, counted in bytes as the kernel does.
NAME_LIMIT_BYTES = 255
PATH_LIMIT_BYTES = 4096


def normalize_path(path: str) -> str:
    """Return `path` with one leading slash and no trailing slash ("/" for the root).

    Raises UsageError (relative, NUL, "." or ".." component) or NameTooLongError.
    """
    if not isinstance(path, str):
        raise UsageError(f"a path is a str, got {type(path).__name__}")
    if not path.startswith("/"):
        raise UsageError(f"path {path!r} is not absolute: namespace paths start with '/'")
    if "\0" in path:
        raise UsageError(f"path {path!r} holds a NUL byte")
    stripped = "/" + path.strip("/")
    if "/." in stripped:
        for component in stripped.split("/"):
            if component in (".", ".."):
                raise UsageError(f"path {path!r}: {component!r} is not allowed")
    # A short path of plain ASCII cannot pass a limit; those are nearly all, and this is done on every read.
    if len(stripped) > NAME_LIMIT_BYTES or not stripped.isascii():
        _check_lengths(stripped)
    return stripped


def _check_lengths(path: str) -> None:
    try:
        encoded = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UsageError(f"path {path!r} holds half a surrogate pair, which no name can") from error
    if len(encoded) >= PATH_LIMIT_BYTES:
        raise NameTooLongError(f"path {path[:40]!r}... has {len(encoded)} bytes, the limit is {PATH_LIMIT_BYTES - 1}")
    longest = max(encoded.split(b"/"), key=len)
    if len(longest) > NAME_LIMIT_BYTES:
        raise NameTooLongError(f"name {path[:40]!r}... has {len(longest)} bytes, the limit is {NAME_LIMIT_BYTES}")


def parent_and_name(path: str) -> tuple[str, str]:
    """Split a normalized path: "/a/b" -> ("/a", "b"); the root's parent is itself, with name ""."""
    head, _, name = path.rpartition("/")
    return head or "/", name


def join(directory: str, name: str) -> str:
    """Return the path of `name` in `directory`, both normalized."""
    return f"/{name}" if directory == "/" else f"{directory}/{name}"


def is_at_or_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it, both normalized."""
    return path == folder or folder == "/" or path.startswith(f"{folder}/")


def is_shown_name(name: bytes) -> bool:
    """Whether a name from a store can stand in a folder: not empty, ".", "..", and without "/" or NUL, <= 255 bytes.

    Others are hidden from listings and counted; their keys stay reachable through fsspec where they can be a path.
    """
    return 0 < len(name) <= NAME_LIMIT_BYTES and name not in (b".", b"..") and b"/" not in name and b"\0" not in name
