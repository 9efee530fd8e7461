"""The pure parts of the stores: URIs, options, signatures, listings, answers, and the words of errors."""

# Over 500 lines: tables of inputs and the words they are answered with, more data than code.
from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from orchestra.clock import ManualClock
from orchestra.config import FetchConfig
from orchestra.errors import (
    AccessDeniedError,
    ConfigError,
    NotFoundError,
    OrchestraError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.contract import StoreSettings
from orchestra.stores.http import links_below
from orchestra.stores.http_client import http_date, is_strong_etag
from orchestra.stores.options import canonical_options, flag, literal, needs_s3fs
from orchestra.stores.pages import PAGE_KEYS_MAX, cut_into_pages
from orchestra.stores.range_answers import check_encoding, check_range_answer, mtime_ns_of, version_of_headers
from orchestra.stores.registry import open_bare_store, open_store
from orchestra.stores.s3_config import resolve_s3
from orchestra.stores.s3_wire import parse_list_page, quoted_etag
from orchestra.stores.sigv4 import Credentials, Request, encode_path, encode_query, signed_headers
from orchestra.stores.translate import Operation, ThrottledError, error_for_status, one_line, retry_after_s
from orchestra.stores.uri import check_uri, parse_uri
from orchestra.values import ByteRange, ObjectInfo

READING = Operation("read", "dir/a.jpg", "s3://bucket/")
FETCH = FetchConfig()

# URIs


@pytest.mark.parametrize(
    ("uri", "kind", "authority", "root"),
    [
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("s3://bucket/a/b", "s3", "bucket", "a/b/"),
        ("s3://bucket/a/b///", "s3", "bucket", "a/b/"),
        ("s3://bucket/what?#is%20this", "s3", "bucket", "what?#is%20this/"),
        ("s3a://bucket/x", "s3", "bucket", "x/"),
        ("S3://bucket/x", "s3", "bucket", "x/"),
        ("gs://bucket/x", "gs", "bucket", "x/"),
        ("gcs://bucket/x", "gs", "bucket", "x/"),
        ("az://container/x", "az", "container", "x/"),
        ("abfss://container@account.dfs.core.windows.net/x", "az", "container@account.dfs.core.windows.net", "x/"),
        ("http://host:8080/x", "http", "host:8080", "x/"),
        ("https://host", "http", "host", ""),
        ("file:///data/x", "file", "", "/data/x/"),
        ("file://localhost/data/x%20y", "file", "", "/data/x y/"),
        ("/data//x/./y", "file", "", "/data/x/y/"),
        ("/", "file", "", "/"),
        ("memory://root/x", "memory", "root", "x/"),
        ("memory://", "memory", "", ""),
        ("sftp://user@host/data", "fsspec", "user@host", "data/"),
        ("hdfs://namenode:9000/data", "fsspec", "namenode:9000", "data/"),
    ],
)
def test_a_good_uri_is_taken_apart(uri: str, kind: str, authority: str, root: str) -> None:
    """Scheme, bucket or host, and root of every kind of store."""
    check_uri(uri)
    found = parse_uri(uri)
    assert (found.kind, found.authority, found.root) == (kind, authority, root)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "empty text is not a store URI"),
        ("   ", "empty text is not a store URI"),
        ("data/imagenet", "neither a store URI nor an absolute path"),
        ("~/data", "neither a store URI nor an absolute path"),
        ("s3:/bucket", "neither a store URI nor an absolute path"),
        ("s4://bucket/x", "unknown scheme 's4': did you mean 's3'?"),
        ("htps://host/x", "did you mean 'https'?"),
        ("qqqq://bucket/x", "known are s3, gs, az, http, https, file, memory"),
        ("s3://", "the bucket is missing"),
        ("s3:///folder", "the bucket is missing"),
        ("gs://", "the bucket is missing"),
        ("az:///x", "the container is missing"),
        ("http://", "the host is missing"),
        ("s3://..", "'..' is no bucket name"),
        ("s3://bucket/a/../b", "'..' is not allowed"),
        ("file:///a/../etc", "'..' is not allowed"),
        ("/a/../etc", "'..' is not allowed"),
        ("http://host/%2e%2e/x", "'..' is not allowed"),
        ("file:///a/%2e%2e/etc", "'..' is not allowed"),
        ("file://host/data", "three slashes"),
        ("file://", "the path is missing"),
        ("simplecache::s3://bucket/x", "chains of protocols"),
        ("zip://a.zip::s3://bucket/x", "chains of protocols"),
        ("zip://a.zip", "scheme 'zip' cannot be mounted"),
        ("reference://x", "cannot be mounted"),
        ("orchestra://x", "its own under store"),
        ("filecache://x", "orchestra is the cache"),
        ("s3://AKIAKEY:canary@bucket/x", "may not hold a user or password"),
        ("s3://AKIAKEY@bucket/x", "may not hold a user or password"),
        ("http://me:canary@host/x", "may not hold a user or password"),
        ("sftp://me:canary@host/x", "may not hold a user or password"),
        ("http://host/x?token=canary", "leave out '?' and '#'"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3://bucket/a\0b", "control characters"),
    ],
)
def test_a_bad_uri_is_refused_with_one_line(uri: str, words: str) -> None:
    """Each mistake has its own words, on one line, and no secret of the URI is repeated."""
    with pytest.raises(ConfigError) as raised:
        check_uri(uri)
    text = str(raised.value)
    assert words in text
    assert text.isprintable()
    assert "canary" not in text


