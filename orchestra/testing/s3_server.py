"""A real S3 server (moto) on loopback in a process of its own, for tests and the demo.

Owns: starting it, filling buckets, what reached it, stopping it. The process holds a pipe to its parent and ends when
that closes, so a parent that is killed leaves nothing behind. Needs the extra `demo` (moto).

    with S3Server() as server:
        server.create_bucket("data")
        server.put("data", "a.txt", b"hello")
        settings = StoreSettings("s3://data/", server.options)
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from orchestra.clock import SystemClock
from orchestra.testing.request_log import CountingApplication

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
ACCESS_KEY, SECRET_KEY, REGION = "orchestra-test", "orchestra-test-secret", "us-east-1"


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One request that reached the server, at `Clock.now_ns`; `body_bytes` were answered, heads not counted."""

    came_ns: int
    method: str
    path: str
    query: str
    body_bytes: int


class S3Server:
    """An S3 endpoint that lives until `stop`. Use from one thread at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestra.testing.s3_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the parent, which may need the server to end in order
        )
        try:
            self.port: int = self._answer()["port"]
        except BaseException:
            self.stop()
            raise

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, str]:
        """The mount options that reach it."""
        return self.options_at(self.endpoint)

    def options_at(self, endpoint: str) -> dict[str, str]:
        """The mount options that reach it through a proxy at `endpoint`."""
        return {"endpoint_url": endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY, "region": REGION}

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket."""
        self._ask({"do": "bucket", "bucket": bucket})

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Put one object; returns its ETag as a HEAD answers it (quotes included)."""
        return str(self.put_many(bucket, {key: data})[key])

    def put_many(self, bucket: str, objects: Mapping[str, bytes]) -> dict[str, str]:
        """Put many objects without a request each; returns their ETags. Keys may be anything that S3 allows."""
        encoded = {key: base64.b64encode(data).decode() for key, data in objects.items()}
        return dict(self._ask({"do": "put", "bucket": bucket, "objects": encoded})["etags"])

    def put_numbered(self, bucket: str, prefix: str, count: int, data: bytes = b"x") -> None:
        """Put `count` equal objects named PREFIX000000, PREFIX000001, ... : 100,000 take a few seconds."""
        encoded = base64.b64encode(data).decode()
        self._ask({"do": "number", "bucket": bucket, "prefix": prefix, "count": count, "data": encoded})

    def delete(self, bucket: str, key: str) -> None:
        """Delete one object."""
        self._ask({"do": "delete", "bucket": bucket, "key": key})

    def requests(self, after: int = 0) -> list[StoreRequest]:
        """Return the requests that reached the server, from number `after` on, in the order in which they came."""
        return [StoreRequest(**record) for record in self._ask({"do": "requests", "after": after})["requests"]]

    def stop(self) -> None:
        """End the process and wait for it. Idempotent."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"the S3 server refused {command['do']!r}: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the S3 server ended (exit status {self._process.wait()}): is moto[s3,server] installed?"
            )
        return dict(json.loads(line))


def main() -> None:
    """Serve S3 and carry out the parent's commands, one JSON document a line, until its end of the pipe closes."""
    parser = argparse.ArgumentParser(description="an S3 server for tests; started by S3Server")
    parser.parse_args()
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections: werkzeug's own default closes each after one answer
        # Head and body are sent apart: with Nagle's algorithm the second waits 40 ms for the client's delayed ACK.
        disable_nagle_algorithm = True

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = CountingApplication(create_backend_app("s3"), SystemClock())
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # moto may print; answers go to the parent alone
    _say(answers, {"port": server.server_port})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict[str, Any]
            if command["do"] == "requests":
                answer = {"requests": application.records[command["after"] :]}
            else:
                answer = _DO[command["do"]](command)
        except Exception as error:  # noqa: BLE001 - the process's outermost frame: told to the parent, which raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answers, answer)
    server.shutdown()


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _backend() -> Any:
    from moto.core import DEFAULT_ACCOUNT_ID  # type: ignore[attr-defined]  # exported, but not in its __all__
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _bucket(command: dict[str, Any]) -> dict[str, Any]:
    _backend().create_bucket(command["bucket"], REGION)
    return {}


def _put(command: dict[str, Any]) -> dict[str, Any]:
    etags = {}
    for key, encoded in command["objects"].items():
        etags[key] = _backend().put_object(command["bucket"], key, base64.b64decode(encoded)).etag
    return {"etags": etags}


def _number(command: dict[str, Any]) -> dict[str, Any]:
    data = base64.b64decode(command["data"])
    for index in range(command["count"]):
        _backend().put_object(command["bucket"], f"{command['prefix']}{index:06d}", data)
    return {}


def _delete(command: dict[str, Any]) -> dict[str, Any]:
    _backend().delete_object(command["bucket"], command["key"])
    return {}


_DO = {"bucket": _bucket, "put": _put, "number": _number, "delete": _delete}

if __name__ == "__main__":
    main()
