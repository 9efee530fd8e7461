"""What S3 adds to the contract: requests counted on the wire, keys that obstore cannot name, both listings."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from obstore.exceptions import GenericError

from orchestra.clock import SystemClock
from orchestra.config import FetchConfig
from orchestra.errors import AccessDeniedError, NotFoundError, OrchestraError, StoreError, StoreUnavailableError
from orchestra.stores.contract import StoreSettings
from orchestra.stores.object_store import ObjectStoreStore, is_plain_path, translated
from orchestra.stores.registry import open_bare_store, open_store
from orchestra.stores.retry import RetryStore
from orchestra.stores.translate import Operation
from orchestra.testing.fault_proxy import FaultProxy, Header
from orchestra.testing.s3_server import S3Server
from orchestra.testing.under_store import PATTERN, list_all, read_all
from orchestra.values import ByteRange

FETCH = FetchConfig(requests_max=32, attempt_timeout_s=20.0, deadline_s=40.0)


@pytest.fixture
async def store(server: S3Server, proxy: FaultProxy) -> AsyncIterator[RetryStore]:
    store = open_store(StoreSettings("s3://bucket/root", server.options_at(proxy.endpoint)), FETCH)
    yield store
    await store.close()


@pytest.fixture
async def without_wire(server: S3Server) -> AsyncIterator[ObjectStoreStore]:
    """The store as it is with credentials that only obstore can find, and as GCS and Azure are."""
    store = open_bare_store(StoreSettings("s3://bucket/root", server.options), FETCH, clock=SystemClock())
    assert isinstance(store, ObjectStoreStore)
    alone = ObjectStoreStore(store._client, store_id=store.store_id, label=store.store_id, root="root/")
    yield alone
    await store.close()


async def test_nothing_is_asked_before_it_is_needed(store: RetryStore, proxy: FaultProxy) -> None:
    """Opening a store sends no request."""
    assert store.store_id.startswith("s3://bucket/root/")
    assert proxy.requests == []


async def test_each_call_is_one_request(store: RetryStore, server: S3Server, proxy: FaultProxy) -> None:
    """A look-up is one HEAD, a read one ranged GET under If-Match, a thousand names one LIST; nothing else is sent."""
    server.put("bucket", "root/one/a", PATTERN)
    info = await store.head("one/a")
    await store.read(info, ByteRange(10, 20))
    await list_all(store, "one/")
    asked = [(request.method, request.range, request.if_match) for request in proxy.requests]
    assert asked == [("HEAD", "", ""), ("GET", "bytes=10-19", info.version), ("GET", "", "")]
    found = store.statistics()
    assert (found.head_requests, found.read_requests, found.list_requests, found.read_bytes) == (1, 1, 1, 10)


async def test_a_listing_streams_one_request_a_page(store: RetryStore, server: S3Server, proxy: FaultProxy) -> None:
    """The second LIST is sent when the second page is wanted; leaving early sends no more."""
    server.put_numbered("bucket", "root/streamed/f", 2100)
    pages = store.list_directory("streamed/")
    await anext(pages)
    assert len(proxy.requests) == 1
    assert store.statistics().list_requests == 1
    await anext(pages)
    assert len(proxy.requests) == 2
    await pages.aclose()  # type: ignore[attr-defined]  # every listing of ours has it
    assert len(proxy.requests) == 2


async def test_keys_of_control_characters_are_listed_exactly(store: RetryStore, server: S3Server) -> None:
    """Names that XML cannot hold come out of the listing as they are (moto's routes cannot serve them by name)."""
    keys = ["new\nline", "bell\x07", "nul-ish\x01", "cr\rlf\n"]
    server.put_many("bucket", {f"root/ctl/{key}": b"x" for key in keys})
    assert sorted(info.key for info in (await list_all(store, "ctl/")).objects) == sorted(f"ctl/{key}" for key in keys)


async def test_without_the_wire_listings_are_the_same(
    store: RetryStore, without_wire: ObjectStoreStore, server: S3Server
) -> None:
    """obstore's own listing says the same as ours, in pages of a thousand, folder markers dropped."""
    server.put_numbered("bucket", "root/both/f", 1200)
    server.put_many("bucket", {"root/both/": b"", "root/both/sub/x": b"1", "root/both/ü +%": b"22"})
    ours, theirs = await list_all(store, "both/"), await list_all(without_wire, "both/")
    assert [len(page.objects) for page in theirs.pages] == [1000, 201, 0]
    assert {info for info in ours.objects if info.key != "both/"} == set(theirs.objects)
    assert ours.prefixes == theirs.prefixes == ["both/sub/"]
    await without_wire.probe()
    assert (await list_all(without_wire, "nothing//here/")).objects == []


async def test_without_the_wire_an_odd_key_is_an_error_that_helps(
    without_wire: ObjectStoreStore, server: S3Server
) -> None:
    """A directory that holds a key which obstore cannot name fails with the key and the way out, never in part."""
    server.put_many("bucket", {"root/odd/fine": b"x", "root/odd//double": b"x"})
    with pytest.raises(StoreError, match="option client = 'fsspec'") as raised:
        await list_all(without_wire, "odd/")
    assert str(raised.value).isprintable()
    with pytest.raises(NotFoundError):
        await without_wire.head("odd//double")


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("a/b", True),
        ("ü +%", True),
        ("...", True),
        ("", False),
        ("a//b", False),
        ("/a", False),
        ("a/", False),
        ("../a", False),
        ("a/./b", False),
        ("a\nb", False),
        ("a\x01b", False),
        ("a\x7fb", False),
    ],
)
def test_plain_paths_are_what_obstore_can_name(path: str, plain: bool) -> None:
    """The test for what goes to obstore agrees with obstore."""
    import obstore
    from obstore.store import MemoryStore

    assert is_plain_path(path) is plain
    store = MemoryStore()
    try:
        obstore.put(store, path, b"x")
        taken = [meta["path"] for page in obstore.list(store) for meta in page] == [path]
    except ValueError:
        taken = False
    assert taken is plain or path == "a\x7fb"


