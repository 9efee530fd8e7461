"""One HTTP request and its verdict, for the stores that must see headers: http.py and s3_wire.py.

Owns: the aiohttp session, and translation of its failures. Leaves to others: URLs, signatures, what an answer to a
range request must look like (range_answers).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from orchestra.clock import Clock
from orchestra.errors import ConfigError, OrchestraError, StoreError, StoreUnavailableError
from orchestra.stores.carrying import Errand, NotCarriedError, Outcome, Server
from orchestra.stores.contract import Buffer
from orchestra.stores.range_answers import check_encoding, check_plain_answer, check_range_answer, version_of_headers
from orchestra.stores.range_client import (
    NotPlainError,
    RangeAnswer,
    RangeClient,
    request_of,
    ssl_context_of,
    ssl_setting_of,
)
from orchestra.stores.translate import (
    Operation,
    changed,
    error_for_status,
    retry_after_s,
    s3_code,
    unavailable,
    unreachable,
)
from orchestra.units import MIB
from orchestra.values import ByteRange

# A LIST answer of 1,000 keys of 1,024 bytes, each percent-encoded, is 3 MiB and its markup; an index page of 100,000
# links is 10 MiB. More is no listing.
DOCUMENT_BYTES_MAX = 16 * MIB
REDIRECTS_MAX = 3
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"\Z')


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How to connect. `proxy_url` is not shown: it may hold a password."""

    requests_max: int
    attempt_timeout_s: float
    ca_file: str = ""
    allow_invalid_certificates: bool = False
    proxy_url: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer; `path` is where redirects led, percent-encoded."""

    status: int
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes


class HttpClient:
    """Sends requests without bodies; every failure comes out as one of our errors. Opens nothing before its first."""

    def __init__(self, settings: HttpSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._ssl: ssl.SSLContext | bool = _ssl_setting(settings)
        self._ranges: dict[str, RangeClient | None] = {}
        self._servers: dict[str, Server] = {}
        self._proxies: dict[str, str | None] = {}  # by server: asking the environment takes 0.3 ms
        self._is_plain = True

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        for ranges in self._ranges.values():
            if ranges is not None:
                await ranges.close()
        self._ranges.clear()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(
                total=None,  # bounded by progress here, in whole by timeout.py
                sock_connect=min(10.0, self._settings.attempt_timeout_s),
                sock_read=self._settings.attempt_timeout_s,
            )
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._settings.requests_max, ssl=self._ssl),
                timeout=timeout,
                auto_decompress=False,  # a ranged gzip body cannot be decompressed; check_encoding refuses it
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def fetch(
        self, method: str, url: str, headers: Mapping[str, str], operation: Operation, *, redirects: bool = False
    ) -> Answer:
        """Return a 2xx answer with its whole body, which must be a document (DOCUMENT_BYTES_MAX)."""
        try:
            async with self._request(method, url, headers, redirects) as response:
                await self._check_status(response, operation)
                body = await _read_at_most(response, DOCUMENT_BYTES_MAX, operation)
                return Answer(response.status, response.url.raw_path, response.headers, body)
        except OrchestraError:
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translated(error, operation, self._settings) from error

    async def fetch_range(
        self,
        url: str,
        headers: Mapping[str, str],
        operation: Operation,
        *,
        byte_range: ByteRange,
        size_bytes: int,
        version: str,
        redirects: bool = False,
    ) -> Buffer:
        """Return exactly the bytes of `byte_range` of that version, or raise what contract.py promises for `read`.

        `headers` ask for the range and carry the condition; the answer is checked all the same.
        """
        base, target = _split(url)
        ranges = None if redirects or not self._is_plain else self._range_client(base)
        if ranges is not None:
            try:
                answer = await ranges.get(target, headers, byte_range)
            except NotPlainError as error:
                # The next try goes below, to the client that reads every kind of answer, until it sees a plain one.
                self._is_plain = False
                raise unavailable(operation, str(error)) from error
            except (TimeoutError, OSError) as error:
                if isinstance(error, OrchestraError):
                    raise unavailable(operation, str(error)) from error
                raise _translated(error, operation, self._settings) from error
            else:
                return self._checked(answer, operation, byte_range=byte_range, size_bytes=size_bytes, version=version)
        try:
            async with self._request("GET", url, headers, redirects) as response:
                await self._check_status(response, operation)
                check_encoding(response.headers, operation)
                skip = check_range_answer(response.status, response.headers, byte_range, size_bytes, operation)
                now = version_of_headers(response.headers, size_bytes)
                if now != version:
                    raise changed(operation, was=version, now=now)
                self._is_plain = response.status == 206 and "Content-Length" in response.headers
                data = await _read_at_most(response, skip + byte_range.length, operation, cut=response.status == 200)
        except OrchestraError:
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _translated(error, operation, self._settings) from error
        if len(data) != skip + byte_range.length:
            raise unavailable(operation, f"the body ended after {len(data)} of {skip + byte_range.length} bytes")
        return data[skip:] if skip else data

    def errand(
        self, url: str, headers: Mapping[str, str], *, byte_range: ByteRange, size_bytes: int, version: str
    ) -> Errand | None:
        """Return what `fetch_range` would send, for another process to send; None if it would go another way."""
        base, target = _split(url)
        if not self._is_plain or self._range_client(base) is None:
            return None
        return Errand(self._server(base), request_of(target, headers), byte_range, size_bytes, version)

    def conclude(self, errand: Errand, operation: Operation, outcome: Outcome) -> None:
        """Return if the bytes are in their place; else raise what `fetch_range` would, or what became of it."""
        if outcome is None:
            return
        if isinstance(outcome, TimeoutError):
            raise _translated(outcome, operation, self._settings) from outcome
        if isinstance(outcome, RangeAnswer):
            asked = errand.byte_range
            self._checked(outcome, operation, byte_range=asked, size_bytes=errand.size_bytes, version=errand.version)
            raise NotCarriedError  # the answer is right, and its bytes did not find their place
        raise outcome

    def _server(self, base: str) -> Server:
        server = self._servers.get(base)
        if server is None:
            settings = self._settings
            server = self._servers[base] = Server(
                base, settings.attempt_timeout_s, settings.ca_file, settings.allow_invalid_certificates
            )
        return server

    def _checked(
        self, answer: RangeAnswer, operation: Operation, *, byte_range: ByteRange, size_bytes: int, version: str
    ) -> Buffer:
        """Return the bytes of a whole 206, or raise what the answer says."""
        check_plain_answer(
            answer,
            operation,
            byte_range=byte_range,
            size_bytes=size_bytes,
            version=version,
            now_s=self._clock.wall_s(),
        )
        return answer.data

    def _range_client(self, base: str) -> RangeClient | None:
        """The client of that server ("scheme://host:port"); None where a proxy stands between."""
        if base not in self._ranges:
            client = None
            if not self._proxy(base):
                context = ssl_context_of(self._ssl) if base.startswith("https:") else None
                client = RangeClient(base, ssl_context=context, stall_timeout_s=self._settings.attempt_timeout_s)
            self._ranges[base] = client
        return self._ranges[base]

    def _request(
        self, method: str, url: str, headers: Mapping[str, str], redirects: bool
    ) -> aiohttp.client._RequestContextManager:
        return self._open_session().request(
            method,
            URL(url, encoded=True),
            headers={**headers, "accept-encoding": "identity"},
            allow_redirects=redirects,
            max_redirects=REDIRECTS_MAX,
            proxy=self._proxy(_split(url)[0]),
        )

    def _proxy(self, base: str) -> str | None:
        if self._settings.proxy_url:
            return self._settings.proxy_url
        if base not in self._proxies:
            self._proxies[base] = _environment_proxy(base)
        return self._proxies[base]

    async def _check_status(self, response: aiohttp.ClientResponse, operation: Operation) -> None:
        if 200 <= response.status < 300:
            return
        code = ""
        if (response.content_length or 0) <= 64 * 1024:
            code = s3_code((await response.content.read(64 * 1024)).decode("utf-8", "replace"))
        wait_s = retry_after_s(response.headers, now_s=self._clock.wall_s())
        raise error_for_status(response.status, operation, code=code, retry_after_s=wait_s)


def is_strong_etag(version: str) -> bool:
    """Return whether If-Match may carry it: a weak ETag (W/) never matches there (RFC 9110, 13.1.1).

    Only what RFC 9110 allows in one, so that no ETag of a listing can add a header of its own to a request.
    """
    return _STRONG_ETAG.match(version) is not None


def http_date(mtime_ns: int) -> str:
    """Return a time as If-Unmodified-Since carries it."""
    return datetime.fromtimestamp(mtime_ns // 10**9, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")


async def _read_at_most(
    response: aiohttp.ClientResponse, limit_bytes: int, operation: Operation, *, cut: bool = False
) -> bytes:
    """Return the body. More than `limit_bytes` is an error, or left unread with `cut`."""
    parts: list[bytes] = []
    length = 0
    async for part in response.content.iter_any():
        parts.append(part)
        length += len(part)
        if length > limit_bytes and not cut:
            raise unavailable(operation, f"the body is longer than the {limit_bytes} bytes it may have")
        if length >= limit_bytes and cut:
            response.close()  # the rest of a whole body nobody asked for
            break
    return b"".join(parts)[:limit_bytes]


def _translated(error: Exception, operation: Operation, settings: HttpSettings) -> OrchestraError:
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return StoreError(operation.failed(f"TLS: {_tls_reason(error)}; a private CA goes into the option ca_file"))
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.TooManyRedirects, UnicodeError)):
        return StoreError(operation.failed(f"{type(error).__name__}: the server or the URL cannot be followed"))
    if isinstance(error, TimeoutError):
        return unavailable(operation, f"no progress for {settings.attempt_timeout_s:g}s")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return unreachable(operation, "the host name cannot be resolved")
    if isinstance(error, aiohttp.ClientConnectorError):
        return unreachable(operation, f"no connection: {error.os_error.strerror or error.os_error}")
    if isinstance(error, socket.gaierror):
        return unreachable(operation, "the host name cannot be resolved")
    if isinstance(error, ConnectionRefusedError):
        return unreachable(operation, f"no connection: {os.strerror(errno.ECONNREFUSED)}")
    if isinstance(error, aiohttp.ClientPayloadError):
        return unavailable(operation, "the body ended early")
    return StoreUnavailableError(operation.failed(f"the connection failed ({type(error).__name__})"))


def _tls_reason(error: Exception) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return str(getattr(inner, "verify_message", "") or getattr(inner, "reason", "") or "the handshake failed")


def _ssl_setting(settings: HttpSettings) -> ssl.SSLContext | bool:
    try:
        return ssl_setting_of(settings.ca_file, allow_invalid=settings.allow_invalid_certificates)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"option 'ca_file': {settings.ca_file!r} is no readable PEM file of certificates") from error


def _split(url: str) -> tuple[str, str]:
    """Cut an encoded URL without a fragment into its server and what a request line names."""
    at = url.find("/", url.find("://") + 3)
    return (url, "/") if at < 0 else (url[:at], url[at:])


def _environment_proxy(url: str) -> str | None:
    """Return the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name, as obstore's client does."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)
