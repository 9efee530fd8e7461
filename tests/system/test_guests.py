"""Another user than the cache's owner: reads through the owner's daemon, if they say so, and does nothing else."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.blocks.layout import CacheLayout
from orchestra.client.wire import DaemonConnection
from orchestra.errors import AccessDeniedError, DaemonUnavailableError
from tests.support.node import DaemonNode, folder_daemon_node
from tests.support.other_user import NOBODY, python_as_nobody
from tests.support.ram import ram_folder

pytestmark = pytest.mark.system

LARGE = b"".join(number.to_bytes(4, "big") for number in range(1_500_000))


@pytest.fixture(scope="module")
def nobody() -> list[str]:
    return python_as_nobody("import orchestra.client.guest, fsspec, click, msgspec")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A folder that others may pass through: what is closed to them in it is so by itself."""
    with ram_folder() as folder:
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def node(root: Path) -> Iterator[DaemonNode]:
    """Of root, who lets nobody read; the store's folder is root's alone."""
    with folder_daemon_node(root, daemon={"readers": ["nobody"]}) as (running, store):
        (store / "dir").mkdir()
        (store / "dir" / "a.txt").write_bytes(b"hello\n")
        (store / "large.bin").write_bytes(LARGE)
        (store / "fresh").write_bytes(b"fresh" * 1000)
        store.chmod(0o700)
        running.start()
        yield running


