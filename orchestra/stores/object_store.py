"""S3, GCS and Azure through obstore's native functions.

Owns: HEAD, conditional ranged GET and LIST in terms of obstore, and what obstore's errors mean. Leaves to others:
building the client (object_clients.py), reads, LIST and odd keys of S3 (s3_wire.py, wherever our own client can sign),
retry and limit (wrappers; obstore's own are off).

obstore hangs in a process forked after its first use: it lives in the node daemon, which never forks after start.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

import obstore
from obstore.exceptions import BaseError, UnauthenticatedError

from orchestra.errors import AccessDeniedError, NotFoundError, OrchestraError, StoreError
from orchestra.stores.carrying import Errand, Outcome
from orchestra.stores.contract import Buffer, ListPage
from orchestra.stores.http_client import is_strong_etag
from orchestra.stores.pages import PagedListing, cut_into_pages, listing_that_arrives_whole
from orchestra.stores.range_answers import check_encoding
from orchestra.stores.translate import (
    Operation,
    ThrottledError,
    as_stale,
    changed,
    error_for_status,
    one_line,
    s3_code,
    unavailable,
    unreachable,
)
from orchestra.values import ByteRange, ObjectInfo, weak_version

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

# What obstore raises: its own, FileNotFoundError for 404, ValueError for a path it cannot name, PermissionError.
_OBSTORE_ERRORS = (BaseError, OSError, ValueError, NotImplementedError)


class Wire(Protocol):
    """The requests that obstore cannot make, or makes at a higher price (s3_wire.S3Wire)."""

    async def head(self, key: str) -> ObjectInfo: ...

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer: ...

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None: ...

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None: ...

    def list_directory(self, prefix: str) -> PagedListing[str]: ...

    async def probe(self) -> None: ...

    async def close(self) -> None: ...


class ObjectStoreStore:
    """One bucket or container below `root` ("" or ending with "/").

    With a `wire`, it reads and lists: listings stream one page a request, and every key works. Without one (GCS,
    Azure, S3 with credentials that only obstore can find) a listing arrives whole, and a directory that holds a key
    which obstore cannot name ("a//b", "..") raises StoreError.
    """

    def __init__(self, client: ObjectStore, *, store_id: str, label: str, root: str, wire: Wire | None = None) -> None:
        self._client = client
        self._store_id = store_id
        self._label = label
        self._root = root
        self._wire = wire
        # obstore hides headers: after a HEAD that was throttled the next goes over the wire, which reads Retry-After.
        self._ask_wire = False

    @property
    def store_id(self) -> str:
        return self._store_id

    async def head(self, key: str) -> ObjectInfo:
        path = self._root + key
        operation = Operation("look up", key, self._label)
        _check_utf8(path, operation)
        if self._wire is not None and (self._ask_wire or not is_plain_path(path)):
            return await self._over_wire_head(self._wire, key)
        if not is_plain_path(path):
            raise NotFoundError(operation.failed("no such object"))
        try:
            return self._info(key, await obstore.head_async(self._client, path))
        except OrchestraError:  # ours are OSErrors too
            raise
        except _OBSTORE_ERRORS as error:
            raise self._translated(error, operation) from error

    async def _over_wire_head(self, wire: Wire, key: str) -> ObjectInfo:
        info = await wire.head(key)
        self._ask_wire = False
        return info

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        path = self._root + info.key
        operation = Operation("read", info.key, self._label)
        try:
            _check_utf8(path, operation)
            if self._wire is not None:  # obstore's threads cost more than the request (range_client.py)
                return await self._wire.read(info, byte_range)
            return await self._read_by_obstore(path, info, byte_range, operation)
        except NotFoundError as error:
            raise as_stale(error, operation) from error

    @property
    def can_place(self) -> bool:
        return self._wire is not None

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        granted()  # turns are limit.py's

    def give_turn_back(self) -> None:
        """Nobody waits here."""

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        return 0

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        assert self._wire is not None, "can_place says so"
        try:
            return self._wire.errand(info, byte_range)
        except UnicodeError:  # `read` says what is wrong with the key
            return None

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        assert self._wire is not None, "can_place says so"
        try:
            self._wire.conclude(errand, info, outcome)
        except NotFoundError as error:
            raise as_stale(error, Operation("read", info.key, self._label)) from error

    async def _read_by_obstore(
        self, path: str, info: ObjectInfo, byte_range: ByteRange, operation: Operation
    ) -> memoryview:
        options: GetOptions = {"range": (byte_range.start, byte_range.stop)}
        if is_strong_etag(info.version):
            options["if_match"] = info.version
        try:
            result = await obstore.get_async(self._client, path, options=options)
            now = self._info(info.key, result.meta)
            check_encoding({str(name): str(value) for name, value in result.attributes.items()}, operation)
            if now.version != info.version or now.size_bytes != info.size_bytes:
                raise changed(operation, was=_described(info), now=_described(now))
            if result.range != (byte_range.start, byte_range.stop):
                raise unavailable(operation, f"asked for {byte_range} and got {result.range}")
            data = memoryview(await result.bytes_async())
        except OrchestraError:  # ours are OSErrors too
            raise
        except _OBSTORE_ERRORS as error:
            raise self._translated(error, operation) from error
        if len(data) != byte_range.length:
            raise unavailable(operation, f"the body has {len(data)} bytes instead of {byte_range.length}")
        return data

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        if not _is_utf8(prefix):  # nothing can lie there
            return listing_that_arrives_whole(_list_nothing)
        if self._wire is not None:
            return self._wire.list_directory(prefix)
        return listing_that_arrives_whole(lambda: self._list_whole(prefix))

    async def _list_whole(self, prefix: str) -> list[ListPage]:
        folder = (self._root + prefix).rstrip("/")
        operation = Operation("list", prefix, self._label)
        if folder and not is_plain_path(folder):
            return cut_into_pages((), ())
        try:
            listing = await obstore.list_with_delimiter_async(self._client, folder or None)
        except OrchestraError:  # ours are OSErrors too
            raise
        except _OBSTORE_ERRORS as error:
            raise self._translated(error, operation) from error
        objects = (
            self._info(meta["path"].removeprefix(self._root), meta)
            for meta in listing["objects"]
            if meta["path"] != folder  # a folder marker, named without its slash
        )
        prefixes = (path.removeprefix(self._root) + "/" for path in listing["common_prefixes"])
        return cut_into_pages(objects, prefixes)

    async def probe(self) -> None:
        if self._wire is not None:
            await self._wire.probe()
            return
        try:
            # Any one key or none: right for the container, the credentials and the right to list.
            async for _ in obstore.list(self._client, self._root.rstrip("/") or None, chunk_size=1):
                return
        except _OBSTORE_ERRORS as error:
            failed = self._translated(error, Operation("reach", self._root, self._label))
            if isinstance(failed, NotFoundError):
                failed = NotFoundError(failed.message.replace("no such object", "no such bucket or container"))
            raise failed from error

    async def close(self) -> None:
        # obstore closes its connections when the client is collected; the wire must be told.
        if self._wire is not None:
            await self._wire.close()

    def _info(self, key: str, meta: ObjectMeta) -> ObjectInfo:
        # HEAD knows whole seconds only; a listing with milliseconds must not give the object another time.
        mtime_ns = int(meta["last_modified"].timestamp()) * 10**9
        size = meta["size"]
        etag = meta["e_tag"] or ""
        if etag and not etag.endswith('"'):  # Azure and GCS list it without quotes and send it with them
            etag = f'"{etag}"'
        return ObjectInfo(key, size, mtime_ns, etag or weak_version(size, mtime_ns))

    def _translated(self, error: Exception, operation: Operation) -> OrchestraError:
        failure = translated(error, operation)
        if isinstance(failure, ThrottledError):
            self._ask_wire = True
        return failure


def _described(info: ObjectInfo) -> str:
    return f"{info.version} of {info.size_bytes} bytes"


def is_plain_path(path: str) -> bool:
    """Return whether obstore can name this key: no empty, "." or ".." segment, no control character."""
    if not path or any(character < " " or character == "\x7f" for character in path):
        return False
    return not any(segment in ("", ".", "..") for segment in path.split("/"))


async def _list_nothing() -> list[ListPage]:
    return cut_into_pages((), ())


def _is_utf8(path: str) -> bool:
    """Return whether `path` can be a key: a file name that is not UTF-8 cannot."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_utf8(path: str, operation: Operation) -> None:
    if not _is_utf8(path):
        raise NotFoundError(operation.failed("no such object"))


