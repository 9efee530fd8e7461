"""Listings page by page, where a page that failed may be asked for again.

Owns: the iterator that every store of ours returns from `list_directory`. Leaves to others: one LIST request (the
store) and when to try again (retry.py).

An async generator will not do: one that raised is finished, and its next `__anext__` says StopAsyncIteration, so a
retry would take half a directory for the whole of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from orchestra.stores.contract import ListPage
from orchestra.values import ObjectInfo

# What S3 returns for one LIST; listings that arrive whole are cut into pages of the same size.
PAGE_KEYS_MAX = 1000
# A million names are a thousand LISTs behind one call; at half a second each that is 500 s, where the attempt's time
# is 30 s by default.
WHOLE_LISTING_PATIENCE = 20.0

Token = TypeVar("Token")


class PagedListing(Generic[Token]):
    """Yields pages until `fetch_page` returns no further token.

    `fetch_page(token)` gets None for the first page. When it raises, the token is kept: the next `__anext__` asks for
    the same page again. `close` is called once, at the end or by `aclose`. `patience` says how many times the usual
    time one call of `fetch_page` may take.
    """

    def __init__(
        self,
        fetch_page: Callable[[Token | None], Awaitable[tuple[ListPage, Token | None]]],
        close: Callable[[], None] = lambda: None,
        *,
        patience: float = 1.0,
    ) -> None:
        self.patience = patience
        self._fetch_page = fetch_page
        self._close = close
        self._token: Token | None = None
        self._finished = False

    def __aiter__(self) -> PagedListing[Token]:
        return self

    async def __anext__(self) -> ListPage:
        if self._finished:
            raise StopAsyncIteration
        page, self._token = await self._fetch_page(self._token)
        if self._token is None:
            await self.aclose()
        return page

    async def aclose(self) -> None:
        """End the listing and release what it holds. Idempotent."""
        if not self._finished:
            self._finished = True
            self._close()


class PagesThrough:
    """Passes each page request of `pages` through `call`: how a wrapper adds its quality to a listing."""

    def __init__(
        self, pages: AsyncIterator[ListPage], call: Callable[[Callable[[], Awaitable[ListPage]]], Awaitable[ListPage]]
    ) -> None:
        self.pages = pages
        self._call = call

    def __aiter__(self) -> PagesThrough:
        return self

    async def __anext__(self) -> ListPage:
        return await self._call(self.pages.__anext__)

    async def aclose(self) -> None:
        """End the wrapped listing."""
        await close_pages(self.pages)


async def close_pages(pages: AsyncIterator[ListPage]) -> None:
    """End a listing early; a plain iterator has nothing to end."""
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()


def is_resumable(pages: AsyncIterator[ListPage]) -> bool:
    """Return whether `pages` may be asked again after an error: our own listings, under any number of wrappers."""
    while isinstance(pages, PagesThrough):
        pages = pages.pages
    return isinstance(pages, PagedListing)


def patience_for(pages: AsyncIterator[ListPage]) -> float:
    """Return how many times the usual time one page of this listing may take, under any number of wrappers."""
    while isinstance(pages, PagesThrough):
        pages = pages.pages
    return pages.patience if isinstance(pages, PagedListing) else 1.0


def cut_into_pages(objects: Iterable[ObjectInfo], prefixes: Iterable[str]) -> list[ListPage]:
    """Return pages of at most PAGE_KEYS_MAX names for a listing that arrived whole; one empty page for nothing."""
    files, folders = list(objects), list(prefixes)
    pages = [ListPage(tuple(files[start : start + PAGE_KEYS_MAX]), ()) for start in range(0, len(files), PAGE_KEYS_MAX)]
    pages += [
        ListPage((), tuple(folders[start : start + PAGE_KEYS_MAX])) for start in range(0, len(folders), PAGE_KEYS_MAX)
    ]
    return pages or [ListPage((), ())]


def listing_that_arrives_whole(fetch: Callable[[], Awaitable[list[ListPage]]]) -> PagedListing[int]:
    """Return a listing over pages that one call of `fetch` brings; it is called again only if it failed."""
    pages: list[ListPage] = []

    async def fetch_page(index: int | None) -> tuple[ListPage, int | None]:
        if index is None:
            pages.extend(await fetch())
        at = index or 0
        page, pages[at] = pages[at], ListPage((), ())  # a page is handed over, not kept twice
        return page, at + 1 if at + 1 < len(pages) else None

    return PagedListing(fetch_page, patience=WHOLE_LISTING_PATIENCE)
