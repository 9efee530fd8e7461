"""Azure proves the contract against azurite (`npm install azurite`; found on PATH or by ORCHESTRA_AZURITE)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate

import obstore
import pytest
from obstore.store import AzureStore

from orchestra.config import FetchConfig
from orchestra.errors import AccessDeniedError, NotFoundError
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.registry import open_store
from orchestra.testing.under_store import ODD_KEYS, Delete, Put, PutNumbered, UnderStoreSuite

AZURITE = os.environ.get("ORCHESTRA_AZURITE") or shutil.which("azurite-blob")
# The emulator's documented account; not a secret.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
FETCH = FetchConfig(requests_max=32, attempt_timeout_s=20.0, deadline_s=40.0)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(AZURITE is None, reason="azurite is not installed (npm install azurite)"),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    assert AZURITE is not None
    options = ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    process = subprocess.Popen(
        [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:  # it says so when it listens
            if b"listens on" in line:
                break
        create_container(port, "container")
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
    finally:
        process.terminate()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()


def create_container(port: int, container: str) -> None:
    """PUT a container, signed with the shared key: obstore cannot make one."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    to_sign = "PUT" + "\n" * 12 + lines + f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), to_sign.encode(), hashlib.sha256)).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
    connection.request("PUT", f"/{ACCOUNT}/{container}?restype=container", headers=headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 201


class TestAzure(UnderStoreSuite):
    # obstore writes these for the test, so keys that it cannot name are left out; azurite takes no backslash.
    odd_keys = tuple(key for key in ODD_KEYS if "\\" not in key)
    many_count = 60

    @pytest.fixture
    def root(self) -> str:
        return f"under test/{uuid.uuid4().hex}"

    @pytest.fixture
    async def store(self, endpoint: str, root: str) -> AsyncIterator[UnderStore]:
        options = {"account_name": ACCOUNT, "account_key": KEY, "endpoint": endpoint}
        store = open_store(StoreSettings(f"az://container/{root}", options), FETCH)
        yield store
        await store.close()

    @pytest.fixture
    def writer(self, endpoint: str) -> AzureStore:
        config = {"account_name": ACCOUNT, "account_key": KEY, "endpoint": endpoint}
        return AzureStore("container", config=config, client_options={"allow_http": True})  # type: ignore[arg-type]

    @pytest.fixture
    def put(self, writer: AzureStore, root: str) -> Put:
        async def put_one(key: str, data: bytes) -> None:
            await obstore.put_async(writer, f"{root}/{key}", data)

        return put_one

    @pytest.fixture
    def delete(self, writer: AzureStore, root: str) -> Delete:
        async def delete_one(key: str) -> None:
            await obstore.delete_async(writer, f"{root}/{key}")

        return delete_one

    @pytest.fixture
    def put_numbered(self, put: Put) -> PutNumbered:
        async def put_all(prefix: str, count: int) -> None:
            await asyncio.gather(*(put(f"{prefix}{index:06d}", b"x") for index in range(count)))

        return put_all

    async def test_missing_container_and_wrong_key_are_said(self, endpoint: str) -> None:
        """`probe` tells a container that is not there from a key that is refused."""
        options = {"account_name": ACCOUNT, "account_key": KEY, "endpoint": endpoint}
        missing = open_store(StoreSettings("az://no-such-container", options), FETCH)
        with pytest.raises(NotFoundError, match="no such bucket or container"):
            await missing.probe()
        wrong = {**options, "account_key": base64.b64encode(b"canary" * 5).decode()}
        refused = open_store(StoreSettings("az://container", wrong), FETCH)
        with pytest.raises(AccessDeniedError) as raised:
            await refused.probe()
        assert wrong["account_key"] not in str(raised.value)
