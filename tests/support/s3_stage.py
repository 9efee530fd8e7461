"""Fixtures: an S3 server with two buckets, and a proxy before it that logs every request and makes faults.

tests/conftest.py makes them known everywhere. A server serves the tests of one module, which name their own objects;
the proxy is reset before each test that asks for `proxy`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestra.testing.fault_proxy import FaultProxy
from orchestra.testing.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A server with the buckets "bucket" and "spare"."""
    with S3Server() as running:
        running.create_bucket("bucket")
        running.create_bucket("spare")
        yield running


@pytest.fixture(scope="module")
def running_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """The proxy as the test before left it."""
    with FaultProxy(server.endpoint) as running:
        yield running


@pytest.fixture
def proxy(running_proxy: FaultProxy) -> FaultProxy:
    """The proxy, which does nothing but log yet, and has logged nothing."""
    running_proxy.reset()
    return running_proxy