@given(uri=st.text())
def test_any_text_is_a_uri_or_a_config_error(uri: str) -> None:
    """No text makes check_uri raise anything else."""
    try:
        check_uri(uri)
    except ConfigError as error:
        assert str(error).isprintable()


def test_checking_common_uris_imports_no_client() -> None:
    """`check_uri` of a common scheme costs no import of a store's client."""
    script = (
        "import sys; from orchestra.stores.registry import check_uri; check_uri('s3://b/x'); check_uri('/data');"
        "print([m for m in ('obstore', 'fsspec', 'aiohttp', 's3fs', 'botocore') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


# options


@pytest.mark.parametrize(
    ("uri", "options", "words"),
    [
        ("s3://b/x", {"endpont_url": "http://h"}, "unknown option 'endpont_url': did you mean 'endpoint_url'?"),
        ("s3://b/x", {"zzzzzz": "1"}, "unknown option 'zzzzzz': known are"),
        ("s3://b/x", {"key": "a"}, "option secret (secret_access_key) is missing"),
        ("s3://b/x", {"secret": "canary"}, "option key (access_key_id) is missing"),
        ("s3://b/x", {"key": "a", "access_key_id": "b", "secret": "canary"}, "given twice"),
        ("s3://b/x", {"endpoint_url": "localhost:9000"}, "expected a URL such as http://127.0.0.1:9000"),
        ("s3://b/x", {"endpoint_url": "http://h:99999"}, "expected a URL such as"),
        ("s3://b/x", {"endpoint_url": "http://u:canary@h"}, "may not hold a user or password"),
        ("s3://b/x", {"anon": "perhaps"}, "'skip_signature': expected true or false, got 'perhaps'"),
        ("s3://b/x", {"client": "boto"}, "expected obstore or fsspec, got 'boto'"),
        ("s3://b/x", {"ca_file": "/no/such.pem"}, "'ca_file'"),
        ("s3://b/x", {"client_kwargs": "[1]"}, "'client_kwargs': expected a JSON object"),
        ("s3://b/x", {"client_kwargs": "{}", "role_arn": "x"}, "'role_arn' cannot be combined"),
        ("gs://b/x", {"key": "a"}, "gs: unknown option 'key'"),
        ("az://b/x", {"acount_name": "a"}, "did you mean 'account_name'?"),
        ("http://h/x", {"bearer_tokn": "canary"}, "did you mean 'bearer_token'?"),
        ("http://h/x", {"user": "a", "bearer_token": "canary"}, "exclude each other"),
        ("http://h/x", {"client": "fsspec"}, "http: unknown option 'client'"),
        ("/data", {"key": "a"}, "a folder takes no options"),
    ],
)
def test_a_bad_option_is_refused_with_one_line(uri: str, options: dict[str, str], words: str) -> None:
    """A wrong name or value is named before anything is asked; secrets are not repeated."""
    with pytest.raises(ConfigError) as raised:
        open_store(StoreSettings(uri, options), FETCH, environment={})
    assert words in str(raised.value)
    assert str(raised.value).isprintable()
    assert "canary" not in str(raised.value)


def test_a_missing_package_is_named() -> None:
    """A protocol whose Python package is not installed says which to install."""
    with pytest.raises(ConfigError, match=r"tosfs: .*nstall tosfs"):
        open_store(StoreSettings("tosfs://bucket/data", {}), FETCH)


def test_both_spellings_mean_the_same() -> None:
    """fsspec's names and obstore's are one configuration."""
    uri = parse_uri("s3://bucket/x")
    familiar = {"key": "k", "secret": "s", "token": "t", "endpoint_url": "http://h:1/", "region_name": "r"}
    native = {
        "access_key_id": "k",
        "secret_access_key": "s",
        "session_token": "t",
        "endpoint": "http://h:1",
        "region": "r",
    }
    assert resolve_s3(uri, familiar, {}) == resolve_s3(uri, native, {})


def test_options_win_over_the_environment() -> None:
    """A key of the options is not mixed with the environment's session token."""
    environment = {
        "AWS_ACCESS_KEY_ID": "ek",
        "AWS_SECRET_ACCESS_KEY": "es",
        "AWS_SESSION_TOKEN": "et",
        "AWS_ENDPOINT_URL": "http://env:1",
        "AWS_REGION": "env-region",
    }
    uri = parse_uri("s3://bucket/x")
    by_environment = resolve_s3(uri, {}, environment)
    assert by_environment.credentials == Credentials("ek", "es", "et")
    assert (by_environment.endpoint, by_environment.region) == ("http://env:1", "env-region")
    by_options = resolve_s3(uri, {"key": "k", "secret": "s", "endpoint_url": "http://o:2", "region": "r"}, environment)
    assert by_options.credentials == Credentials("k", "s", "")
    assert (by_options.endpoint, by_options.region) == ("http://o:2", "r")


def test_http_endpoints_are_allowed_and_path_style_is_the_default() -> None:
    """`allow_http` follows from the endpoint; the bucket stands in the path unless told otherwise."""
    uri = parse_uri("s3://bucket/x")
    plain = resolve_s3(uri, {"endpoint_url": "http://h:9000"}, {})
    assert plain.allow_http
    assert plain.bucket_url == "http://h:9000/bucket"
    virtual = resolve_s3(uri, {"endpoint_url": "https://h", "virtual_hosted_style_request": "true"}, {})
    assert not virtual.allow_http
    assert virtual.bucket_url == "https://bucket.h"
    assert resolve_s3(uri, {"region": "cn-north-1"}, {}).bucket_url == "https://s3.cn-north-1.amazonaws.com.cn/bucket"


def test_no_secret_is_shown_by_a_store_or_its_settings() -> None:
    """repr and store_id of what is opened hold no word of the credentials; both S3 clients have one id."""
    options = {"key": "AKIAcanary", "secret": "canary", "token": "canary", "endpoint_url": "http://h:1"}
    config = resolve_s3(parse_uri("s3://bucket/x"), options, {})
    fast = open_bare_store(StoreSettings("s3://bucket/x", options), FETCH, clock=ManualClock())
    slow = open_bare_store(StoreSettings("s3://bucket/x", {**options, "client": "fsspec"}), FETCH, clock=ManualClock())
    assert fast.store_id == slow.store_id == config.store_id == "s3://bucket/x/?endpoint=http://h:1"
    assert "canary" not in repr(config) + repr(config.credentials) + repr(fast) + fast.store_id


@pytest.mark.parametrize(
    ("uri", "options", "store_id"),
    [
        ("s3://b/x/", {}, "s3://b/x/"),
        ("gs://b/x", {"skip_signature": "true"}, "gs://b/x/"),
        ("az://c/x", {"account_name": "acc", "account_key": "Y2FuYXJ5"}, "az://c/x/?account=acc"),
        ("abfss://c@acc.dfs.core.windows.net/x", {"account_key": "Y2FuYXJ5"}, "az://c/x/?account=acc"),
        ("https://h/x", {"bearer_token": "canary"}, "https://h/x/"),
        ("file:///data/x", {}, "file:///data/x/"),
        ("/data/x/", {}, "file:///data/x/"),
        ("memory://a/b", {}, "memory://a/b/"),
    ],
)
def test_store_ids_are_stable(uri: str, options: dict[str, str], store_id: str) -> None:
    """The id is made of the place alone: a cache that was filled under it serves every node and every day."""
    assert open_store(StoreSettings(uri, options), FETCH, environment={}).store_id == store_id


def test_options_of_s3fs_choose_it() -> None:
    """Options that only s3fs has, and `client`, route the mount to it."""
    assert needs_s3fs({"profile": "p"})
    assert needs_s3fs({"config_kwargs": "{}"})
    assert needs_s3fs({"client": "fsspec"})
    assert not needs_s3fs({"key": "k", "secret": "s", "requester_pays": "true"})


def test_texts_of_options_are_read_carefully() -> None:
    """Flags, objects and ports are understood; other values stay texts, digits too."""
    assert flag({"a": "Yes"}, "a") and not flag({"a": "off"}, "a") and flag({}, "a", default=True)
    assert literal("x_kwargs", '{"a": 1}') == {"a": 1}
    assert literal("port", "22") == 22
    assert literal("account", "0123") == "0123"
    assert literal("account", "123") == "123"
    assert literal("auto_mkdir", "False") is False
    assert canonical_options("s3", {"client": "obstore"}, names=()) == {}


# signatures


def test_signatures_are_those_of_the_documentation() -> None:
    """The two GET examples of the S3 documentation (header-based authentication) come out to the last digit."""
    credentials = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    host = {"host": "examplebucket.s3.amazonaws.com"}
    examples = {
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41": Request(
            "GET", "/test.txt", "", {**host, "range": "bytes=0-9"}
        ),
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7": Request(
            "GET", "/", encode_query([("prefix", "J"), ("max-keys", "2")]), host
        ),
    }
    for signature, request in examples.items():
        headers = signed_headers(request, credentials, region="us-east-1", wall_s=1369353600.0)
        assert headers["authorization"].endswith(f"Signature={signature}")
        assert headers["x-amz-date"] == "20130524T000000Z"


