"""A real S3 server in a process of its own (moto), behind a layer that writes down every request that reaches it.

    python -m orchestra.demo.store_server      fills its bucket, prints its URL; stops when its standard input ends

`GET /__requests?after=N` answers the requests from the N-th on, as JSON; asking is not itself counted.
Owns: the server's life and the log. Leaves to others: the objects (dataset.py) and what the log means (report.py).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from orchestra.clock import Clock, SystemClock
from orchestra.demo import dataset

LOG_PATH = "/__requests"
BUCKET = "orchestra-demo"
REGION = "us-east-1"

# WSGI's own types: an environment of anything, and a callable that starts the answer.
Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], object]]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class CountingApplication:
    """Wraps a WSGI application; keeps a record of each request: when it came, what it was, the body bytes answered."""

    def __init__(self, application: Application, clock: Clock) -> None:
        self._application = application
        self._clock = clock
        self._records: list[dict[str, Any]] = []

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == LOG_PATH:
            return self._answer_log(environ, start_response)
        record = {
            "came_ns": self._clock.now_ns(),
            "method": environ["REQUEST_METHOD"],
            "path": environ["PATH_INFO"],
            "query": environ.get("QUERY_STRING", ""),
            "body_bytes": 0,
        }
        self._records.append(record)  # before it is answered: a request that fails has reached the server too
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

    def _answer_log(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        query = urllib.parse.parse_qs(environ.get("QUERY_STRING", ""))
        after = int(query.get("after", ["0"])[0])
        body = json.dumps(self._records[after:]).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def fill() -> None:
    """Put the data set into a new bucket.

    Through the server's backend: a PUT through its HTTP layer takes 4 ms of processor, 7 s for all, and proves nothing
    of orchestra, which only reads.
    """
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(BUCKET, REGION)
    for key, content in dataset.objects():
        backend.put_object(BUCKET, key, content)


def main() -> None:
    """Serve on a free port of loopback until standard input ends."""
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections: werkzeug's own default closes each after one answer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request would hide everything else
    fill()
    application = CountingApplication(create_backend_app("s3"), SystemClock())
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()  # whoever started us holds the other end, so that we also end when it is killed
    server.shutdown()


if __name__ == "__main__":
    main()
