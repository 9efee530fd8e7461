"""etcd's v3 JSON gateway: the few calls that membership needs, over connections of their own.

Owns: endpoints in turn, timeouts, base64 and numbers as text. Leaves to others: keys, values and what follows (etcd).
Why not a gRPC client: docs/decisions/0005-etcd-gateway.md.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

# An answer that lists a thousand records is 500 KiB.
ANSWER_BYTES_MAX = 8 * 1024 * 1024
# A watch that says nothing for so long is opened anew: the far end may be gone without a word. Nothing is lost by it.
WATCH_SILENT_S = 60.0


class EtcdUnreachableError(Exception):
    """No endpoint gave a usable answer; the text names the last one and why."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it."""

    key: bytes
    value: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys below a prefix at one revision of one cluster."""

    cluster_id: str
    revision: int
    found: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A key that was written, or is gone (`kv.value` is empty then)."""

    is_deletion: bool
    kv: KeyValue


class EtcdGateway:
    """One event loop; opens nothing before its first call. Every call raises EtcdUnreachableError."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float) -> None:
        self._endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self._at = 0
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def grant(self, ttl_s: int) -> tuple[str, int]:
        """Return a new lease's id and the seconds that etcd gave it."""
        answer = await self._call("/v3/lease/grant", {"TTL": ttl_s})
        return str(answer["ID"]), int(answer["TTL"])

    async def keep_alive(self, lease: str) -> bool:
        """Renew `lease`; False: it is gone."""
        answer = await self._call("/v3/lease/keepalive", {"ID": lease})
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    async def revoke(self, lease: str) -> None:
        """End `lease` and with it the keys under it."""
        await self._call("/v3/lease/revoke", {"ID": lease})

    async def get(self, key: bytes) -> tuple[int, KeyValue | None]:
        """Return the revision of now and the key, None where it does not exist."""
        answer = await self._call("/v3/kv/range", {"key": _text(key)})
        found = [_key_value(one) for one in answer.get("kvs", [])]
        return int(answer["header"]["revision"]), found[0] if found else None

    async def list(self, prefix: bytes) -> Listing:
        """Return everything below `prefix`, of one revision."""
        answer = await self._call("/v3/kv/range", {"key": _text(prefix), "range_end": _text(_end_of(prefix))})
        header = answer["header"]
        found = tuple(_key_value(one) for one in answer.get("kvs", []))
        return Listing(str(header["cluster_id"]), int(header["revision"]), found)

    async def put_if_unchanged(self, key: bytes, value: bytes, lease: str, mod_revision: int) -> int | None:
        """Write `key` under `lease` if it is as of `mod_revision` (0: absent); return the revision, None if it was
        not."""
        compare = {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(mod_revision)}
        return await self._put_if(compare, key, value, lease)

    async def put_if_leased(self, key: bytes, value: bytes, lease: str) -> int | None:
        """Write `key` under `lease` if it stands under it already; return the revision, None if it did not."""
        compare = {"key": _text(key), "target": "LEASE", "result": "EQUAL", "lease": lease}
        return await self._put_if(compare, key, value, lease)

    async def delete_if_unchanged(self, key: bytes, mod_revision: int) -> bool:
        """Remove `key` if it is as of `mod_revision`; whether it was."""
        compare = {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(mod_revision)}
        delete = {"request_delete_range": {"key": _text(key)}}
        answer = await self._call("/v3/kv/txn", {"compare": [compare], "success": [delete]})
        return bool(answer.get("succeeded"))

    async def watch(self, prefix: bytes, start_revision: int) -> AsyncIterator[tuple[int, tuple[WatchEvent, ...]]]:
        """Yield (revision, what changed at it) from `start_revision` on, whole revisions in order.

        Ends where the history is no longer kept (compaction) or nothing came for a while: list anew then.
        """
        request = {"key": _text(prefix), "range_end": _text(_end_of(prefix)), "start_revision": str(start_revision)}
        session, endpoint = self._opened(), self._endpoints[self._at]
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=WATCH_SILENT_S)
        try:
            async with session.post(
                f"{endpoint}/v3/watch", json={"create_request": request}, timeout=timeout
            ) as answer:
                async for line in _lines(answer):
                    result = line.get("result", {})
                    if result.get("canceled") or "result" not in line:
                        return
                    for revision, events in _by_revision(result.get("events", [])):
                        yield revision, events
        except aiohttp.SocketTimeoutError:
            return
        except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
            raise self._unreachable(endpoint, error) from error

    async def close(self) -> None:
        """Close every connection, a watch's too."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _put_if(self, compare: dict[str, str], key: bytes, value: bytes, lease: str) -> int | None:
        put = {"request_put": {"key": _text(key), "value": _text(value), "lease": lease}}
        answer = await self._call("/v3/kv/txn", {"compare": [compare], "success": [put]})
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        endpoint = self._endpoints[self._at]
        try:
            async with self._opened().post(f"{endpoint}{path}", json=body) as answer:
                text = await answer.content.read(ANSWER_BYTES_MAX + 1)
                while len(text) <= ANSWER_BYTES_MAX and (more := await answer.content.read(ANSWER_BYTES_MAX)):
                    text += more
            if answer.status != 200 or len(text) > ANSWER_BYTES_MAX:
                raise ValueError(f"status {answer.status}, {text[:200]!r}")
            decoded = json.loads(text)
            if not isinstance(decoded, dict):
                raise ValueError(f"not an answer of etcd's JSON gateway: {text[:200]!r}")
            return decoded
        except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
            raise self._unreachable(endpoint, error) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s))
        return self._session

    def _unreachable(self, endpoint: str, error: Exception) -> EtcdUnreachableError:
        self._at = (self._at + 1) % len(self._endpoints)
        return EtcdUnreachableError(f"etcd at {endpoint}: {str(error) or type(error).__name__}")


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON documents of a stream, one a line, each of bounded length."""
    if answer.status != 200:
        raise ValueError(f"status {answer.status}")
    pending = b""
    async for data in answer.content.iter_any():
        *lines, pending = (pending + data).split(b"\n")
        if len(pending) > ANSWER_BYTES_MAX:
            raise ValueError(f"a line of over {ANSWER_BYTES_MAX} bytes")
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _by_revision(events: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[WatchEvent, ...]]]:
    found: dict[int, list[WatchEvent]] = {}
    for event in events:
        kv = _key_value(event["kv"])
        found.setdefault(kv.mod_revision, []).append(WatchEvent(event.get("type") == "DELETE", kv))
    return [(revision, tuple(found[revision])) for revision in sorted(found)]


def _key_value(kv: dict[str, Any]) -> KeyValue:
    return KeyValue(base64.b64decode(kv["key"]), base64.b64decode(kv.get("value", "")), int(kv["mod_revision"]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _end_of(prefix: bytes) -> bytes:
    """Return the first key behind everything that begins with `prefix` (whose last byte is not 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
