"""A folder on a web server: HEAD, conditional range requests, and listings from its index pages.

Owns: URLs of keys, links of an index page, the conditions that pin a version. Leaves to others: the request itself
(http_client.py), retries.

aiohttp rather than obstore's HTTP store: that one lists by WebDAV only, asks for nothing conditional on a time,
refuses an answer of 200 to a range without saying what came, and hides Retry-After.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin, urlsplit

from orchestra.clock import Clock
from orchestra.config import FetchConfig
from orchestra.errors import ConfigError, NotFoundError, StoreError
from orchestra.stores.contract import Buffer, ListPage
from orchestra.stores.counting import StoreStatistics
from orchestra.stores.http_client import HttpClient, HttpSettings, http_date, is_strong_etag
from orchestra.stores.options import HTTP_NAMES, canonical_options, flag
from orchestra.stores.pages import PagedListing
from orchestra.stores.range_answers import check_encoding, mtime_ns_of, version_of_headers
from orchestra.stores.translate import Operation, as_stale, unavailable
from orchestra.stores.uri import StoreUri
from orchestra.values import ByteRange, ObjectInfo

# An index page says neither exact sizes nor versions, so each file of a page is asked for: this many at a time.
HEADS_AT_A_TIME = 16
NAMES_A_PAGE = 128


class HttpStore:
    """The files below `base_url`, which ends with "/".

    A version is the ETag, else size and Last-Modified (a change within its second goes unseen), else the size alone.
    """

    def __init__(self, base_url: str, http: HttpClient, *, authorization: str = "") -> None:
        self._base_url = base_url
        self._http = http
        self._headers = {"authorization": authorization} if authorization else {}
        self._listing_heads = 0

    @property
    def store_id(self) -> str:
        return self._base_url

    def statistics(self) -> StoreStatistics:
        """Return the HEAD requests that listings needed; what was called is counted by counting.py."""
        return StoreStatistics(head_requests=self._listing_heads)

    async def head(self, key: str) -> ObjectInfo:
        operation = Operation("look up", key, self._base_url)
        if not key or key.endswith("/"):
            raise NotFoundError(operation.failed("no such file"))
        answer = await self._http.fetch("HEAD", self._url(key), self._headers, operation, redirects=True)
        if answer.path.endswith("/"):  # servers send "folder" on to "folder/", whose index page is no file
            raise NotFoundError(operation.failed("it is a folder"))
        if _is_made_up(answer.headers):
            raise NotFoundError(operation.failed("the server answers with a page of its own"))
        check_encoding(answer.headers, operation)
        length = answer.headers.get("Content-Length", "")
        if not length.isdigit():
            raise StoreError(operation.failed("the server does not say its size (no Content-Length)"))
        size = int(length)
        mtime_ns = mtime_ns_of(answer.headers.get("Last-Modified", ""))
        return ObjectInfo(key, size, mtime_ns, version_of_headers(answer.headers, size))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        operation = Operation("read", info.key, self._base_url)
        headers = {**self._headers, "range": f"bytes={byte_range.start}-{byte_range.stop - 1}"}
        if is_strong_etag(info.version):
            headers["if-match"] = info.version
        elif info.mtime_ns:
            headers["if-unmodified-since"] = http_date(info.mtime_ns)
        try:
            return await self._http.fetch_range(
                self._url(info.key),
                headers,
                operation,
                byte_range=byte_range,
                size_bytes=info.size_bytes,
                version=info.version,
                redirects=True,
            )
        except NotFoundError as error:
            raise as_stale(error, operation) from error

    def list_directory(self, prefix: str) -> PagedListing[int]:
        names: list[str] = []
        folders: tuple[str, ...] = ()

        async def fetch_page(start: int | None) -> tuple[ListPage, int | None]:
            nonlocal folders
            if start is None:
                names[:], folders = await self._index(prefix)
            at = start or 0
            objects = await self._heads(names[at : at + NAMES_A_PAGE])
            following = at + NAMES_A_PAGE
            page = ListPage(objects, folders if start is None else ())
            return page, following if following < len(names) else None

        return PagedListing(fetch_page)

    async def probe(self) -> None:
        operation = Operation("reach", "", self._base_url)
        try:
            await self._http.fetch("HEAD", self._base_url, self._headers, operation, redirects=True)
        except NotFoundError as error:
            raise NotFoundError(operation.failed("no such folder on the server")) from error

    async def close(self) -> None:
        await self._http.close()

    def _url(self, key: str) -> str:
        return self._base_url + quote(key, safe="/~-_.", errors="surrogateescape")

    async def _index(self, prefix: str) -> tuple[list[str], tuple[str, ...]]:
        operation = Operation("list", prefix, self._base_url)
        url = self._url(prefix)
        try:
            answer = await self._http.fetch("GET", url, self._headers, operation, redirects=True)
        except NotFoundError:
            return [], ()
        if "html" not in answer.headers.get("Content-Type", ""):
            raise StoreError(operation.failed("the server shows no index page (HTML) for this folder: turn it on"))
        if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise unavailable(operation, "the index page came compressed though it was not to be")
        children = links_below(url, answer.body.decode("utf-8", "replace"))
        files = [prefix + name for name in children if not name.endswith("/")]
        return files, tuple(prefix + name for name in children if name.endswith("/"))

    async def _heads(self, keys: list[str]) -> tuple[ObjectInfo, ...]:
        turns = asyncio.Semaphore(HEADS_AT_A_TIME)

        async def head(key: str) -> ObjectInfo | None:
            async with turns:
                self._listing_heads += 1
                try:
                    return await self.head(key)
                except NotFoundError:  # a dead link, or a folder linked without its slash
                    return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(head(key)) for key in keys]
        return tuple(info for task in tasks if (info := task.result()) is not None)


def _is_made_up(headers: Mapping[str, str]) -> bool:
    """Whether an answer is a page that the server made, such as the index of a folder: HTML without age or version."""
    return (
        headers.get("Content-Type", "").startswith("text/html")
        and "ETag" not in headers
        and "Last-Modified" not in headers
    )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.targets: list[str] = []
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._text is not None:
            # Some servers link a folder without its slash and show it with one.
            if self.targets and "".join(self._text).strip().endswith("/") and not self.targets[-1].endswith("/"):
                self.targets[-1] += "/"
            self._text = None


def links_below(folder_url: str, page: str) -> list[str]:
    """Return the names directly below the folder that its index page links to, decoded; folders end with "/".

    Links up, out, deeper, or with a query (the sort orders of Apache) are left out, and each name comes once.
    """
    links = _Links()
    links.feed(page)
    folder = urlsplit(folder_url)
    names: dict[str, None] = {}
    for target in links.targets:
        try:
            link = urlsplit(urljoin(folder_url, target.strip()))
        except ValueError:
            continue
        if link.query or link.fragment or link.netloc != folder.netloc or not link.path.startswith(folder.path):
            continue
        name = unquote(link.path[len(folder.path) :], errors="surrogateescape")
        if name.strip("/") in ("", ".", "..") or "/" in name[:-1] or "\0" in name:
            continue
        names[name] = None
    return list(names)


def open_http(uri: StoreUri, options: Mapping[str, str], fetch: FetchConfig, clock: Clock) -> HttpStore:
    """Return the store of a web folder; nothing is asked yet."""
    given = canonical_options("http", options, names=HTTP_NAMES)
    settings = HttpSettings(
        requests_max=fetch.requests_max,
        attempt_timeout_s=fetch.attempt_timeout_s,
        ca_file=given.get("ca_file", ""),
        allow_invalid_certificates=flag(given, "allow_invalid_certificates"),
        proxy_url=given.get("proxy_url", ""),
    )
    return HttpStore(str(uri), HttpClient(settings, clock), authorization=_authorization(given))


def _authorization(given: Mapping[str, str]) -> str:
    user, token = given.get("user", ""), given.get("bearer_token", "")
    if not (user + token + given.get("password", "")).isprintable():
        raise ConfigError("http: option user, password or bearer_token holds a line break: remove it")
    if user and token:
        raise ConfigError("http: options user and bearer_token exclude each other: keep one")
    if token:
        return f"Bearer {token}"
    if user:
        return "Basic " + b64encode(f"{user}:{given.get('password', '')}".encode()).decode()
    return ""
