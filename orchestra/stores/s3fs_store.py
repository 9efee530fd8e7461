"""S3 through s3fs (botocore), for options that only it has: profiles, `client_kwargs`, `config_kwargs` ...

Owns: HEAD, conditional GET and LIST page by page with the client that s3fs configured, and botocore's errors. Leaves
to others: retries (botocore's own are off). Costs twenty times the CPU of object_store.py for a small object.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
import botocore.exceptions
import s3fs
from multidict import CIMultiDict

from orchestra.clock import Clock
from orchestra.config import FetchConfig
from orchestra.errors import AccessDeniedError, ConfigError, NotFoundError, OrchestraError, StoreError
from orchestra.stores.contract import Buffer, ListPage
from orchestra.stores.http_client import is_strong_etag
from orchestra.stores.options import S3_ALIASES, S3_NAMES, S3FS_NAMES, canonical_options, flag, literal
from orchestra.stores.pages import PAGE_KEYS_MAX, PagedListing
from orchestra.stores.range_answers import check_encoding, check_range_answer, version_of_headers
from orchestra.stores.s3_config import checked_endpoint
from orchestra.stores.s3_wire import quoted_etag
from orchestra.stores.translate import (
    Operation,
    as_stale,
    changed,
    error_for_status,
    one_line,
    retry_after_s,
    unavailable,
)
from orchestra.stores.uri import StoreUri
from orchestra.values import ByteRange, ObjectInfo, weak_version

_BOTOCORE_ERRORS = (botocore.exceptions.BotoCoreError, aiohttp.ClientError, TimeoutError, OSError, ValueError)


class S3fsStore:
    """One bucket below `root` through an s3fs file system made with `asynchronous=True`."""

    def __init__(self, fs: Any, *, bucket: str, root: str, store_id: str, clock: Clock) -> None:
        self._fs = fs
        self._bucket = bucket
        self._root = root
        self._store_id = store_id
        self._clock = clock

    @property
    def store_id(self) -> str:
        return self._store_id

    async def head(self, key: str) -> ObjectInfo:
        operation = Operation("look up", key, self._store_id)
        answer = await self._call(operation, "head_object", Key=self._root + key)
        check_encoding(_headers(answer), operation)
        return _info(key, answer["ContentLength"], answer)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        operation = Operation("read", info.key, self._store_id)
        named = {"Key": self._root + info.key, "Range": f"bytes={byte_range.start}-{byte_range.stop - 1}"}
        if is_strong_etag(info.version):
            named["IfMatch"] = info.version
        try:
            answer = await self._call(operation, "get_object", **named)
        except NotFoundError as error:
            raise as_stale(error, operation) from error
        try:
            async with answer["Body"] as body:
                skip = self._checked(answer, info, byte_range, operation)
                data: bytes = await body.read()
        except OrchestraError:  # ours are OSErrors too
            raise
        except _BOTOCORE_ERRORS as error:
            raise self._translated(error, operation) from error
        if len(data) < skip + byte_range.length:
            raise unavailable(operation, f"got {len(data)} of {byte_range.length} bytes")
        return data[skip : skip + byte_range.length]

    def _checked(self, answer: Any, info: ObjectInfo, byte_range: ByteRange, operation: Operation) -> int:
        """Return how many bytes of the body come before the range, or raise: see check_range_answer."""
        headers = _headers(answer)
        check_encoding(headers, operation)
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        skip = check_range_answer(status, headers, byte_range, info.size_bytes, operation)
        now = version_of_headers(headers, info.size_bytes)
        if now != info.version:
            raise changed(operation, was=info.version, now=now)
        return skip

    def list_directory(self, prefix: str) -> PagedListing[str]:
        operation = Operation("list", prefix, self._store_id)

        async def fetch_page(token: str | None) -> tuple[ListPage, str | None]:
            named = {"Prefix": self._root + prefix, "Delimiter": "/", "MaxKeys": PAGE_KEYS_MAX}
            if token is not None:
                named["ContinuationToken"] = token
            try:
                answer = await self._call(operation, "list_objects_v2", **named)
            except NotFoundError as error:
                if isinstance(error.__cause__, UnicodeError):  # no key can begin so
                    return ListPage((), ()), None
                raise
            objects = tuple(
                _info(item["Key"].removeprefix(self._root), item["Size"], item) for item in answer.get("Contents", ())
            )
            prefixes = tuple(item["Prefix"].removeprefix(self._root) for item in answer.get("CommonPrefixes", ()))
            following = answer.get("NextContinuationToken") if answer.get("IsTruncated") else None
            if answer.get("IsTruncated") and not following:
                raise unavailable(operation, "the store's listing is cut and says not where it goes on")
            return ListPage(objects, prefixes), following

        return PagedListing(fetch_page)

    async def probe(self) -> None:
        operation = Operation("reach", self._root, self._store_id)
        await self._call(operation, "list_objects_v2", Prefix=self._root, MaxKeys=1)

    async def close(self) -> None:
        client, self._fs._s3 = self._fs._s3, None
        if client is not None:
            await client.close()

    async def _call(self, operation: Operation, method: str, **named: Any) -> Any:
        try:
            await self._fs.set_session()
            client = await self._fs.get_s3(self._bucket)
            return await getattr(client, method)(Bucket=self._bucket, **named)
        except (botocore.exceptions.ClientError, *_BOTOCORE_ERRORS) as error:
            raise self._translated(error, operation) from error

    def _translated(self, error: Exception, operation: Operation) -> OrchestraError:
        if isinstance(error, botocore.exceptions.ClientError):
            metadata = error.response.get("ResponseMetadata", {})
            code = str(error.response.get("Error", {}).get("Code", ""))
            wait_s = retry_after_s(CIMultiDict(metadata.get("HTTPHeaders", {})), now_s=self._clock.wall_s())
            return error_for_status(
                metadata.get("HTTPStatusCode", 500),
                operation,
                code="" if code.isdigit() else code,
                retry_after_s=wait_s,
            )
        if isinstance(error, UnicodeError):
            return NotFoundError(operation.failed("no such object"))
        if isinstance(error, (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)):
            return AccessDeniedError(operation.failed("no credentials: give the options key and secret, or profile"))
        if isinstance(error, (botocore.exceptions.SSLError, ssl.SSLError, aiohttp.ClientSSLError)):
            return StoreError(operation.failed(f"TLS: {one_line(str(error))}"))
        if isinstance(error, (botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError)):
            return unavailable(operation, f"the connection failed ({type(error).__name__})")
        if isinstance(error, (aiohttp.ClientError, OSError)):
            return unavailable(operation, f"the connection failed ({type(error).__name__})")
        return StoreError(operation.failed(f"{type(error).__name__}: {one_line(str(error))}"))


def _headers(answer: Any) -> CIMultiDict[str]:
    return CIMultiDict(answer["ResponseMetadata"]["HTTPHeaders"])


def _info(key: str, size: int, item: Mapping[str, Any]) -> ObjectInfo:
    # HEAD knows whole seconds only; a listing with milliseconds must not give the object another time.
    mtime_ns = int(item["LastModified"].timestamp()) * 10**9
    etag = item.get("ETag") or ""
    return ObjectInfo(key, size, mtime_ns, quoted_etag(etag) if etag else weak_version(size, mtime_ns))


def open_s3fs(uri: StoreUri, options: Mapping[str, str], fetch: FetchConfig, clock: Clock) -> S3fsStore:
    """Return the store of an S3 bucket through s3fs; nothing is asked yet."""
    given = canonical_options("s3", options, names=S3_NAMES | S3FS_NAMES, aliases=S3_ALIASES)
    endpoint = checked_endpoint("s3", given.get("endpoint", ""))
    client = dict(literal("client_kwargs", given.get("client_kwargs", "{}")))
    if given.get("region"):
        client.setdefault("region_name", given["region"])
    if given.get("ca_file"):
        client.setdefault("verify", given["ca_file"])
    if flag(given, "allow_invalid_certificates"):
        client["verify"] = False
    named: dict[str, Any] = {
        "anon": flag(given, "skip_signature"),
        "key": given.get("access_key_id") or None,
        "secret": given.get("secret_access_key") or None,
        "token": given.get("session_token") or None,
        "endpoint_url": endpoint or None,
        "requester_pays": flag(given, "request_payer"),
        "use_ssl": flag(given, "use_ssl", default=True),
        "cache_regions": flag(given, "cache_regions"),
        "client_kwargs": client,
        "config_kwargs": _config_kwargs(given, fetch),
        "s3_additional_kwargs": dict(literal("s3_additional_kwargs", given.get("s3_additional_kwargs", "{}"))),
    }
    if given.get("profile"):
        named["profile"] = given["profile"]
    _refuse_unsupported(given)
    try:
        fs = s3fs.S3FileSystem(**named, asynchronous=True, skip_instance_cache=True, use_listings_cache=False)
    except (botocore.exceptions.BotoCoreError, ValueError, TypeError) as error:
        raise ConfigError(f"s3: {one_line(str(error))}") from error
    endpoint = endpoint or str(client.get("endpoint_url", "")).rstrip("/")
    place = f"?endpoint={endpoint}" if endpoint else ""
    store_id = f"s3://{uri.authority}/{uri.root}{place}"
    return S3fsStore(fs, bucket=uri.authority, root=uri.root, store_id=store_id, clock=clock)


_UNDERSTOOD = frozenset(
    {
        "access_key_id",
        "secret_access_key",
        "session_token",
        "endpoint",
        "region",
        "skip_signature",
        "request_payer",
        "ca_file",
        "allow_invalid_certificates",
        "allow_http",
        "virtual_hosted_style_request",
    }
)


def _refuse_unsupported(given: Mapping[str, str]) -> None:
    for name in given:
        if name not in _UNDERSTOOD and name not in S3FS_NAMES:
            raise ConfigError(
                f"s3: option {name!r} cannot be combined with those that need s3fs ({', '.join(sorted(S3FS_NAMES))})"
            )


def _config_kwargs(given: Mapping[str, str], fetch: FetchConfig) -> dict[str, Any]:
    """Return botocore's configuration: one attempt, our timeouts and pool; the option `config_kwargs` wins."""
    style = "virtual" if flag(given, "virtual_hosted_style_request") else "path"
    return {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": min(10.0, fetch.attempt_timeout_s),
        "read_timeout": fetch.attempt_timeout_s,
        "max_pool_connections": fetch.requests_max,
        "s3": {"addressing_style": style if given.get("endpoint") else "auto"},
        **dict(literal("config_kwargs", given.get("config_kwargs", "{}"))),
    }
