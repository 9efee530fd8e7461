"""The loader, without a job around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestra.errors import OrchestraError
from orchestra.fetch.budget import Priority
from orchestra.prefetch.loading import Loader
from orchestra.prefetch.pace import Pace
from orchestra.prefetch.tree import Page, TreeFile, file_at
from tests.support.node import PATIENCE_S, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore
from tests.unit.test_load_jobs import held_files, put_tree


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def test_a_load_that_is_cancelled_while_it_looks_at_files_leaves_nothing_behind(
    tmp_path: Path, store: VersionedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would have asked for next is not asked for by anybody any more."""
    path, data = next(iter(put_tree(store, 1).items()))
    reached, go_on = threading.Event(), threading.Event()

    def verify(*_: object) -> int:
        reached.set()
        assert go_on.wait(PATIENCE_S)
        return 0

    with thread_node(tmp_path, store) as node:
        engine = node.node.engine
        observer: Any = None  # nothing becomes of any file
        assert node.client().read_file(path) == data
        for held in held_files(tmp_path):
            held.unlink()  # the accounts still have it: it has to be looked for
        monkeypatch.setattr(node.node.blocks, "verify", verify)

        async def play() -> int:
            file = file_at(engine, path, await engine.stat(path))

            async def pages() -> AsyncGenerator[Page, None]:
                yield Page((file,))

            before = asyncio.all_tasks()
            clock, priority = node.node.clock, Priority.LOAD
            loader = Loader(engine, node.node.geometry, observer, priority=priority, limit=2, clock=clock)
            loading = asyncio.create_task(loader.run(pages()))
            await asyncio.to_thread(reached.wait, PATIENCE_S)
            loading.cancel()
            await asyncio.wait([loading])
            left = asyncio.all_tasks() - before
            go_on.set()
            if left:
                await asyncio.wait(left)
            return len(left)

        assert node.run(play()) == 0
    assert len(store.reads) == 1


class _Silent:
    """Wants to know nothing."""

    def on_done(self, file: TreeFile) -> None:
        """See LoadObserver."""

    def on_failed(self, path: str, error: OrchestraError) -> None:
        """See LoadObserver."""
        raise AssertionError(f"{path}: {error}")


@pytest.mark.parametrize("is_paced", [False, True], ids=["as fast as it may", "paced"])
def test_answers_are_timed_however_a_piece_is_begun(tmp_path: Path, store: VersionedStore, is_paced: bool) -> None:
    """What steers a load learns of each file that was fetched, and of none that was here; nothing is in flight then."""
    paths = put_tree(store, 5)
    with thread_node(tmp_path, store) as node:
        engine, clock = node.node.engine, node.node.clock

        async def play() -> tuple[int, int]:
            async def pages() -> AsyncGenerator[Page, None]:
                yield Page(tuple([file_at(engine, path, await engine.stat(path)) for path in paths]))

            pace = Pace(1e9, clock) if is_paced else None
            loader = Loader(
                engine, node.node.geometry, _Silent(), priority=Priority.LOAD, limit=2, clock=clock, pace=pace
            )
            assert await loader.run(pages())
            return len(loader.take_answers()), loader.bytes_in_flight

        assert node.run(play()) == (5, 0)
        assert node.run(play()) == (0, 0)
    assert len(store.reads) == 5
