"""What the fsspec face promises beyond fsspec's own suites, over a real node."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from orchestra.errors import IsADirectoryPathError, NotFoundError, StaleObjectError
from orchestra.filesystem import FILE_BUFFER_SIZE_BYTES, OrchestraFile, OrchestraFileSystem
from tests.support.folder_node import FolderNode, folder_node

pytestmark = pytest.mark.system

LARGE = bytes(range(256)) * 40_000  # 10,240,000 bytes: three blocks, the last one not full


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """One node with a small tree."""
    with folder_node(tmp_path_factory.mktemp("node")) as running:
        (running.store / "dir" / "sub").mkdir(parents=True)
        (running.store / "large.bin").write_bytes(LARGE)
        (running.store / "empty").write_bytes(b"")
        (running.store / "lines.txt").write_text("one\ntwo\nthree\n")
        for number in range(5):
            (running.store / "dir" / f"{number}.bin").write_bytes(bytes([number]) * (number + 1))
        (running.store / "dir" / "sub" / "deep.bin").write_bytes(b"deep")
        (running.store / "new\nline").write_bytes(b"n")
        yield running
    OrchestraFileSystem.clear_instance_cache()


@pytest.fixture
def fs(node: FolderNode) -> OrchestraFileSystem:
    """The face, by fsspec's own name for it."""
    fs = fsspec.filesystem("orchestra", config=node.config)
    assert isinstance(fs, OrchestraFileSystem)
    return fs


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        ["/data/dir", "/data/dir/", "orchestra:///data/dir", "orchestra://data/dir", "data/dir", Path("/data/dir")],
    )
    def test_a_path_may_be_written_in_many_ways(self, fs: OrchestraFileSystem, path: str | Path) -> None:
        """With and without the protocol, with and without slashes at the ends."""
        assert fs.info(path)["name"] == "/data/dir"  # type: ignore[arg-type]

    def test_the_root_is_a_directory(self, fs: OrchestraFileSystem) -> None:
        """ "orchestra://" is the namespace itself."""
        assert fs.info("orchestra://")["name"] == "/"
        assert fs.ls("orchestra:///", detail=False) == ["/data"]

    @pytest.mark.parametrize("path", [None, b"/data", 3])
    def test_what_is_no_path_is_a_type_error(self, fs: OrchestraFileSystem, path: object) -> None:
        """Row 91: the argument is named."""
        with pytest.raises(TypeError, match="path: expected str"):
            fs.info(path)  # type: ignore[arg-type]

    def test_dots_are_refused(self, fs: OrchestraFileSystem) -> None:
        """Row 33: `..` is a ValueError, and nothing is opened."""
        with pytest.raises(ValueError, match=r"'\.\.' is not allowed"):
            fs.cat_file("/data/dir/../../etc/passwd")