def test_signatures_agree_with_botocore() -> None:
    """An odd key, a query and a session token are signed as botocore signs them."""
    auth = pytest.importorskip("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as BotocoreCredentials

    path, query = encode_path("/b/a b+c/ü?#%//x~"), encode_query([("prefix", "a/ü &"), ("list-type", "2")])
    signer = auth.S3SigV4Auth(BotocoreCredentials("AK", "SK", "TOKEN"), "s3", "eu-west-1")
    theirs = AWSRequest("GET", f"http://h:9000{path}?{query}", headers={"If-Match": '"e"'})
    signer.add_auth(theirs)
    stamp = theirs.context["timestamp"]
    from datetime import UTC, datetime

    wall_s = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    ours = signed_headers(
        Request("GET", path, query, {"host": "h:9000", "if-match": '"e"'}),
        Credentials("AK", "SK", "TOKEN"),
        region="eu-west-1",
        wall_s=wall_s,
    )
    assert ours["authorization"].rpartition("=")[2] == theirs.headers["Authorization"].rpartition("=")[2]


# listings

LISTING = """<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<EncodingType>url</EncodingType><IsTruncated>{truncated}</IsTruncated>{token}
<Contents><Key>root/a+b%2B%0A%C3%BC</Key><LastModified>2024-02-03T04:05:06.789Z</LastModified>
<ETag>&quot;e1&quot;</ETag><Size>7</Size></Contents>
<CommonPrefixes><Prefix>root/sub%2F/</Prefix></CommonPrefixes></ListBucketResult>"""


def test_a_page_of_a_listing_is_read_exactly() -> None:
    """Keys are decoded and relative to the root; times are whole seconds; the token says where it goes on."""
    body = LISTING.format(truncated="true", token="<NextContinuationToken>T==</NextContinuationToken>").encode()
    page, token = parse_list_page(body, root="root/", operation=READING)
    assert page.objects == (ObjectInfo("a b+\nü", 7, 1706933106 * 10**9, '"e1"'),)
    assert page.prefixes == ("sub//",)
    assert token == "T=="
    assert parse_list_page(LISTING.format(truncated="false", token="").encode(), root="", operation=READING)[1] is None


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", StoreUnavailableError, "not well-formed"),
        (LISTING.format(truncated="true", token="").encode(), StoreUnavailableError, "says not where it goes on"),
        (LISTING.format(truncated="false", token="").encode()[:300], StoreUnavailableError, "not well-formed"),
        (b"<html><body>busy</body></html>", StoreUnavailableError, "did not answer with a listing"),
        (
            b"<ListBucketResult><Contents><Key>k</Key></Contents></ListBucketResult>",
            StoreUnavailableError,
            "lacks key, size or time",
        ),
        (
            b"<ListBucketResult><Contents><Key>k</Key><Size>x</Size></Contents></ListBucketResult>",
            StoreUnavailableError,
            "lacks key, size or time",
        ),
        (b'<!DOCTYPE l [<!ENTITY a "aa">]><ListBucketResult>&a;</ListBucketResult>', StoreError, "document type"),
    ],
)
def test_a_bad_page_is_no_listing(body: bytes, kind: type[OrchestraError], words: str) -> None:
    """Anything that is not a whole listing raises; an entity is never expanded."""
    with pytest.raises(kind, match=words):
        parse_list_page(body, root="", operation=READING)


