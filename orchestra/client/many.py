"""Many whole objects in one call: what is here is read at once, the rest is asked for in one go and read as it comes.

Owns: the order of asking, reading and using. Leaves to others: each object's bytes (handles), the wire (stream).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestra.client.contract import Client, Handle, MissStream
from orchestra.client.memory import keep_freed_memory
from orchestra.values import Entry


def read_many(
    client: Client,
    paths: Sequence[str],
    at_once: int,
    quick: Callable[[str], bytes | None],
    use: Callable[[bytes], Any] | None,
) -> list[Any]:
    """Return the contents of `paths`, in order, or what `use` makes of each; up to `at_once` fetches are in flight.
    Raises the first error.

    `quick` is tried first on each: it gives the bytes, or None if that takes more than it can do. Contents are used as
    soon as they and all before them are here: while they are still in the processor's cache, and while others come.
    """
    keep_freed_memory()
    if use is None:
        use = _as_they_are
    results: list[Any] = []
    for at, path in enumerate(paths):
        data = quick(path)
        if data is None:
            _read_rest(client, paths, at, at_once, quick, _InOrder(results, len(paths), use))
            break
        results.append(use(data))
    return results


class _InOrder:
    """Contents that come in any order and are used in theirs: what draws random numbers then draws the same ones
    whatever was cached. `results` has what was made of the first of them, and is filled."""

    __slots__ = ("_contents", "_results", "_use")

    def __init__(self, results: list[Any], count: int, use: Callable[[bytes], Any]) -> None:
        self._results = results
        self._contents: list[bytes | None] = [None] * count
        self._use = use

    def put(self, at: int, data: bytes) -> None:
        """Content number `at` is here."""
        self._contents[at] = data

    def use_ready(self) -> None:
        """Use the contents up to the first that is not here."""
        contents, results = self._contents, self._results
        while len(results) < len(contents):
            data = contents[len(results)]
            if data is None:
                return
            contents[len(results)] = None  # so that its memory serves the next one
            results.append(self._use(data))

    def absent(self) -> list[int]:
        """Which contents are still to come."""
        return [at for at in range(len(self._results), len(self._contents)) if self._contents[at] is None]


def _read_rest(
    client: Client,
    paths: Sequence[str],
    first: int,
    at_once: int,
    quick: Callable[[str], bytes | None],
    batch: _InOrder,
) -> None:
    """Read those from `first` on, which is missing; nothing more is used before all that is missing is asked for."""
    for at in range(first + 1, len(paths)):
        data = quick(paths[at])
        if data is not None:
            batch.put(at, data)
    missing: list[tuple[int, Entry]] = []
    for at in batch.absent():
        handle = client.open(paths[at])
        try:
            data = handle.read_here()
            if data is None:
                missing.append((at, handle.entry))
            else:
                batch.put(at, data)
        finally:
            handle.close()
    if len(missing) > 1:
        stream = client.miss_stream()
        if stream is not None:
            try:
                _read_as_they_come(client, stream, iter(missing), at_once, batch)
            finally:
                stream.shut_down()
    # The rest: a single one, what there is no room for, and what failed and now says why.
    for at in batch.absent():
        batch.put(at, client.read_file(paths[at]))
    batch.use_ready()


def _read_as_they_come(
    client: Client,
    stream: MissStream,
    missing: Iterator[tuple[int, Entry]],
    at_once: int,
    batch: _InOrder,
) -> None:
    """Fill the batch; leave out what does not come this way."""
    waiting: dict[int, Handle] = {}
    try:
        room = at_once
        while True:
            asked = []
            for at, entry in missing:
                handle = waiting[at] = client.open(entry.path, entry=entry)
                asked.append((at, handle, 0, entry.size_bytes))
                if len(asked) == room:
                    break
            if (asked and not stream.ask(*asked)) or not waiting:
                return
            batch.use_ready()
            answers = stream.answers()
            if not answers:
                return
            for at, is_present in answers:
                handle = waiting.pop(at)
                try:
                    data = handle.read_here(fetched=True) if is_present else None
                    if data is not None:
                        batch.put(at, data)
                finally:
                    handle.close()
            room = len(answers)
    finally:
        for handle in waiting.values():
            handle.close()


def _as_they_are(data: bytes) -> bytes:
    return data
