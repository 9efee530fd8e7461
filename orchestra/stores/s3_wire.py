"""The S3 requests that obstore cannot make: LIST page by page, keys that it cannot name, and reads at less cost.

Owns: ListObjectsV2, and HEAD and GET of any key, signed by sigv4.py. Leaves to others: when they are used
(object_store.py), connections (http_client.py, range_client.py), retries.

Why it exists, measured with obstore 0.12: its delimiter listing returns only when the last page has come (100,000 keys
are 100 requests and one list of 100,000 dicts); one key such as "a//b" or "../x" fails the listing of its directory;
and its errors leave out Retry-After. Its reads cost more beside a loop that writes files: docs/decisions/0002.
"""

from __future__ import annotations

from datetime import datetime
from urllib.parse import unquote_plus, urlsplit
from xml.etree import ElementTree

from orchestra.clock import Clock
from orchestra.errors import StoreError
from orchestra.stores.carrying import Errand, Outcome
from orchestra.stores.contract import Buffer, ListPage
from orchestra.stores.http_client import HttpClient, HttpSettings, is_strong_etag
from orchestra.stores.pages import PAGE_KEYS_MAX, PagedListing
from orchestra.stores.range_answers import check_encoding, mtime_ns_of, version_of_headers
from orchestra.stores.s3_config import CredentialSource, S3Config
from orchestra.stores.sigv4 import Credentials, Request, encode_path, encode_query, signed_headers
from orchestra.stores.translate import Operation, unavailable
from orchestra.values import ByteRange, ObjectInfo, weak_version


class S3Wire:
    """One bucket over plain HTTP requests. `source` None sends unsigned requests (public buckets)."""

    def __init__(self, config: S3Config, source: CredentialSource | None, settings: HttpSettings, clock: Clock) -> None:
        self._config = config
        self._base = urlsplit(config.bucket_url)
        self._source = source
        self._clock = clock
        self._http = HttpClient(settings, clock)

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()

    async def head(self, key: str) -> ObjectInfo:
        """HEAD one object."""
        operation = self._operation("look up", key)
        url, headers = await self._signed("HEAD", self._config.root + key, [], {})
        answer = await self._http.fetch("HEAD", url, headers, operation)
        check_encoding(answer.headers, operation)
        length = answer.headers.get("Content-Length", "")
        if not length.isdigit():
            raise unavailable(operation, "the answer has no Content-Length")
        size = int(length)
        mtime_ns = mtime_ns_of(answer.headers.get("Last-Modified", ""))
        return ObjectInfo(key, size, mtime_ns, version_of_headers(answer.headers, size))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        """GET one range of one version."""
        url, headers = await self._signed("GET", self._config.root + info.key, [], _range_headers(info, byte_range))
        return await self._http.fetch_range(
            url,
            headers,
            self._operation("read", info.key),
            byte_range=byte_range,
            size_bytes=info.size_bytes,
            version=info.version,
        )

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        """As `read` begins, for another process to send; None without credentials that are valid now."""
        credentials = None
        if self._source is not None:
            credentials = self._source.ready()
            if credentials is None:
                return None
        url, headers = self._signed_with(
            credentials, "GET", self._config.root + info.key, [], _range_headers(info, byte_range)
        )
        return self._http.errand(url, headers, byte_range=byte_range, size_bytes=info.size_bytes, version=info.version)

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        """As `read` ends; also raises NotCarriedError."""
        self._http.conclude(errand, self._operation("read", info.key), outcome)

    def list_directory(self, prefix: str) -> PagedListing[str]:
        """LIST below `prefix`, one request a page."""
        seen: set[str] = set()  # the names of the page before: a store that repeats one at a border is heard once

        async def fetch_page(token: str | None) -> tuple[ListPage, str | None]:
            page, following = await self._fetch_page(prefix, token)
            names = {entry.key for entry in page.objects} | set(page.prefixes)
            fresh = ListPage(
                tuple({entry.key: entry for entry in page.objects if entry.key not in seen}.values()),
                tuple(dict.fromkeys(name for name in page.prefixes if name not in seen)),
            )
            seen.clear()
            seen.update(names)
            return fresh, following

        return PagedListing(fetch_page)

    async def probe(self) -> None:
        """LIST one key: right for the bucket, the credentials and the right to list."""
        await self._list("", None, keys_max=1, operation=Operation("reach", self._config.root, self._config.label))

    async def _fetch_page(self, prefix: str, token: str | None) -> tuple[ListPage, str | None]:
        operation = self._operation("list", prefix)
        body = await self._list(prefix, token, keys_max=PAGE_KEYS_MAX, operation=operation)
        page, following = parse_list_page(body, root=self._config.root, operation=operation)
        if following is not None and following == token:
            raise StoreError(operation.failed("the store's listing does not advance"))
        return page, following

    async def _list(self, prefix: str, token: str | None, *, keys_max: int, operation: Operation) -> bytes:
        parameters = [
            ("list-type", "2"),
            ("delimiter", "/"),
            ("encoding-type", "url"),
            ("max-keys", str(keys_max)),
            ("prefix", self._config.root + prefix),
        ]
        if token is not None:
            parameters.append(("continuation-token", token))
        url, headers = await self._signed("GET", "", parameters, {})
        return (await self._http.fetch("GET", url, headers, operation)).body

    def _operation(self, verb: str, key: str) -> Operation:
        return Operation(verb, key, self._config.label)

    async def _signed(
        self, method: str, key: str, parameters: list[tuple[str, str]], headers: dict[str, str]
    ) -> tuple[str, dict[str, str]]:
        """Return the URL to ask and the headers to send."""
        credentials = None if self._source is None else await self._source.credentials()
        return self._signed_with(credentials, method, key, parameters, headers)

    def _signed_with(
        self,
        credentials: Credentials | None,
        method: str,
        key: str,
        parameters: list[tuple[str, str]],
        headers: dict[str, str],
    ) -> tuple[str, dict[str, str]]:
        base = self._base
        path = encode_path(f"{base.path}/{key}" if key else base.path or "/")
        query = encode_query(parameters)
        sent = {**headers, "host": base.netloc}
        if self._config.request_payer:
            sent["x-amz-request-payer"] = "requester"
        if credentials is not None:
            request = Request(method, path, query, sent)
            sent = signed_headers(request, credentials, region=self._config.region, wall_s=self._clock.wall_s())
        return f"{base.scheme}://{base.netloc}{path}" + (f"?{query}" if query else ""), sent


