"""A bucket as a folder, with no configuration at all: strange keys, sizes at the edges, deaths in the middle of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestra.fuse.mount import mount_at, unmount
from orchestra.testing.fault_proxy import FaultProxy, Stall
from orchestra.testing.s3_server import S3Server
from tests.support.fuse_mounts import needs_fuse
from tests.support.fuse_supervised import beside, kill

pytestmark = [pytest.mark.system, pytest.mark.slow, needs_fuse]

_LONG = "n" * 255
# 4,096 bytes with the mount's own path /s3/bucket/keys, which counts as the client's paths do.
_DEEP = "/".join(["d" * 254] * 16)[: 4096 - len("/s3/bucket/keys/")]
OBJECTS = {
    "plain": b"plain bytes",
    "empty": b"",
    _LONG: b"a name of 255 bytes",
    "n" * 256: b"a name that no folder can hold",
    "ünï/日本/\u0301e": b"names are bytes",
    "slashes//inner": b"an empty name in between",
    "both": b"a file of the name of a folder",
    "both/inside": b"in the folder",
    _DEEP: b"deep",
}


@dataclass
class Bucket:
    """A user with an empty home, and where his bucket is."""

    home: Path
    target: Path
    server: S3Server
    proxy: FaultProxy

    def run(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        dropped = ("ORCHESTRA_", "AWS_", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        environment = kept | {"HOME": str(self.home), "S3_SECRET": self.server.options["secret"]} | variables
        command = [sys.executable, "-m", "orchestra", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=self.home, timeout=60
        )

    def mount(self, uri: str, *words: str) -> None:
        options = self.server.options_at(self.proxy.endpoint) | {"secret": "${S3_SECRET}"}
        told = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
        done = self.run("fuse", "mount", *told, *words, uri, self.target)
        assert (done.returncode, done.stderr) == (0, "")

    def known(self) -> dict[str, object]:
        rows = json.loads(self.run("fuse", "ls", "--json").stdout)
        return next(row for row in rows if row["folder"] == str(self.target))

    def worker(self) -> int:
        (pid,) = json.loads(json.dumps(self.known()["workers"]))
        return int(pid)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        running.create_bucket("bucket")
        running.put_many("bucket", {f"keys/{key}": data for key, data in OBJECTS.items()})
        yield running


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path) -> Iterator[Bucket]:
    (tmp_path / "home").mkdir()
    (tmp_path / "mnt").mkdir()
    with FaultProxy(server.endpoint) as proxy:
        bucket = Bucket(tmp_path / "home", tmp_path / "mnt", server, proxy)
        yield bucket
        proxy.reset()
        while mount_at(str(bucket.target)) is not None:
            unmount(str(bucket.target), lazy=True)
        bucket.run("daemon", "stop")


def test_a_bucket_is_mounted_with_no_configuration_at_all(bucket: Bucket) -> None:
    """Only an address and options: every key that a folder can hold is there, and does what docs/semantics.md says."""
    bucket.mount("s3://bucket/keys")
    mnt = bucket.target
    assert sorted(os.listdir(mnt)) == sorted([_LONG, "plain", "empty", "ünï", "slashes", "both", "d" * 254])
    assert (mnt / "plain").read_bytes() == b"plain bytes"
    assert (mnt / "empty").read_bytes() == b""
    assert (mnt / "empty").stat().st_size == 0
    assert (mnt / _LONG).read_bytes() == b"a name of 255 bytes"
    assert (mnt / "ünï" / "日本" / "\u0301e").read_bytes() == b"names are bytes"
    assert os.listdir(mnt / "slashes") == []
    assert os.listdir(mnt / "both") == ["inside"]
    with pytest.raises(OSError, match="name too long"):
        (mnt / ("n" * 256)).stat()
    assert bucket.known()["path"] == "/s3/bucket/keys"
    assert bucket.run("fuse", "umount", mnt).returncode == 0


def test_an_account_is_taken_from_the_variables_of_aws_and_an_older_daemon_is_told_of(bucket: Bucket) -> None:
    """Without one it is asked for; a daemon that was started without the variables that were set then is named."""
    options = bucket.server.options
    nothing = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": options["endpoint_url"]}
    account = nothing | {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    words = ("fuse", "mount", "s3://bucket/keys", bucket.target)
    done = bucket.run(*words, **nothing)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in done.stderr
    assert "daemon" not in done.stderr
    done = bucket.run(*words, **account)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the daemon was started without this shell's AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in done.stderr
    assert options["secret"] not in done.stderr
    bucket.run("daemon", "stop")
    done = bucket.run(*words, **account)
    assert (done.returncode, done.stderr) == (0, "")
    assert (bucket.target / "plain").read_bytes() == b"plain bytes"


def test_a_path_of_4096_bytes_is_reached_step_by_step(bucket: Bucket) -> None:
    """No call takes so long a path at once; relative to an open folder it opens, and one byte more does not."""
    bucket.mount("s3://bucket/keys")
    folder = os.open(bucket.target, os.O_RDONLY | os.O_DIRECTORY)
    *folders, name = _DEEP.split("/")
    for step in folders:
        inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = inner
    fd = os.open(name, os.O_RDONLY, dir_fd=folder)
    assert os.read(fd, 100) == b"deep"
    os.close(fd)
    with pytest.raises(OSError, match="name too long"):
        os.open(name + "x", os.O_RDONLY, dir_fd=folder)
    os.close(folder)


def test_daemon_and_worker_killed_in_the_middle_of_a_read_cost_time_and_no_error(bucket: Bucket) -> None:
    """The GET is on its way when both are killed; the reader gets its bytes from their successors."""
    data = os.urandom(300_000)
    bucket.server.put("bucket", "killed", data)
    stalled = bucket.proxy.add(Stall(), method="GET", path="^/bucket/killed$", times=1)
    bucket.mount("s3://bucket")
    worker = bucket.worker()
    daemon = json.loads(bucket.run("daemon", "status", "--json").stdout)["pid"]
    reading = beside((bucket.target / "killed").read_bytes)
    stalled.wait_fired(30)
    kill(worker)
    kill(daemon)
    assert reading.result(60) == data
    assert (bucket.target / "killed").read_bytes() == data
    assert bucket.worker() != worker


def test_a_file_of_5_gib_is_read_where_it_is_asked_for(bucket: Bucket, tmp_path: Path) -> None:
    """A sparse file in a local folder: its last bytes, and a range across 4 GiB, cost their blocks and no more."""
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / "large").open("wb") as file:
        file.truncate(5 << 30)
        file.seek((4 << 30) - 3)
        file.write(b"across")
        file.seek((5 << 30) - 4)
        file.write(b"last")
    done = bucket.run("fuse", "mount", f"file://{tmp_path}/store", bucket.target)
    assert (done.returncode, done.stderr) == (0, "")
    path = bucket.target / "large"
    assert path.stat().st_size == 5 << 30
    with path.open("rb", buffering=0) as large:
        large.seek((4 << 30) - 3)
        assert large.read(6) == b"across"
        large.seek(-4, os.SEEK_END)
        assert large.read(10) == b"last"
        assert large.read(10) == b""
    cached, _, size = os.getxattr(path, "user.orchestra.cached").decode().partition("/")
    assert size == str(5 << 30)
    assert int(cached) < 1 << 30
