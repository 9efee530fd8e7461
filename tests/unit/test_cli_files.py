"""`orchestra ls, cat, stat, du, cp` over a client of a local folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestra.cli.main import main
from orchestra.values import Entry, EntryKind
from tests.support.folder_client import FolderClient


class NodeFolder(FolderClient):
    """The folder with what a node's client has besides: its configuration, what is cached, a daemon to ask."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = SimpleNamespace(cache=SimpleNamespace(dir=Path("/cache")), cluster=None)
        self.cached: dict[str, int] = {}
        self.mounts = [
            {"path": "/", "uris": ["file:///root"]},
            {"path": "/train", "uris": ["s3://bucket/train", "sftp://me:canary-7f3@host/x"]},
        ]

    def cached_bytes(self, entry: Entry) -> int:
        return self.cached.get(entry.path, 0)

    def daemon_request(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answers: dict[str, dict[str, Any]] = {
            "/v1/mounts": {"mounts": self.mounts},
            "/v1/pins?sizes=no": {"pins": [{"path": "/train/"}]},
        }
        assert method == "GET"
        return answers[route]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with a file of 1,536 bytes, a nested one of 3, and one whose name has a newline."""
    folder = tmp_path / "store"
    (folder / "train" / "cats").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"ab" * 768)
    (folder / "train" / "cats" / "b.txt").write_bytes(b"cat")
    (folder / "train" / "new\nline").write_bytes(b"")
    for path in folder.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    return folder


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFolder:
    """Let the command line use the folder."""
    client = NodeFolder(store)
    monkeypatch.setattr("orchestra.client.connect.connect", lambda config: client)
    monkeypatch.setattr("orchestra.client.asking.DaemonAsker.request", lambda self, *args: client.daemon_request(*args))
    return client


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a successful command prints."""
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.usefixtures("client")
class TestLs:
    def test_names_are_listed_in_order(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Folders end with a slash; without a path the root is listed."""
        assert run(capsys, "ls") == "a.bin\ntrain/\n"

    def test_a_file_lists_itself(self, capsys: pytest.CaptureFixture[str]) -> None:
        """By its path, as it was asked for."""
        assert run(capsys, "ls", "/a.bin") == "/a.bin\n"

    def test_long_lines_show_size_and_time(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Sizes are for people, folders have none."""
        lines = run(capsys, "ls", "-l").splitlines()
        assert [line.split()[0:3] for line in lines] == [["-", "1.5", "KiB"], ["d", "-", "2001-09-09"]]
        assert lines[0].endswith("  a.bin")

    def test_recursive_listings_are_headed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Each folder below follows with its path, and a newline in a name stays on its line."""
        expected = "/:\na.bin\ntrain/\n\n/train:\ncats/\nnew\\nline\n\n/train/cats:\nb.txt\n"
        assert run(capsys, "ls", "-R", "/") == expected

    def test_json_is_exact(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Names, sizes and times come unrounded and unescaped."""
        found = json.loads(run(capsys, "ls", "-R", "--json", "/train"))
        assert [entry["path"] for entry in found] == ["/train/cats", "/train/cats/b.txt", "/train/new\nline"]
        assert found[1]["size_bytes"] == 3
        assert found[1]["mtime_ns"] == 10**18
        assert found[1]["type"] == "file"
        assert found[1]["version"]

    def test_what_is_not_there_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, status 1."""
        assert main(["ls", "/nope"]) == 1
        assert capsys.readouterr() == ("", "orchestra: no such file: /nope\n")


class TestCat:
    def test_files_are_written_one_after_the_other(
        self, client: NodeFolder, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        """Exactly their bytes, and every file is closed again."""
        assert main(["cat", "/train/cats/b.txt", "/a.bin"]) == 0
        assert capfdbinary.readouterr().out == b"cat" + b"ab" * 768
        assert client.handles_open == 0

    def test_large_files_come_in_pieces(
        self, client: NodeFolder, store: Path, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        """A file of over two pieces arrives whole."""
        data = os.urandom((9 << 20) + 1)
        (store / "large").write_bytes(data)
        assert main(["cat", "/large"]) == 0
        assert capfdbinary.readouterr().out == data

    @pytest.mark.usefixtures("client")
    def test_a_folder_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One line, status 1."""
        assert main(["cat", "/train"]) == 1
        assert capsys.readouterr().err == "orchestra: /train is a directory\n"


class TestStat:
    def test_a_file_says_how_much_of_it_is_cached_and_where(
        self, client: NodeFolder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Size, version, cached bytes and their share, node and store."""
        client.cached["/a.bin"] = 768
        lines = dict(line.split(":", 1) for line in run(capsys, "stat", "/a.bin").splitlines())
        assert lines["size"].strip() == "1.5 KiB (1536 bytes)"
        assert lines["cached"].strip() == "768 B (50 %)"
        assert lines["where"].strip() == "this node (/cache)"
        assert lines["store"].strip() == "file:///root (mounted at /)"
        assert "pinned" not in lines

    def test_json_is_exact(self, client: NodeFolder, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing cached is no place; no password of a store is shown."""
        found = json.loads(run(capsys, "stat", "--json", "/train/cats/b.txt"))
        assert (found["path"], found["size_bytes"], found["type"]) == ("/train/cats/b.txt", 3, "file")
        assert (found["cached_bytes"], found["cached_percent"], found["where"]) == (0, 0, [])
        assert (found["mount"], found["uris"]) == ("/train", ["s3://bucket/train", "sftp://me:***@host/x"])
        assert found["pinned"] is True

    def test_a_folder_is_not_said_to_be_uncached(self, client: NodeFolder, capsys: pytest.CaptureFixture[str]) -> None:
        """What of its files is cached is for `du` to say; here it is unknown."""
        client.cached["/train/cats/b.txt"] = 3
        found = json.loads(run(capsys, "stat", "--json", "/train"))
        assert (found["type"], found["cached_bytes"], found["cached_percent"]) == ("directory", None, None)


class TestDu:
    def test_folders_are_summed_up(self, client: NodeFolder, capsys: pytest.CaptureFixture[str]) -> None:
        """One row for each folder, what it holds before itself, with what is cached of it."""
        client.cached["/train/cats/b.txt"] = 3
        rows = json.loads(run(capsys, "du", "--json", "/"))
        assert [(row["path"], row["files"], row["bytes"], row["cached_bytes"]) for row in rows] == [
            ("/train/cats", 1, 3, 3),
            ("/train", 2, 3, 3),
            ("/", 3, 1539, 3),
        ]

    @pytest.mark.usefixtures("client")
    def test_a_summary_is_one_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        """-s leaves the total alone."""
        lines = run(capsys, "du", "-s", "/").splitlines()
        assert len(lines) == 2
        assert lines[1].split() == ["1.5", "KiB", "0", "B", "0", "%", "3", "/"]

    @pytest.mark.usefixtures("client")
    def test_a_file_is_its_own_total(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A path may be a file."""
        assert json.loads(run(capsys, "du", "--json", "/a.bin")) == [
            {"path": "/a.bin", "files": 1, "bytes": 1536, "cached_bytes": 0}
        ]


class TestCp:
    def test_a_file_is_copied_to_a_name_or_into_a_folder(
        self, client: NodeFolder, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As `cp` does it; nothing else is left behind."""
        target = tmp_path / "out"
        target.mkdir()
        run(capsys, "cp", "/a.bin", str(target / "b.bin"))
        run(capsys, "cp", "orchestra:///a.bin", str(target))
        assert sorted(path.name for path in target.iterdir()) == ["a.bin", "b.bin"]
        assert (target / "a.bin").read_bytes() == (target / "b.bin").read_bytes() == (store / "a.bin").read_bytes()
        assert client.handles_open == 0

    @pytest.mark.usefixtures("client")
    def test_a_tree_is_copied(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """-r copies to a new folder, and into one that exists."""
        run(capsys, "cp", "-r", "/train", str(tmp_path / "new"))
        (tmp_path / "old").mkdir()
        run(capsys, "cp", "-r", "/train", str(tmp_path / "old"))
        wanted = sorted(path.relative_to(store / "train") for path in (store / "train").rglob("*"))
        for copy in (tmp_path / "new", tmp_path / "old" / "train"):
            assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == wanted
            assert (copy / "cats" / "b.txt").read_bytes() == b"cat"

    @pytest.mark.usefixtures("client")
    def test_a_folder_needs_r(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Without -r a folder is refused, and nothing is made."""
        assert main(["cp", "/train", str(tmp_path / "out")]) == 1
        assert "orchestra cp -r" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_failed_copy_leaves_the_old_file(
        self, client: NodeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that changes while it is copied ends in an error, without a partial or a temporary file."""
        target = tmp_path / "out"
        target.mkdir()
        (target / "a.bin").write_bytes(b"old")
        opened = client.open

        def open_then_rewrite(path: str, *, entry: Entry | None = None) -> Any:
            handle = opened(path, entry=entry)
            Path(client.local(path)).write_bytes(b"rewritten")
            return handle

        monkeypatch.setattr(client, "open", open_then_rewrite)
        assert main(["cp", "/a.bin", str(target)]) == 1
        assert "changed after it was opened" in capsys.readouterr().err
        assert [path.name for path in target.iterdir()] == ["a.bin"]
        assert (target / "a.bin").read_bytes() == b"old"

    @pytest.mark.usefixtures("client")
    def test_a_device_is_written_to_and_not_replaced(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """`cp /a.bin /dev/null` leaves the device what it is."""
        device = tmp_path / "null"
        device.symlink_to(os.devnull)
        run(capsys, "cp", "/a.bin", str(device))
        assert device.is_symlink()
        assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)

    def test_a_name_never_leaves_the_destination(
        self, client: NodeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A key of a store that is called `..` is refused instead of written above the destination."""
        client.extra = [Entry("/train/cats/../../../evil", EntryKind.FILE, 4, 0, "v")]
        assert main(["cp", "-r", "/train/cats", str(tmp_path / "out" / "in")]) == 1
        (tmp_path / "out").mkdir()
        assert main(["cp", "-r", "/train/cats", str(tmp_path / "out" / "in")]) == 1
        assert "refusing to copy /train/cats/../../../evil" in capsys.readouterr().err
        assert not list(tmp_path.rglob("evil"))

    def test_what_cannot_be_copied_does_not_stop_the_rest(
        self, client: NodeFolder, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """-r says each failure in a line, copies all else, and ends with status 1 and the count."""
        (store / "train" / "dogs").mkdir()
        (store / "train" / "dogs" / "d.txt").write_bytes(b"dog")
        client.extra = [Entry("/train/gone", EntryKind.FILE, 4, 0, "v")]
        out = tmp_path / "out"
        (out / "train").mkdir(parents=True)
        (out / "train" / "cats").write_text("a file is in the way")
        assert main(["cp", "-r", "/train", str(out)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1] == f"orchestra: 5 files or folders of /train could not be copied; the rest is in {out}/train"
        assert f"orchestra: cannot make the folder {out}/train/cats: File exists" in lines
        assert len(lines) == 6
        assert (out / "train" / "dogs" / "d.txt").read_bytes() == b"dog"
        assert (out / "train" / "new\nline").exists()

    @pytest.mark.usefixtures("client")
    def test_a_full_disk_ends_a_copy_at_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What every other file would meet as well is said once."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("orchestra.cli.copying.export_file", full)
        assert main(["cp", "-r", "/train", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.endswith("No space left on device\n")

    @pytest.mark.usefixtures("client")
    def test_a_local_problem_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A folder that is missing on this side is one line with its path."""
        assert main(["cp", "/a.bin", str(tmp_path / "no" / "a.bin")]) == 1
        assert capsys.readouterr().err == f"orchestra: cannot write {tmp_path}/no/a.bin: No such file or directory\n"

    @pytest.mark.usefixtures("client")
    def test_a_local_source_is_recognized(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A path that is not in the namespace but on this machine is an attempt to write."""
        (tmp_path / "mine").write_text("x")
        assert main(["cp", str(tmp_path / "mine"), "/train"]) == 1
        assert "cannot write to it" in capsys.readouterr().err