def as_nobody(nobody: list[str], node: DaemonNode, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a Python with these arguments as nobody, who knows the cache's directory and nothing else."""
    environment = {"ORCHESTRA_CACHE_DIR": str(node.cache_dir), "PATH": os.environ["PATH"]}
    return subprocess.run([*nobody, *arguments], capture_output=True, check=False, env=environment, cwd="/", timeout=60)


def orchestra(nobody: list[str], node: DaemonNode, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return as_nobody(nobody, node, "-m", "orchestra", *arguments)


def test_files_are_listed_and_read(nobody: list[str], node: DaemonNode) -> None:
    """ls, cat, stat and du of another user give what the store holds, cold and warm."""
    listed = orchestra(nobody, node, "ls", "-R", "/")
    assert listed.stdout == b"/:\ndata/\n\n/data:\ndir/\nfresh\nlarge.bin\n\n/data/dir:\na.txt\n", listed.stderr
    for _ in range(2):
        assert orchestra(nobody, node, "cat", "/data/large.bin", "/data/dir/a.txt").stdout == LARGE + b"hello\n"
    told = json.loads(orchestra(nobody, node, "stat", "--json", "/data/large.bin").stdout)
    assert (told["size_bytes"], told["cached_bytes"]) == (len(LARGE), len(LARGE))
    used = json.loads(orchestra(nobody, node, "du", "--json", "-s", "/data/dir").stdout)
    assert (used[0]["bytes"], used[0]["cached_bytes"]) == (6, 6)


def test_what_a_guest_reads_is_cached_for_all(nobody: list[str], node: DaemonNode) -> None:
    """The owner then reads it without a message."""
    code = "import orchestra; c = orchestra.connect(); assert c.read_file('/data/fresh') == b'fresh' * 1000"
    client = node.client()
    assert client.cached_bytes(client.stat("/data/fresh")) == 0
    ended = as_nobody(nobody, node, "-c", code)
    assert ended.returncode == 0, ended.stderr
    assert client.cached_bytes(client.stat("/data/fresh")) == 5000
    sent = client.messages_sent
    assert client.read_file("/data/fresh") == b"fresh" * 1000
    assert client.messages_sent == sent


def test_fsspec_and_a_forked_process_read(nobody: list[str], node: DaemonNode) -> None:
    """The faces work as they are: cat, find and open of fsspec, also in a process forked from one that read."""
    code = """
import os, fsspec
fs = fsspec.filesystem("orchestra")
assert fs.cat(["/data/dir/a.txt"]) == {"/data/dir/a.txt": b"hello\\n"}
assert fs.find("/data/dir") == ["/data/dir/a.txt"]
pid = os.fork()
with fsspec.open("orchestra:///data/large.bin") as file:
    file.seek(4_000_000)
    assert file.read(8) == (1_000_000).to_bytes(4, "big") + (1_000_001).to_bytes(4, "big")
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""
    ended = as_nobody(nobody, node, "-c", code)
    assert ended.returncode == 0, ended.stderr


def test_a_dataloader_with_workers_reads(nobody: list[str], node: DaemonNode) -> None:
    """FileDataset over the namespace, in workers that were forked."""
    code = """
from torch.utils.data import DataLoader
from orchestra.torch import FileDataset
files = FileDataset("orchestra:///data/dir", transform=len)
assert [one.tolist() for one in DataLoader(files, batch_size=1, num_workers=2)] == [[6]]
"""
    ended = as_nobody(nobody, node, "-c", code)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["free", "/data"],
        ["pin", "/data"],
        ["load", "/data"],
        ["mount", "add", "/more", "file:///etc"],
        ["mount", "rm", "/data"],
        ["daemon", "stop"],
        ["daemon", "status"],
        ["daemon", "start"],
        ["job", "ls"],
    ],
    ids=" ".join,
)
def test_a_guest_changes_nothing(nobody: list[str], node: DaemonNode, command: list[str]) -> None:
    """Everything but reading is refused in one line, and the daemon is as it was."""
    pid, mounts = node.status()["pid"], node.status()["mounts"]
    ended = orchestra(nobody, node, *command)
    assert ended.returncode == 1
    assert ended.stderr.count(b"\n") == 1, ended.stderr
    assert b"other users may read" in ended.stderr
    assert (node.status()["pid"], node.status()["mounts"]) == (pid, mounts)


def test_nothing_but_the_listed_routes_answers(node: DaemonNode) -> None:
    """Whatever is sent to the guests' socket that is no reading is refused, also for its owner."""
    connection = DaemonConnection(str(CacheLayout(node.cache_dir).guest_socket), timeout_s=30, owner_uid=os.getuid())
    for method, route in (("POST", "/v1/stop"), ("POST", "/v1/mounts"), ("POST", "/v1/ensure"), ("POST", "/v1/reload")):
        with pytest.raises(AccessDeniedError, match="other users may read"):
            connection.request(method, route, {})
    assert connection.request("GET", "/v1/mounts")["mounts"][0]["options"] == {}
    connection.close()


def test_the_cache_itself_stays_closed(nobody: list[str], node: DaemonNode) -> None:
    """The directory, the owner's socket and the store are out of the guest's reach; the guests' socket is a socket."""
    layout = CacheLayout(node.cache_dir)
    for path in (layout.root, layout.root.parent / "store", layout.namespace, layout.socket):
        code = f"import os, sys\ntry: os.scandir({str(path)!r}) if {path.is_dir()} else os.stat({str(path)!r})\n"
        ended = as_nobody(nobody, node, "-c", code + "except PermissionError: sys.exit(7)")
        assert ended.returncode == 7, path
    assert stat.S_ISSOCK(layout.guest_socket.lstat().st_mode)


def test_a_size_that_is_not_so_is_refused(node: DaemonNode) -> None:
    """What a guest says of an object is compared with what is known: nothing false is cached for others."""
    connection = DaemonConnection(str(CacheLayout(node.cache_dir).guest_socket), timeout_s=30)
    entry = connection.request("POST", "/v1/stat", {"path": "/data/dir/a.txt"})
    wanted = {"path": "/data/dir/a.txt", "version": entry["version"], "start": 0}
    assert connection.fetch("/v1/read", {**wanted, "size_bytes": 6, "stop": 6}) == b"hello\n"
    for lie in ({"size_bytes": 5, "stop": 5}, {"size_bytes": 6, "stop": 6, "version": "another"}):
        with pytest.raises(OSError, match="changed after it was opened"):
            connection.fetch("/v1/read", {**wanted, **lie})
    connection.close()


def test_who_is_not_named_is_refused_in_one_line(nobody: list[str], root: Path) -> None:
    """A daemon that names another user refuses nobody, one without `daemon.readers` has no socket for others, and the
    line says what to do."""
    place = root / "others"
    place.mkdir()
    with folder_daemon_node(place, daemon={"readers": ["12345", "@root"]}) as (node, store):
        (store / "a").write_bytes(b"x")
        node.start()
        refused = orchestra(nobody, node, "cat", "/data/a")
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert b"user nobody (uid 65534) may not read" in refused.stderr
        assert b"daemon.readers" in refused.stderr
        assert refused.stderr.count(b"\n") == 1
        node.stop()
        assert not CacheLayout(node.cache_dir).guest_socket.exists()
        for_owner = [{"path": "/data", "uri": f"file://{store}"}]
        node.reconfigure(mounts=for_owner)
        node.start()
        nowhere = orchestra(nobody, node, "cat", "/data/a")
        assert (nowhere.returncode, nowhere.stdout) == (1, b"")
        assert b"no daemon serves other users" in nowhere.stderr
        assert nowhere.stderr.count(b"\n") == 1


def test_an_impostor_is_not_believed(root: Path) -> None:
    """A socket at that place which is not the owner's daemon's is refused before anything is sent."""
    path = root / "impostor.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        connection = DaemonConnection(str(path), timeout_s=5, owner_uid=NOBODY)
        with pytest.raises(DaemonUnavailableError, match="uid 0 listens there, and not uid 65534"):
            connection.request("GET", "/v1/status")


def test_what_is_in_the_sockets_way_stays(root: Path) -> None:
    """A file of that name is told of, and left alone."""
    place = root / "way"
    place.mkdir()
    (place / "cache.sock").write_bytes(b"mine")
    with folder_daemon_node(place, daemon={"readers": ["*"]}) as (node, _):
        with pytest.raises(OSError, match=r"cache\.sock is in the way"):
            node.start()
        assert (place / "cache.sock").read_bytes() == b"mine"
