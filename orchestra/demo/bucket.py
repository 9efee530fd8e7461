"""The demo's bucket: fills it, reads it back through the S3 API, asks what reached the server.

Owns: everything the demo itself does with the store. Leaves to others: the server (testing.s3_server), the objects
(dataset.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from orchestra.demo import dataset
from orchestra.testing.s3_server import S3Server, StoreRequest

BUCKET = "orchestra-demo"
# The server answers one request at a time (it is Python): more in flight only wait in its queue.
REQUESTS_MAX = 8
Item = TypeVar("Item")


class Bucket:
    """The bucket of a running server."""

    def __init__(self, server: S3Server) -> None:
        import obstore.store  # lives here and in stores only: it must not be loaded where training forks

        self._server = server
        self.options = server.options
        self._store = obstore.store.S3Store(
            BUCKET,
            endpoint=self.options["endpoint_url"],
            access_key_id=self.options["key"],
            secret_access_key=self.options["secret"],
            region=self.options["region"],
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
        return self._server.requests(after)


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
def running_bucket() -> Iterator[Bucket]:
    """Run a server with the demo's data for as long as the block runs.

    The data goes in behind the server's HTTP layer, where a PUT takes 3 ms of processor: 6 s for all of them, that
    would prove nothing of orchestra, which only reads.
    """
    with S3Server() as server:
        server.create_bucket(BUCKET)
        server.put_many(BUCKET, dict(dataset.objects()))
        yield Bucket(server)
