"""The demo's bucket: starts the S3 server's process, reads the bucket back, asks what reached the server.

Owns: everything the demo itself does with the S3 API. Leaves to others: the server (store_server.py).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestra.demo.store_server import BUCKET, LOG_PATH, REGION
from orchestra.errors import OrchestraError

ACCESS_KEY = "demo"
SECRET_KEY = "demo-secret"
# The server answers one request at a time (it is Python): more in flight only wait in its queue.
REQUESTS_MAX = 8
_STOP_TIMEOUT_S = 10.0
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One request that reached the server."""

    came_ns: int
    method: str
    path: str
    query: str
    body_bytes: int


class Bucket:
    """The bucket of a running server."""

    def __init__(self, endpoint_url: str) -> None:
        import obstore.store  # lives here and in stores only: it must not be loaded where training forks

        self.endpoint_url = endpoint_url
        self._store = obstore.store.S3Store(
            BUCKET,
            endpoint=endpoint_url,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def sizes(self) -> dict[str, int]:
        """Return every key and its object's size, as the server lists them."""
        import obstore

        return {item["path"]: item["size"] for page in obstore.list(self._store) for item in page}

    def digests(self, digest: Callable[[bytes], str]) -> dict[str, str]:
        """Return the digest of every object's bytes, read through the S3 API."""
        import obstore

        digests: dict[str, str] = {}

        async def read(key: str) -> None:
            answer = await obstore.get_async(self._store, key)
            digests[key] = digest(bytes(await answer.bytes_async()))

        asyncio.run(_for_each(self.sizes(), read))
        return digests

    def requests(self, after: int = 0) -> list[StoreRequest]:
        """Return the requests that reached the server, from number `after` on."""
        return [StoreRequest(**record) for record in json.loads(self._get(f"{LOG_PATH}?after={after}"))]

    def _get(self, target: str) -> bytes:
        connection = http.client.HTTPConnection(self.endpoint_url.removeprefix("http://"), timeout=30)
        try:
            connection.request("GET", target)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise OrchestraError(f"the demo's S3 server answered {answer.status} to GET {target}")
        return body


async def _for_each(items: Iterable[Item], action: Callable[[Item], Awaitable[None]]) -> None:
    """Run `action` on every item, REQUESTS_MAX at a time; the first error ends it."""
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            await action(item)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(REQUESTS_MAX):
            tasks.create_task(work())


@contextmanager
def running_bucket(log_path: Path, environment: dict[str, str]) -> Iterator[Bucket]:
    """Run the server in a process of its own for as long as the block runs; its complaints go to `log_path`."""
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "orchestra.demo.store_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the demo, which ends the server when the mount is gone
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            endpoint_url = process.stdout.readline().strip()
            if not endpoint_url:
                reason = log_path.read_text().strip().rsplit("\n", 1)[-1] or "it said nothing"
                hint = "install what it needs: pip install 'orchestra-fs[demo]'"
                raise OrchestraError(f"the demo's S3 server did not start: {reason}; {hint}")
            yield Bucket(endpoint_url)
        finally:
            process.stdin.close()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