_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CONNECT_REASON = re.compile(r'message: "([^"]+)"')
_TLS_REASON = re.compile(
    r"(invalid peer certificate: \w+|UnknownIssuer|NotValidForName|CertExpired|InvalidContentType)"
)
# obstore asks these when neither options nor environment hold credentials.
_FROM_CREDENTIALS = re.compile(r"169\.254\.16[0-9]\.|169\.254\.170\.2|fd00:ec2::|TokenRequest|External AWS credential")
_OWN_REASON = re.compile(r"AccessDeniedError: ([^\n]+)")
# Answers of a server or a proxy that may be right the next time.
_PASSING_ANSWERS = {
    "NotPartial": "the answer to a range request was the whole object",
    "UnexpectedRange": "the answer holds another range than was asked for",
    "NoContentRange": "the answer to a range request has no Content-Range",
    "ParseContentRange": "the answer to a range request has no readable Content-Range",
    "MissingContentLength": "the answer has no Content-Length",
    "InvalidListResponse": "the store did not answer with a listing",
    "kind: Timeout": "no progress within the attempt's time",
    "kind: Interrupted": "the body ended early",
    "kind: Decode": "the body could not be read",
}


def translated(error: Exception, operation: Operation) -> OrchestraError:
    """Return our error for one of obstore's, read from its text: it has no other form."""
    text = str(error)
    status = _STATUS.search(text)
    if isinstance(error, UnauthenticatedError) or _FROM_CREDENTIALS.search(text):
        return _credentials_failed(text, int(status[1]) if status else 0, operation)
    if status is not None:
        return error_for_status(int(status[1]), operation, code=s3_code(text))
    if "BareRedirect" in text:
        return error_for_status(301, operation)
    if isinstance(error, FileNotFoundError):
        return error_for_status(404, operation)
    if "InvalidPath" in text or isinstance(error, ValueError):
        reason = one_line(text)
        return StoreError(operation.failed(f"{reason} (the option client = 'fsspec' serves such keys)"))
    tls = _TLS_REASON.search(text)
    if tls is not None:
        return StoreError(operation.failed(f"TLS: {tls[1]}; a private CA goes into the option ca_file"))
    if "dns error" in text:
        return unreachable(operation, "the host name cannot be resolved")
    for sign, reason in _PASSING_ANSWERS.items():
        if sign in text:
            return unavailable(operation, reason)
    if "kind: Connect" in text:
        reason_found = _CONNECT_REASON.search(text)
        return unreachable(operation, f"no connection: {reason_found[1] if reason_found else 'refused'}")
    if "HttpError" in text or "HTTP error" in text:
        return unavailable(operation, "the connection failed")
    return StoreError(operation.failed(one_line(text)))


def _credentials_failed(text: str, status: int, operation: Operation) -> OrchestraError:
    """Return the error of a request that was not sent or not signed for want of credentials."""
    own = _OWN_REASON.search(text)
    if own is not None:  # our credential source failed inside obstore: its sentence says it best
        return AccessDeniedError(own[1])
    if status >= 500 or status == 429 or "kind: Timeout" in text:
        return unavailable(operation, "the machine's credential service does not answer")
    if status == 401:
        return error_for_status(401, operation, code=s3_code(text))
    return AccessDeniedError(
        operation.failed(
            "no credentials: the mount's options and the environment hold none, and this machine's metadata service"
            " gives none (a public bucket needs the option anon = true)"
        )
    )
