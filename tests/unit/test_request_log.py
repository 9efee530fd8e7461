"""What reached the server is counted truly: the demo's promise of zero requests rests on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from orchestra.clock import ManualClock
from orchestra.testing.request_log import CountingApplication


def start(status: str, headers: list[tuple[str, str]]) -> Any:
    """What a WSGI server gives an application to begin its answer with."""


def environ(path: str, query: str = "") -> dict[str, Any]:
    """A request as a WSGI server hands it over."""
    return {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query}


def test_a_request_is_recorded_with_its_time_and_the_bytes_answered() -> None:
    """Bytes are those that were really handed out, over all pieces of the answer."""
    clock = ManualClock()
    counting = CountingApplication(lambda environ, start: [b"abc", b"de"], clock)
    assert b"".join(counting(environ("/b/key", "a=1"), start)) == b"abcde"
    assert counting.records == [
        {"came_ns": clock.now_ns(), "method": "GET", "path": "/b/key", "query": "a=1", "body_bytes": 5}
    ]


def test_an_answer_cut_short_counts_what_was_sent() -> None:
    """A client that leaves after the first piece leaves one piece counted, and the answer closed."""
    closed = []

    class Answer:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"abc", b"de"])

        def close(self) -> None:
            closed.append(True)

    counting = CountingApplication(lambda environ, start: Answer(), ManualClock())
    pieces = iter(counting(environ("/b/key"), start))
    assert next(pieces) == b"abc"
    pieces.close()  # type: ignore[attr-defined]
    assert counting.records[0]["body_bytes"] == 3
    assert closed == [True]


def test_a_request_that_fails_has_reached_the_server() -> None:
    """An application that raises does not make its request unseen."""

    def fail(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        raise RuntimeError("broken")

    counting = CountingApplication(fail, ManualClock())
    with pytest.raises(RuntimeError, match="broken"):
        list(counting(environ("/b/key"), start))
    assert len(counting.records) == 1