class TestLooking:
    def test_info_describes_a_file(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """Size, time and version are the store's."""
        info = fs.info("/data/large.bin")
        found = (node.store / "large.bin").stat()
        assert (info["name"], info["type"], info["size"]) == ("/data/large.bin", "file", len(LARGE))
        assert info["mtime"] == pytest.approx(found.st_mtime)
        assert info["version"]
        assert fs.modified("/data/large.bin") == datetime.fromtimestamp(found.st_mtime_ns / 1e9, UTC)

    def test_listings_are_sorted(self, fs: OrchestraFileSystem) -> None:
        """By name, directories among files, strange names exactly."""
        names = [info["name"] for info in fs.ls("/data")]
        assert names == [f"/data/{name}" for name in ("dir", "empty", "large.bin", "lines.txt", "new\nline")]
        assert fs.ls("/data/empty", detail=False) == ["/data/empty"]

    def test_find_walk_and_glob_agree(self, fs: OrchestraFileSystem) -> None:
        """Three ways to the same files."""
        files = [f"/data/dir/{number}.bin" for number in range(5)] + ["/data/dir/sub/deep.bin"]
        assert fs.find("/data/dir") == files
        assert sorted(f"{top}/{name}" for top, _, names in fs.walk("/data/dir") for name in names) == files
        assert fs.glob("/data/dir/**/*.bin") == files
        assert fs.glob("/data/dir/[1-3].bin") == files[1:4]
        assert fs.find("/data/dir", maxdepth=1) == files[:5]
        assert fs.find("/data/dir", withdirs=True)[0] == "/data/dir"
        assert fs.find("/data/dir/sub/deep.bin") == ["/data/dir/sub/deep.bin"]
        assert fs.find("/data/nope") == []
        assert fs.du("/data/dir") == 1 + 2 + 3 + 4 + 5 + 4

    def test_what_is_not_there(self, fs: OrchestraFileSystem) -> None:
        """Neither exists, nor is a file or a directory; asking more raises FileNotFoundError."""
        assert not fs.exists("/data/nope")
        assert not fs.isfile("/data/nope")
        assert not fs.isdir("/data/lines.txt/below")
        for ask in (fs.info, fs.ls, fs.cat_file, fs.open):
            with pytest.raises(FileNotFoundError):
                ask("/data/nope")

    def test_kinds(self, fs: OrchestraFileSystem) -> None:
        """A directory is no file, and cannot be opened."""
        assert fs.isdir("/data/dir")
        assert not fs.isfile("/data/dir")
        assert fs.isfile("/data/empty")
        with pytest.raises(IsADirectoryPathError):
            fs.open("/data/dir")

    def test_a_version_has_a_key(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """ukey and checksum change when the file does, and only then."""
        path = node.store / "changing"
        path.write_bytes(b"first")
        before = (fs.ukey("/data/changing"), fs.checksum("/data/changing"))
        assert before == (fs.ukey("/data/changing"), fs.checksum("/data/changing"))
        path.write_bytes(b"second version")
        after = (fs.ukey("/data/changing"), fs.checksum("/data/changing"))
        path.unlink()
        assert after[0] != before[0]
        assert after[1] != before[1]


class TestReading:
    @pytest.mark.parametrize(
        ("start", "end"),
        [
            (None, None),
            (0, 10),
            (5, None),
            (-10, None),
            (None, -10),
            (-20, -10),
            (10, 5),
            (10**7, 10**9),
            (10**9, None),
        ],
    )
    def test_a_part_is_the_slice(self, fs: OrchestraFileSystem, start: int | None, end: int | None) -> None:
        """cat_file(start, end) is what slicing the bytes gives, also for negative and far numbers."""
        assert fs.cat_file("/data/large.bin", start, end) == LARGE[start:end]

    def test_many_files_come_in_one_call(self, fs: OrchestraFileSystem) -> None:
        """A list, a pattern or `recursive` gives a dict; a single path its bytes."""
        wanted = {f"/data/dir/{number}.bin": bytes([number]) * (number + 1) for number in range(5)}
        assert fs.cat(list(wanted)) == wanted
        assert fs.cat("/data/dir/?.bin") == wanted
        assert fs.cat("/data/dir", recursive=True) == wanted | {"/data/dir/sub/deep.bin": b"deep"}
        assert fs.cat("/data/dir/2.bin") == wanted["/data/dir/2.bin"]

    def test_errors_of_one_among_many(self, fs: OrchestraFileSystem) -> None:
        """Raised, left out, or in place of the bytes, as asked for."""
        paths = ["/data/dir/0.bin", "/data/nope"]
        with pytest.raises(NotFoundError):
            fs.cat(paths)
        assert fs.cat(paths, on_error="omit") == {"/data/dir/0.bin": b"\0"}
        assert isinstance(fs.cat(paths, on_error="return")["/data/nope"], NotFoundError)
        with pytest.raises(ValueError, match="on_error"):
            fs.cat(paths, on_error="ignore")

    def test_ranges_of_many_files(self, fs: OrchestraFileSystem) -> None:
        """In order, each as cat_file gives it; numbers may stand for all."""
        paths = ["/data/large.bin", "/data/dir/4.bin", "/data/large.bin", "/data/nope"]
        found = fs.cat_ranges(paths, [5, 0, -7, 0], [9, 2, None, 1])
        assert found[:3] == [LARGE[5:9], b"\4\4", LARGE[-7:]]
        assert isinstance(found[3], FileNotFoundError)
        assert fs.cat_ranges(paths[:2], 0, 3) == [LARGE[:3], b"\4\4\4"]
        with pytest.raises(FileNotFoundError):
            fs.cat_ranges(paths, 0, 1, on_error="raise")
        with pytest.raises(ValueError, match="as many"):
            fs.cat_ranges(paths, [0], 1)

    def test_warm_reads_send_no_message(self, node: FolderNode, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Once cached and fresh, cat_file, cat_ranges, info, find and open ask nobody."""
        with folder_node(tmp_path_factory.mktemp("warm"), freshness="1h") as warm:
            (warm.store / "a").write_bytes(LARGE)
            (warm.store / "b").write_bytes(b"b")
            fs = OrchestraFileSystem(config=warm.config)

            def read_all() -> None:
                assert fs.find("/data") == ["/data/a", "/data/b"]
                assert fs.cat_file("/data/a") == LARGE
                assert fs.cat(["/data/a", "/data/b"])["/data/b"] == b"b"
                assert fs.cat_ranges(["/data/a", "/data/b"], 0, 1) == [b"\0", b"b"]
                with fs.open("/data/a") as file:
                    assert file.read() == LARGE

            read_all()
            sent = fs.client.messages_sent
            assert sent > 0
            read_all()
            assert fs.client.messages_sent == sent

    def test_get_file_can_write_to_an_open_file(self, fs: OrchestraFileSystem) -> None:
        """fsspec allows a file object as the destination."""
        target = io.BytesIO()
        fs.get_file("/data/large.bin", target)
        assert target.getvalue() == LARGE


class TestOpenFiles:
    def test_a_file_reads_like_a_local_one(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """The same calls on both give the same answers."""
        with fs.open("/data/large.bin") as file, (node.store / "large.bin").open("rb") as local:
            for step in (
                lambda f: f.read(10),
                lambda f: f.seek(-5, 2),
                lambda f: f.read(),
                lambda f: f.read(1),
                lambda f: f.seek(4_194_300),
                lambda f: f.read(10),
                lambda f: f.seek(3, 1),
                lambda f: f.tell(),
                lambda f: f.readline(),
                lambda f: f.seek(20_000_000),
                lambda f: f.read(5),
                lambda f: (f.readable(), f.seekable(), f.writable(), f.closed),
            ):
                assert step(file) == step(local)

    def test_large_reads_skip_the_buffer(self, fs: OrchestraFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        """readinto of a large array asks for exactly its length, once; small reads ask for a bufferful."""
        with fs.open("/data/large.bin") as file:
            asked: list[int] = []
            raw = file.raw
            original = raw._handle.readinto

            class Watched:
                entry = raw._handle.entry

                def readinto(self, offset: int, buffer: memoryview) -> int:
                    asked.append(len(buffer))
                    return int(original(offset, buffer))

                def close(self) -> None:
                    return None

            handle = raw._handle
            raw._handle = Watched()
            target = bytearray(5_000_000)
            assert file.readinto(target) == 5_000_000
            assert asked == [5_000_000]
            assert file.read(10) == LARGE[5_000_000:5_000_010]
            assert asked[1:] == [FILE_BUFFER_SIZE_BYTES]
            assert file.read(10) == LARGE[5_000_010:5_000_020]
            assert len(asked) == 2
            raw._handle = handle
            assert bytes(target) == LARGE[:5_000_000]

    def test_text_and_compression_work_as_fsspec_does_them(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """`r` decodes, `compression` inflates."""
        import gzip

        with fs.open("/data/lines.txt", "r") as file:
            assert file.read().split() == ["one", "two", "three"]
        (node.store / "z.gz").write_bytes(gzip.compress(b"packed"))
        with fs.open("/data/z.gz", compression="infer") as file:
            assert file.read() == b"packed"
        (node.store / "z.gz").unlink()

    def test_a_wrong_mode_is_a_value_error(self, fs: OrchestraFileSystem) -> None:
        """Row 91."""
        with pytest.raises(ValueError, match="mode: expected 'rb', got 'zb'"):
            fs.open("/data/empty", "z")

    def test_a_closed_file_says_so(self, fs: OrchestraFileSystem) -> None:
        """Reading it is a ValueError, closing it again is nothing."""
        file = fs.open("/data/lines.txt")
        file.close()
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read()

    def test_a_file_pickles_with_its_position(self, fs: OrchestraFileSystem) -> None:
        """What arrives is open at the same place."""
        with fs.open("/data/lines.txt") as file:
            file.seek(4)
            with pickle.loads(pickle.dumps(file)) as again:
                assert isinstance(again, OrchestraFile)
                assert again.read(3) == b"two"
                assert again.full_name == "orchestra:///data/lines.txt"
                assert again.size == 14

    def test_a_replaced_file_is_never_mixed(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """R1, R2: an open file of a version that is gone raises StaleObjectError for what was not cached."""
        path = node.store / "replaced"
        path.write_bytes(b"1" * 9_000_000)
        with fs.open("/data/replaced") as file:
            assert file.read(1) == b"1"
            path.write_bytes(b"2" * 9_000_001)
            file.seek(8_900_000)
            with pytest.raises(StaleObjectError):
                file.read(10)
        assert fs.cat_file("/data/replaced", 0, 1) == b"2"
        path.unlink()


class TestInstances:
    def test_it_pickles_by_its_options(self, fs: OrchestraFileSystem) -> None:
        """A pickle holds the path of the configuration and no client."""
        again = pickle.loads(pickle.dumps(fs))
        assert again == fs
        assert again.storage_options == {"config": fs.storage_options["config"]}
        assert again.cat_file("/data/dir/1.bin") == b"\1\1"
        assert OrchestraFileSystem.from_json(fs.to_json()) == fs

    def test_instances_of_one_process_share_one_client(self, fs: OrchestraFileSystem, node: FolderNode) -> None:
        """fsspec makes an instance per thread; they do not each hold connections and maps."""
        other = OrchestraFileSystem(config=node.config, skip_instance_cache=True)
        assert other is not fs
        assert other.client is fs.client

    def test_a_url_is_enough(self, node: FolderNode, monkeypatch: pytest.MonkeyPatch) -> None:
        """The entry point registers the protocol, and the configuration is found as the command line finds it."""
        monkeypatch.setenv("ORCHESTRA_CONFIG", node.config)
        with fsspec.open("orchestra:///data/lines.txt", "r") as file:
            assert file.readline() == "one\n"

    def test_a_removed_working_folder_is_no_error(
        self, node: FolderNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process whose folder is gone still reads, as it does with any file system."""
        folder = tmp_path / "gone"
        folder.mkdir()
        monkeypatch.chdir(folder)
        folder.rmdir()
        assert OrchestraFileSystem(config=node.config, skip_instance_cache=True).cat_file("/data/dir/0.bin") == b"\0"

    def test_importing_the_face_is_cheap(self) -> None:
        """It brings fsspec, and neither a store's library nor a server nor torch."""
        code = "import sys, orchestra.filesystem; print(*sys.modules)"
        modules = set(
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.decode().split()
        )
        assert "fsspec" in modules
        assert not modules & {"obstore", "aiohttp", "torch", "pyarrow", "pandas", "s3fs", "orchestra.client.node"}
