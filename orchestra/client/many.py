"""Many whole objects in one call: what is here is read at once, the rest is asked for in one go and read as it comes.

Owns: the order of asking and reading. Leaves to others: each object's bytes (handles), the wire (stream).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from orchestra.client.contract import Client, Handle, MissStream
from orchestra.client.memory import keep_freed_memory
from orchestra.values import Entry


def read_many(client: Client, paths: Sequence[str], at_once: int, quick: Callable[[str], bytes | None]) -> list[bytes]:
    """Return the contents of `paths`, in order; up to `at_once` fetches are in flight. Raises the first error.

    `quick` is tried first on each: it gives the bytes, or None if that takes more than it can do.
    """
    keep_freed_memory()
    contents = [quick(path) for path in paths]
    missing: list[tuple[int, Entry]] = []
    for at, path in enumerate(paths):
        if contents[at] is not None:
            continue
        handle = client.open(path)
        try:
            contents[at] = handle.read_here()
            if contents[at] is None:
                missing.append((at, handle.entry))
        finally:
            handle.close()
    if len(missing) > 1:
        stream = client.miss_stream()
        if stream is not None:
            try:
                _read_as_they_come(client, stream, iter(missing), at_once, contents)
            finally:
                stream.shut_down()
    # The rest: a single one, what there is no room for, and what failed and now says why.
    return [client.read_file(paths[at]) if data is None else data for at, data in enumerate(contents)]


def _read_as_they_come(
    client: Client,
    stream: MissStream,
    missing: Iterator[tuple[int, Entry]],
    at_once: int,
    contents: list[bytes | None],
) -> None:
    """Fill `contents`; leave out what does not come this way."""
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
            answers = stream.answers()
            if not answers:
                return
            for at, is_present in answers:
                handle = waiting.pop(at)
                try:
                    if is_present:
                        contents[at] = handle.read_here(fetched=True)
                finally:
                    handle.close()
            room = len(answers)
    finally:
        for handle in waiting.values():
            handle.close()