def test_etags_are_quoted_once() -> None:
    """Stores that list ETags without quotes get them."""
    assert quoted_etag("abc") == quoted_etag('"abc"') == '"abc"'
    assert quoted_etag('W/"abc"') == 'W/"abc"'


@given(files=st.integers(0, 2500), folders=st.integers(0, 1500))
def test_pages_hold_everything_once(files: int, folders: int) -> None:
    """A listing that arrived whole is cut into pages of at most a thousand names, in order."""
    objects = [ObjectInfo(str(index), 0, 0, "v") for index in range(files)]
    prefixes = [f"{index}/" for index in range(folders)]
    pages = cut_into_pages(objects, prefixes)
    assert [info for page in pages for info in page.objects] == objects
    assert [prefix for page in pages for prefix in page.prefixes] == prefixes
    assert all(len(page.objects) + len(page.prefixes) <= PAGE_KEYS_MAX for page in pages)


def test_links_of_an_index_page_are_names() -> None:
    """Only direct children count, decoded and once each; links up, out, sorted, deeper or broken are left out."""
    page = """<a href="../">up</a> <a href="?C=M;O=A">sort</a> <a href="/">root</a> <a href="a.txt">a</a>
    <A HREF='b%20c%2B.txt'>b</A> <a href="/data/d/e&amp;f">e</a> <a href="sub/">sub/</a> <a href="nosl">nosl/</a>
    <a href="http://other/data/d/x">x</a> <a href="sub/deeper">deep</a> <a href="a.txt">again</a> <a href="#top">t</a>
    <a href="http://[broken">b</a> <a name="n">n</a> <a href="./">here</a> <a href="%2e%2e/">up</a>"""
    names = links_below("http://h/data/d/", page)
    assert names == ["a.txt", "b c+.txt", "e&f", "sub/", "nosl/"]