async def test_both_clients_see_one_version(server: S3Server) -> None:
    """What one client listed the other reads: a mount whose options change keeps its cache."""
    server.put("bucket", "root/shared/x", PATTERN)
    fast = open_store(StoreSettings("s3://bucket/root", server.options), FETCH)
    slow = open_store(StoreSettings("s3://bucket/root", {**server.options, "client": "fsspec"}), FETCH)
    assert fast.store_id == slow.store_id
    info = await fast.head("shared/x")
    assert info == await slow.head("shared/x")
    assert await read_all(slow, (await list_all(fast, "shared/")).objects[0]) == PATTERN
    await fast.close()
    await slow.close()


async def test_anonymous_requests_are_unsigned(server: S3Server, proxy: FaultProxy) -> None:
    """`anon` sends no credentials, whatever the environment holds."""
    server.put("bucket", "root/public", PATTERN)
    options = {"endpoint_url": proxy.endpoint, "anon": "true"}
    environment = {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "env"}
    store = open_store(StoreSettings("s3://bucket/root", options), FETCH, environment=environment)
    for call in (store.head("public"), list_all(store, "")):
        with contextlib.suppress(AccessDeniedError):  # the bucket is private
            await call
    assert [(request.method, request.authorization) for request in proxy.requests] == [("HEAD", ""), ("GET", "")]
    await store.close()


async def test_both_requests_are_signed_with_the_options_key(
    server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session token of the environment is not added to a key of the options, by obstore neither."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "ENVTOKEN")
    server.put("bucket", "root/signed", PATTERN)
    store = open_store(StoreSettings("s3://bucket/root", server.options_at(proxy.endpoint)), FETCH)
    await read_all(store, await store.head("signed"))
    await list_all(store, "")
    for request in proxy.requests:
        assert "Credential=orchestra-test/" in request.authorization
        assert "x-amz-security-token" not in request.authorization
    assert len(proxy.requests) == 3
    await store.close()


async def test_no_credentials_are_said_to_be_missing(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any credentials the error says which options and variables would give them."""
    pytest.importorskip("botocore")
    from orchestra.stores import s3_config

    monkeypatch.setattr(s3_config.BotocoreCredentials, "_ask", lambda self: None)
    store = open_store(StoreSettings("s3://bucket/root", {"endpoint_url": server.endpoint}), FETCH, environment={})
    with pytest.raises(AccessDeniedError, match=r"options key and secret.*AWS_ACCESS_KEY_ID.*anon = true"):
        await store.probe()
    with pytest.raises(AccessDeniedError, match="options key and secret"):
        await store.head("x")
    await store.close()


async def test_a_weak_etag_is_compared_not_sent(store: RetryStore, server: S3Server, proxy: FaultProxy) -> None:
    """W/ never matches as a condition: it is left out, and the answer's is compared."""
    server.put("bucket", "root/weak", PATTERN)
    weak = Header("ETag", 'W/"abc"')
    proxy.add(weak, path="/root/weak", times=None)
    info = await store.head("weak")
    assert info.version == 'W/"abc"'
    assert await read_all(store, info) == PATTERN
    assert proxy.requests[-1].if_match == ""


FOREIGN = "Generic S3 error: Error performing {0}\n\nDebug source:\nGeneric {{ store: canary }}"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (
            FOREIGN.format("PUT http://169.254.169.254/latest/api/token - Server returned non-2xx status code: 403 No"),
            AccessDeniedError,
            "no credentials: the mount's options and the environment hold none",
        ),
        (
            FOREIGN.format("GET http://169.254.169.254/x - Server returned non-2xx status code: 500 No"),
            StoreUnavailableError,
            "credential service does not answer",
        ),
        ('HttpError { kind: Connect, "invalid peer certificate: UnknownIssuer" }', StoreError, "TLS: invalid peer"),
        ("HttpError { kind: Decode }", StoreUnavailableError, "could not be read"),
        ("HTTP error: error sending request\nHttpError { kind: Unknown }", StoreUnavailableError, "connection failed"),
        ("something nobody foresaw\ncanary", StoreError, "something nobody foresaw"),
    ],
)
def test_obstores_texts_become_our_errors(text: str, kind: type[OrchestraError], words: str) -> None:
    """obstore tells failures apart in its text alone: each wording seen has its error, in one line."""
    error = translated(GenericError(text), Operation("read", "k", "s3://bucket/"))
    assert type(error) is kind
    assert words in str(error)
    assert str(error).isprintable()
    assert "canary" not in str(error)