def _range_headers(info: ObjectInfo, byte_range: ByteRange) -> dict[str, str]:
    wanted = {"range": f"bytes={byte_range.start}-{byte_range.stop - 1}"}
    if is_strong_etag(info.version):
        wanted["if-match"] = info.version
    return wanted


def parse_list_page(body: bytes, *, root: str, operation: Operation) -> tuple[ListPage, str | None]:
    """Return the page and the next token of a ListObjectsV2 answer; keys come back relative to `root`.

    Raises StoreUnavailableError for a document that is cut or no listing: half a page is never taken for a whole one.
    """
    if b"<!" in body:  # a listing declares no document type; an entity could expand without bound
        raise StoreError(operation.failed("the store's listing holds a document type declaration: refused"))
    try:
        tree = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise unavailable(operation, "the store's listing is not well-formed XML") from error
    space = tree.tag[: tree.tag.index("}") + 1] if tree.tag.startswith("{") else ""
    if tree.tag != f"{space}ListBucketResult":
        raise unavailable(operation, "the store did not answer with a listing")
    encoded = (tree.findtext(f"{space}EncodingType") or "").strip() == "url"
    try:
        objects = tuple(
            _object_of(item, space, encoded=encoded, root=root) for item in tree.iterfind(f"{space}Contents")
        )
    except ValueError as error:
        raise unavailable(operation, "an entry of the store's listing lacks key, size or time") from error
    prefixes = tuple(
        _key_of(item.findtext(f"{space}Prefix"), encoded=encoded, root=root)
        for item in tree.iterfind(f"{space}CommonPrefixes")
    )
    if (tree.findtext(f"{space}IsTruncated") or "").strip().lower() != "true":
        return ListPage(objects, prefixes), None
    token = tree.findtext(f"{space}NextContinuationToken")
    if not token:
        raise unavailable(operation, "the store's listing is cut and says not where it goes on")
    return ListPage(objects, prefixes), token


def _object_of(item: ElementTree.Element, space: str, *, encoded: bool, root: str) -> ObjectInfo:
    size = int(item.findtext(f"{space}Size") or "")
    key = _key_of(item.findtext(f"{space}Key"), encoded=encoded, root=root)
    # HEAD knows whole seconds only; a listing with milliseconds must not give the object another time.
    mtime_ns = int(datetime.fromisoformat(item.findtext(f"{space}LastModified") or "").timestamp()) * 10**9
    etag = (item.findtext(f"{space}ETag") or "").strip()
    return ObjectInfo(key, size, mtime_ns, quoted_etag(etag) if etag else weak_version(size, mtime_ns))


def _key_of(text: str | None, *, encoded: bool, root: str) -> str:
    if text is None:
        raise ValueError("no key")
    return (unquote_plus(text, errors="surrogateescape") if encoded else text).removeprefix(root)


def quoted_etag(etag: str) -> str:
    """Return an ETag as a header carries it: some stores list it without its quotes."""
    return etag if etag.endswith('"') else f'"{etag}"'