# answers


@pytest.mark.parametrize(
    ("status", "headers", "outcome"),
    [
        (206, {"Content-Range": "bytes 10-19/100"}, 0),
        (206, {"Content-Range": "bytes 10-19/*"}, 0),
        (206, {"Content-Range": "bytes 11-20/100"}, StoreUnavailableError),
        (206, {"Content-Range": "bytes 10-18/100"}, StoreUnavailableError),
        (206, {"Content-Range": "bytes 10-19/101"}, StaleObjectError),
        (206, {"Content-Range": "octets 10-19/100"}, StoreUnavailableError),
        (206, {}, StoreUnavailableError),
        (200, {"Content-Length": "100"}, 10),
        (200, {}, 10),
        (200, {"Content-Length": "99"}, StaleObjectError),
    ],
)
def test_answers_to_a_range_are_checked(
    status: int, headers: dict[str, str], outcome: int | type[OrchestraError]
) -> None:
    """Exactly the range, or a whole body to cut, or an error that says whether a retry is worth it."""
    if isinstance(outcome, int):
        assert check_range_answer(status, headers, ByteRange(10, 20), 100, READING) == outcome
    else:
        with pytest.raises(outcome):
            check_range_answer(status, headers, ByteRange(10, 20), 100, READING)


def test_a_large_whole_body_is_refused() -> None:
    """A block from the end of a large object is not worth downloading all of it: a final error."""
    with pytest.raises(StoreError, match="ignores byte ranges") as raised:
        check_range_answer(200, {}, ByteRange(1 << 30, (1 << 30) + 10), 1 << 31, READING)
    assert not isinstance(raised.value, StoreUnavailableError)


