"""A WSGI layer that writes down every request that reaches a server: when it came, what it was, the bytes answered.

Owns: the records. Leaves to others: the server (s3_server.py), and what the records mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from orchestra.clock import Clock

# WSGI's own types: an environment of anything, and a callable that starts the answer.
Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class CountingApplication:
    """Wraps a WSGI application and keeps a record of each request, in the order in which they came."""

    def __init__(self, application: Application, clock: Clock) -> None:
        self._application = application
        self._clock = clock
        self.records: list[dict[str, Any]] = []

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        record = {
            "came_ns": self._clock.now_ns(),
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ.get("QUERY_STRING", ""),
            "body_bytes": 0,
        }
        self.records.append(record)  # before it is answered: a request that fails has reached the server too
        return self._count(self._application(environ, start_response), record)

    def _count(self, chunks: Iterable[bytes], record: dict[str, Any]) -> Iterator[bytes]:
        try:
            for chunk in chunks:
                record["body_bytes"] += len(chunk)
                yield chunk
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
