"""Opens under stores: chooses one by the URI's scheme and puts the wrappers around it.

Owns: that choice, and the order of the wrappers. Leaves to others: what a URI may hold (uri.py), what each store does.

    RetryStore( LimitedStore( TimeoutStore( CountingStore( the store ))))

Counting stands innermost, so every attempt counts. The timeout stands inside the limit, so that waiting for a turn is
not taken for a slow store. Retry stands outside the limit, so that a call that waits to be tried again holds no turn.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping

from orchestra.clock import Clock, SystemClock
from orchestra.config import FetchConfig
from orchestra.errors import ConfigError
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.counting import CountingStore, StoreStatistics, statistics_of
from orchestra.stores.limit import LimitedStore
from orchestra.stores.options import chosen_client, needs_s3fs
from orchestra.stores.retry import RetryPolicy, RetryStore
from orchestra.stores.timeout import TimeoutStore
from orchestra.stores.uri import StoreUri, check_uri, parse_uri

__all__ = ["StoreStatistics", "check_uri", "open_store", "statistics_of", "wrapped"]


def open_store(
    settings: StoreSettings,
    fetch: FetchConfig,
    *,
    clock: Clock | None = None,
    chance: Callable[[], float] = random.random,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    environment: Mapping[str, str] = os.environ,
) -> RetryStore:
    """Return the store that `settings.uri` names, with retry, limit, timeout and counts; nothing is asked yet.

    Raises ConfigError for a bad URI, an unknown option, or a missing package. `clock`, `chance` (jitter in [0, 1)),
    `sleep` and `environment` (AWS_*) are for tests. May be called before the event loop runs; the store then belongs
    to the loop that first uses it.
    """
    clock = clock or SystemClock()
    store = open_bare_store(settings, fetch, clock=clock, environment=environment)
    return wrapped(store, fetch, clock=clock, chance=chance, sleep=sleep)


def wrapped(
    store: UnderStore,
    fetch: FetchConfig,
    *,
    clock: Clock,
    chance: Callable[[], float] = random.random,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> RetryStore:
    """Return any store inside our wrappers; also how a fault store is put below them."""
    counted = CountingStore(store)
    bounded = TimeoutStore(counted, attempt_timeout_s=fetch.attempt_timeout_s)
    limited = LimitedStore(bounded, requests_max=fetch.requests_max)
    return RetryStore(limited, RetryPolicy(deadline_s=fetch.deadline_s), clock=clock, chance=chance, sleep=sleep)


def open_bare_store(
    settings: StoreSettings, fetch: FetchConfig, *, clock: Clock, environment: Mapping[str, str] = os.environ
) -> UnderStore:
    """Return the store itself, without wrappers. Clients are imported here, each only when it is needed."""
    uri = parse_uri(settings.uri)
    options = settings.options
    if uri.kind == "file":
        return _open_local(uri, options)
    by_fsspec = chosen_client(options) == "fsspec"
    if uri.kind == "s3":
        return _open_s3(uri, options, environment, fetch, clock)
    if uri.kind == "gs" and not by_fsspec:
        from orchestra.stores.object_clients import open_gcs

        return open_gcs(uri, options, fetch)
    if uri.kind == "az" and not by_fsspec:
        from orchestra.stores.object_clients import open_azure

        return open_azure(uri, options, fetch)
    if uri.kind == "http":
        from orchestra.stores.http import open_http

        return open_http(uri, options, fetch, clock)
    from orchestra.stores.fsspec_store import open_fsspec

    return open_fsspec(uri, settings.uri, options)


def _open_local(uri: StoreUri, options: Mapping[str, str]) -> UnderStore:
    from orchestra.stores.local import LocalStore

    if options:
        raise ConfigError(f"file: unknown option {next(iter(options))!r}: a folder takes no options")
    return LocalStore(uri.root)


def _open_s3(
    uri: StoreUri, options: Mapping[str, str], environment: Mapping[str, str], fetch: FetchConfig, clock: Clock
) -> UnderStore:
    if needs_s3fs(options):
        try:
            from orchestra.stores.s3fs_store import open_s3fs
        except ImportError as error:
            raise ConfigError("s3: these options need s3fs: pip install 'orchestra-fs[s3]'") from error
        return open_s3fs(uri, options, fetch, clock)
    from orchestra.stores.object_clients import open_s3

    return open_s3(uri, options, environment, fetch, clock)
