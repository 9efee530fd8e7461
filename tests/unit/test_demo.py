"""The demo's arithmetic and its checks: a demo that could not fail would show nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.demo import dataset
from orchestra.demo.node import config_text, demo_environment
from orchestra.demo.report import DemoReport, Epoch, broken_promise, count_requests, make_epoch
from orchestra.demo.training import FOLDER_EXAMPLE, FSSPEC_EXAMPLE, EpochFigures, example_path, parse_line
from orchestra.demo.verify import compare, digest_of, folder_digests
from orchestra.errors import OrchestraError
from orchestra.testing.s3_server import StoreRequest

STORE = {"endpoint_url": "http://127.0.0.1:1", "key": "a-key", "secret": "a-secret", "region": "us-east-1"}
FIGURES = EpochFigures(time_s=2.0, images_per_s=900.0, data_wait_fraction=0.25, accuracy=0.9, ended_ns=2_500_000_000)


def request(came_ns: int, body_bytes: int = 10) -> StoreRequest:
    """A GET that came at that moment."""
    return StoreRequest(came_ns, "GET", "/bucket/key", "", body_bytes)


def epoch(store_requests: int) -> Epoch:
    """An epoch during which that many requests reached the server."""
    return make_epoch(FIGURES, (store_requests, 10), 0, 100)


def report(*store_requests: int) -> DemoReport:
    """A report of epochs with those numbers of requests."""
    return DemoReport("fuse", tuple(epoch(count) for count in store_requests), 0.9, 3, 30)


def test_a_request_belongs_to_the_epoch_in_which_it_came() -> None:
    """A request at the very end of an epoch is the earlier epoch's, and only there is it counted."""
    requests = [request(10), request(20), request(21, 5)]
    assert count_requests(requests, 9, 20) == (2, 20)
    assert count_requests(requests, 20, 30) == (1, 5)


def test_the_hit_ratio_is_the_share_of_bytes_that_were_here() -> None:
    """Bytes that the kernel served without asking anybody are hits; a missed byte is not."""
    assert make_epoch(FIGURES, (4, 40), 40, 100).hit_ratio == 0.6
    assert make_epoch(FIGURES, (0, 0), 0, 100).hit_ratio == 1.0
    assert make_epoch(FIGURES, (9, 150), 150, 100).hit_ratio == 0.0


def test_a_request_after_the_first_epoch_is_a_broken_promise() -> None:
    """One request in the second epoch makes the demo fail, and says so."""
    assert broken_promise(report(1800, 0)) is None
    assert "1 requests reached the S3 server" in str(broken_promise(report(1800, 1)))


def test_a_training_without_two_epochs_is_a_broken_promise() -> None:
    """A training that ended early shows nothing about a second epoch."""
    assert "1 epochs instead of two" in str(broken_promise(report(1800)))


def test_only_the_line_for_programs_is_read() -> None:
    """The example's lines for people are passed over; its JSON line gives the figures."""
    assert parse_line("epoch 1: 2.00 s, 900 images/s") is None
    line = (
        '{"epoch": 1, "time_s": 2.0, "images_per_s": 900.0, "data_wait_fraction": 0.25, "accuracy": 0.9, '
        '"ended_boottime_s": 2.5}'
    )
    assert parse_line(line) == FIGURES


def test_both_examples_are_found() -> None:
    """The examples that the demo runs are where it looks for them."""
    assert example_path(FOLDER_EXAMPLE).is_file()
    assert example_path(FSSPEC_EXAMPLE).is_file()


def test_a_missing_example_is_one_line() -> None:
    """An installation without the examples says what is missing."""
    with pytest.raises(OrchestraError, match=r"nothing\.py is missing from this installation"):
        example_path("nothing.py")


def seen(**files: bytes) -> Iterator[tuple[str, str, int]]:
    """What a walk over such files gives."""
    return ((name, digest_of(content), len(content)) for name, content in files.items())


class TestVerification:
    """The last step of the demo."""

    def test_equal_trees_are_counted(self) -> None:
        """Files and bytes of a namespace like the bucket are counted."""
        expected = {"a": digest_of(b"one"), "b": digest_of(b"three")}
        assert compare(seen(a=b"one", b=b"three"), expected) == (2, 8)

    def test_one_other_byte_is_found(self) -> None:
        """A file with one wrong byte is named."""
        with pytest.raises(OrchestraError, match="the bytes of a are not those of the bucket"):
            compare(seen(a=b"onE"), {"a": digest_of(b"one")})

    def test_a_missing_file_is_found(self) -> None:
        """A file that the namespace lacks is noticed."""
        with pytest.raises(OrchestraError, match="the bucket has 2 objects, the namespace 1"):
            compare(seen(a=b"one"), {"a": digest_of(b"one"), "b": digest_of(b"two")})

    def test_a_file_too_many_is_found(self) -> None:
        """A file that the bucket lacks is named."""
        with pytest.raises(OrchestraError, match="b is in the namespace and not in the bucket"):
            compare(seen(a=b"one", b=b"two"), {"a": digest_of(b"one")})

    def test_a_folder_is_walked_whole(self, tmp_path: Path) -> None:
        """Every file below a folder is read, with its path from there."""
        (tmp_path / "x" / "y").mkdir(parents=True)
        (tmp_path / "x" / "y" / "a").write_bytes(b"one")
        (tmp_path / "b").write_bytes(b"")
        assert sorted(folder_digests(tmp_path)) == sorted(seen(b=b"", **{"x/y/a": b"one"}))

    def test_a_folder_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        """A folder that is not there does not pass for an empty one."""
        with pytest.raises(FileNotFoundError):
            list(folder_digests(tmp_path / "nothing"))


def test_the_big_object_has_more_than_three_blocks_and_no_two_alike() -> None:
    """Swapped or repeated blocks of the big object would change its bytes."""
    content = dataset.big_object()
    block = 4 << 20
    blocks = {content[at : at + block] for at in range(0, len(content), block)}
    assert len(content) == dataset.BIG_SIZE_BYTES > 3 * block
    assert len(blocks) == 4


def test_the_environment_of_the_demo_is_its_own(tmp_path: Path) -> None:
    """The user's orchestra settings do not reach the demo's processes; the rest of the environment does."""
    environment = demo_environment(tmp_path, STORE, {"ORCHESTRA_CACHE_SIZE": "1KiB", "HOME": "/home/me"})
    assert "ORCHESTRA_CACHE_SIZE" not in environment
    assert environment["HOME"] == "/home/me"
    assert environment["ORCHESTRA_CONFIG"] == str(tmp_path / "orchestra.toml")


def test_the_configuration_of_the_demo_holds_no_secret(tmp_path: Path) -> None:
    """Credentials stand in the environment; the file names the variables."""
    text = config_text(tmp_path, STORE)
    assert STORE["secret"] not in text
    assert STORE["key"] not in text
    assert STORE["secret"] in demo_environment(tmp_path, STORE, {}).values()
