"""Every error that orchestra raises, and the one table that maps them to errno and to the wire.

OrchestraError
 |- ConfigError            the configuration is wrong; the message names file, key, value and what is allowed
 |- UsageError             a call or command cannot mean anything (also ValueError)
 |- NotFoundError          no such path (also FileNotFoundError)
 |- NotADirectoryPathError / IsADirectoryPathError
 |- ReadOnlyError          a write where writing is refused (also PermissionError, EROFS)
 |- AccessDeniedError      the store refused the credentials (also PermissionError)
 |- ProofError             a request between nodes that does not prove the cluster's secret (also PermissionError)
 |- StaleObjectError       the object changed after it was opened: reopen it; a retry cannot help (ESTALE)
 |- StoreError             the under store failed
 |   |- StoreUnavailableError   worth a retry: connection, timeout, 5xx, short body, throttling
 |- CacheDirectoryError    the cache directory cannot be used (owner, mode, lock, foreign content, another version)
 |- DaemonUnavailableError no daemon answers and none could be started
 |- LedElsewhereError      another node of the cluster leads that job now
 |- MountError             a FUSE mount could not be made or removed

An error's text is one sentence for a person: what failed, on what, why, what to do. Errors survive pickling (DataLoader
workers send them to their parent) and the trip through the daemon's HTTP API (`to_wire`, `from_wire`).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any


def _fill_os_error(error: BaseException, code: int, message: str) -> None:
    """Give the kinds that are also an OSError what programs look at."""
    if isinstance(error, OSError):
        error.errno = code
        error.strerror = message


class OrchestraError(Exception):
    """Base of all; `code` is stable and may be matched by programs, the text may change."""

    code = "error"
    errno_code = errno.EIO

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        _fill_os_error(self, self.errno_code, message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message,))


class ConfigError(OrchestraError, ValueError):
    """A configuration file, variable or option is wrong. Fix what the message names."""

    code = "config"
    errno_code = errno.EINVAL


class UsageError(OrchestraError, ValueError):
    """The request itself cannot mean anything: a path with "..", a negative offset, an unknown scheme."""

    code = "usage"
    errno_code = errno.EINVAL


class NotFoundError(OrchestraError, FileNotFoundError):
    """No such file or directory in the namespace or in the store."""

    code = "not_found"
    errno_code = errno.ENOENT


class NotADirectoryPathError(OrchestraError, NotADirectoryError):
    """A directory was asked for, and the path names a file."""

    code = "not_a_directory"
    errno_code = errno.ENOTDIR


class IsADirectoryPathError(OrchestraError, IsADirectoryError):
    """A file was asked for, and the path names a directory."""

    code = "is_a_directory"
    errno_code = errno.EISDIR


class NameTooLongError(OrchestraError, OSError):
    """A name over 255 bytes or a path over 4,096 bytes."""

    code = "name_too_long"
    errno_code = errno.ENAMETOOLONG


class ReadOnlyError(OrchestraError, PermissionError):
    """Writing is refused here. Mount the path without readonly, or write to the store itself."""

    code = "read_only"
    errno_code = errno.EROFS


class AccessDeniedError(OrchestraError, PermissionError):
    """The under store refused: check the mount's credentials. A retry cannot help."""

    code = "access_denied"
    errno_code = errno.EACCES


class ProofError(OrchestraError, PermissionError):
    """A request between nodes does not prove that its sender has the cluster's secret. Sending it again cannot help."""

    code = "proof"
    errno_code = errno.EACCES


class StaleObjectError(OrchestraError, OSError):
    """The object changed after it was opened. Reopen the path; retrying cannot help."""

    code = "stale_object"
    errno_code = errno.ESTALE


class StoreError(OrchestraError, OSError):
    """The under store answered something that no retry will mend; the message says what."""

    code = "store"
    errno_code = errno.EIO


class StoreUnavailableError(StoreError):
    """The under store failed in a way that may pass: worth another try within the deadline.

    `retry_after_s` is what the store asked for (503/429 Retry-After), else None.
    """

    code = "store_unavailable"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.retry_after_s))


class CacheDirectoryError(OrchestraError, OSError):
    """The cache directory cannot be used; the message says why and what to do."""

    code = "cache_directory"
    errno_code = errno.EIO


class DaemonUnavailableError(OrchestraError, ConnectionError):
    """No daemon answers on the node's socket, and none could be started; the message names its log."""

    code = "daemon_unavailable"
    errno_code = errno.EIO


class LedElsewhereError(OrchestraError):
    """Another node of the cluster has taken that job over: who led it before is to leave it alone."""

    code = "led_elsewhere"
    errno_code = errno.EBUSY


class MountError(OrchestraError, OSError):
    """A folder could not be mounted or unmounted."""

    code = "mount"
    errno_code = errno.EIO


_BY_CODE: dict[str, type[OrchestraError]] = {}


def _register(kind: type[OrchestraError]) -> None:
    assert kind.code not in _BY_CODE, f"two errors share the code {kind.code}"
    _BY_CODE[kind.code] = kind
    for child in kind.__subclasses__():
        _register(child)


_register(OrchestraError)


def to_wire(error: OrchestraError) -> dict[str, str]:
    """Return what travels to the client: a stable code and the sentence."""
    return {"code": error.code, "message": error.message}


def from_wire(body: Mapping[str, Any]) -> OrchestraError:
    """Return the error that `to_wire` described; an unknown code becomes the base class."""
    kind = _BY_CODE.get(str(body.get("code")), OrchestraError)
    return kind(str(body.get("message", "the daemon sent an error without a message")))


def errno_of(error: BaseException) -> int:
    """Return the errno a FUSE reply carries for `error`; EIO for anything unforeseen."""
    if isinstance(error, OrchestraError):
        return error.errno_code
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO


# HTTP statuses of the daemon's API; the S3 gateway has its own table.
_HTTP_STATUS = {
    "config": 400,
    "usage": 400,
    "name_too_long": 400,
    "not_found": 404,
    "not_a_directory": 409,
    "is_a_directory": 409,
    "read_only": 403,
    "access_denied": 403,
    "proof": 401,
    "led_elsewhere": 409,
    "stale_object": 412,
    "store_unavailable": 503,
}


def http_status_of(error: OrchestraError) -> int:
    """Return the HTTP status that carries `error` between daemon and client."""
    return _HTTP_STATUS.get(error.code, 500)