def test_versions_come_from_headers() -> None:
    """The ETag as sent, else size and time; only a strong ETag may be a condition."""
    headers = CIMultiDict({"etag": '"abc"', "last-modified": "Wed, 21 Oct 2015 07:28:00 GMT"})
    assert version_of_headers(headers, 5) == '"abc"'
    del headers["etag"]
    assert version_of_headers(headers, 255) == f"ff-{1445412480 * 10**9:x}"
    assert version_of_headers(CIMultiDict(), 255) == "ff-0"
    assert is_strong_etag('"abc"')
    assert not is_strong_etag('W/"abc"')
    assert not is_strong_etag("ff-0")
    assert mtime_ns_of("rubbish") == 0
    assert http_date(mtime_ns_of("Wed, 21 Oct 2015 07:28:00 GMT")) == "Wed, 21 Oct 2015 07:28:00 GMT"


def test_compressed_answers_are_refused() -> None:
    """gzip is refused, identity and aws-chunked are not."""
    with pytest.raises(StoreError, match="turn compression off"):
        check_encoding(CIMultiDict({"content-encoding": "GZIP"}), READING)
    check_encoding(CIMultiDict({"content-encoding": "identity"}), READING)
    check_encoding(CIMultiDict(), READING)


# words of errors


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFoundError),
        (404, "NoSuchBucket", NotFoundError),
        (410, "", NotFoundError),
        (401, "", AccessDeniedError),
        (403, "SignatureDoesNotMatch", AccessDeniedError),
        (403, "RequestTimeTooSkewed", AccessDeniedError),
        (400, "ExpiredToken", AccessDeniedError),
        (412, "PreconditionFailed", StaleObjectError),
        (416, "InvalidRange", StaleObjectError),
        (429, "", ThrottledError),
        (503, "SlowDown", ThrottledError),
        (400, "RequestTimeout", StoreUnavailableError),
        (408, "", StoreUnavailableError),
        (500, "InternalError", StoreUnavailableError),
        (502, "", StoreUnavailableError),
        (504, "", StoreUnavailableError),
        (301, "PermanentRedirect", StoreError),
        (400, "InvalidArgument", StoreError),
        (405, "", StoreError),
        (501, "NotImplemented", StoreError),
    ],
)
def test_statuses_become_what_a_caller_can_do(status: int, code: str, kind: type[OrchestraError]) -> None:
    """Each answer is exactly one error, in one line that names object and store."""
    error = error_for_status(status, READING, code=code, retry_after_s=3.0)
    assert type(error) is kind
    assert "'dir/a.jpg' in s3://bucket/" in str(error)
    assert str(error).isprintable()
    if isinstance(error, StoreUnavailableError):
        assert error.retry_after_s == 3.0


@pytest.mark.parametrize(
    "text",
    [
        "first\nsecond canary",
        "<Error><Code>X</Code></Error>\ncanary",
        "GET https://h/k?X-Amz-Signature=canary&X-Amz-Credential=canary&x=1",
        "cannot open http://user:canary@host/x",
        "Authorization: AWS4-HMAC-SHA256 Credential=canary",
        "password=canary, secret=canary",
        "\x1b[31mred\x07",
        "x" * 5000,
        "",
    ],
)
def test_foreign_messages_are_one_clean_line(text: str) -> None:
    """No second line, no markup, no escape sequence, no credential, no endless dump."""
    line = one_line(text)
    assert line.isprintable()
    assert line
    assert "canary" not in line
    assert "<" not in line
    assert len(line) <= 300


def test_retry_after_is_a_number_or_a_date() -> None:
    """Both forms of the header are read; rubbish is none."""
    assert retry_after_s({"Retry-After": "7"}, now_s=0) == 7.0
    assert retry_after_s({"Retry-After": "Wed, 21 Oct 2015 07:28:10 GMT"}, now_s=1445412480) == 10.0
    assert retry_after_s({"Retry-After": "Wed, 21 Oct 2015 07:28:10 GMT"}, now_s=1445412490 + 5) == 0.0
    assert retry_after_s({"Retry-After": "soon"}, now_s=0) is None
    assert retry_after_s({}, now_s=0) is None
