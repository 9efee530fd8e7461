"""The benchmarks' origin: if it served wrong bytes or counted wrongly, every figure would mean nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from common import OriginProcess, running_origin
from contestants import BareClient
from obstore.store import S3Store
from reader import Work
from synthetic import dataset_keys, expected_bytes

pytestmark = pytest.mark.system
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def origin() -> Iterator[OriginProcess]:
    """An origin with small and large objects."""
    with running_origin("--dataset", "small:2500x1234", "--dataset", "large:1x20MB") as running:
        yield running


@pytest.fixture
def store(origin: OriginProcess) -> S3Store:
    """A client of it, its counters at zero."""
    origin.call("/__reset")
    return S3Store(
        "bench",
        endpoint=origin.url,
        access_key_id="x",
        secret_access_key="y",
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def test_bodies_are_what_their_keys_say(store: S3Store) -> None:
    """Small and large objects and ranges across the pattern's end hold the expected bytes."""
    key = dataset_keys("small", 2500)[1234]
    assert bytes(obstore.get(store, key).bytes()) == expected_bytes(key, 0, 1234)
    large = dataset_keys("large", 1)[0]
    assert bytes(obstore.get(store, large).bytes()) == expected_bytes(large, 0, 20_000_000)
    for start, stop in ((0, 1), (8_388_000, 8_389_000), (16_000_000, 20_000_000)):
        assert bytes(obstore.get_range(store, large, start=start, end=stop)) == expected_bytes(large, start, stop)


def test_blocks_of_one_object_differ() -> None:
    """Two blocks of an object are never alike, so that swapped ones would show."""
    key = dataset_keys("large", 1)[0]
    blocks = {expected_bytes(key, at, at + (1 << 20)) for at in range(0, 64 << 20, 4 << 20)}
    assert len(blocks) == 16


def test_a_replaced_object_is_refused(store: S3Store) -> None:
    """A read that names another version than the object's gets no bytes."""
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.get(store, dataset_keys("small", 2500)[0], options={"if_match": '"another"'})


def test_listings_are_whole_and_come_by_the_thousand(store: S3Store, origin: OriginProcess) -> None:
    """Every key is listed once, in pages of 1,000; with a delimiter, folders are."""
    keys = [item["path"] for page in obstore.list(store, "small/") for item in page]
    assert keys == dataset_keys("small", 2500)
    assert origin.call("/__stats", "GET")["requests"] == {"LIST": 3}
    assert obstore.list_with_delimiter(store, "small/")["common_prefixes"] == [f"small/{i:02d}" for i in range(25)]


def test_requests_and_bytes_are_counted(store: S3Store, origin: OriginProcess) -> None:
    """Counters say what was asked and how many body bytes were sent for it."""
    key = dataset_keys("small", 2500)[0]
    obstore.head(store, key)
    obstore.get_range(store, key, start=0, end=100)
    with pytest.raises(FileNotFoundError):
        obstore.head(store, "nothing")
    stats = origin.call("/__stats", "GET")
    assert stats["requests"] == {"HEAD": 2, "GET": 1}
    assert stats["statuses"] == {"200": 1, "206": 1, "404": 1}
    assert stats["body_bytes"] == 100


def test_a_rate_is_held_with_503(origin: OriginProcess, tmp_path: Path) -> None:
    """Above the rate that was set the origin answers 503, below it the objects."""
    origin.set(rate=20)
    origin.call("/__reset")
    bare = BareClient(tmp_path, origin.url)
    try:
        answer = bare.read(Work(dataset_keys("small", 2500)[:8], 1234, concurrency=8))
        assert answer["byte_count"] == 8 * 1234  # the client tried again
        assert "503" in origin.call("/__stats", "GET")["statuses"]
    finally:
        origin.set(rate=0)
        bare.close()


@pytest.mark.parametrize("script", ["warm_read.py", "cold_read.py", "idle.py", "origin.py"])
def test_every_script_explains_itself(script: str) -> None:
    """--help of each benchmark answers."""
    ended: Any = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"usage: {script}")
