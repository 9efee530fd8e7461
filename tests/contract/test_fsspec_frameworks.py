"""What people read with: pandas, pyarrow, torch, and a DataLoader however its workers are made."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pandas
import pyarrow
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from orchestra.errors import NotFoundError
from orchestra.filesystem import OrchestraFileSystem
from tests.support.folder_node import FolderNode, folder_node
from tests.support.samples import Samples, as_they_are

pytestmark = pytest.mark.system

FILES = 40


def content(number: int) -> bytes:
    """Return what file `number` holds."""
    return f"sample {number} ".encode() * 500


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """One node with samples, a partitioned table and a checkpoint."""
    with folder_node(tmp_path_factory.mktemp("node"), freshness="1h") as running:
        for number in range(FILES):
            (running.store / f"{number:03d}.bin").write_bytes(content(number))
        table = pyarrow.table({"id": range(30_000), "part": [n % 3 for n in range(30_000)]})
        pyarrow.parquet.write_table(table, running.store / "table.parquet", row_group_size=5_000)
        pyarrow.dataset.write_dataset(
            table,
            running.store / "parts",
            format="parquet",
            partitioning=pyarrow.dataset.partitioning(pyarrow.schema([("part", pyarrow.int64())]), flavor="hive"),
        )
        torch.save({"weights": torch.arange(100_000), "step": 7}, running.store / "checkpoint.pt")
        (running.store / "t.csv").write_text("a,b\n1,2\n")
        Image.new("RGB", (64, 48), "red").save(running.store / "red.png")
        yield running
    OrchestraFileSystem.clear_instance_cache()


@pytest.fixture
def configured(node: FolderNode, monkeypatch: pytest.MonkeyPatch) -> FolderNode:
    """Let bare URLs mean this node."""
    monkeypatch.setenv("ORCHESTRA_CONFIG", node.config)
    return node


@pytest.mark.usefixtures("configured")
class TestTables:
    def test_pandas_reads_parquet_by_url(self) -> None:
        """The whole table, and one column of it."""
        frame = pandas.read_parquet("orchestra:///data/table.parquet")
        assert (len(frame), frame["id"].sum()) == (30_000, sum(range(30_000)))
        assert list(pandas.read_parquet("orchestra:///data/table.parquet", columns=["part"]).columns) == ["part"]

    def test_pandas_reads_a_csv_by_url(self) -> None:
        """Text goes the same way."""
        assert pandas.read_csv("orchestra:///data/t.csv").to_dict("records") == [{"a": 1, "b": 2}]

    def test_a_pyarrow_dataset_finds_its_partitions(self) -> None:
        """Folders become columns, and a filter reads what matches."""
        dataset = pyarrow.dataset.dataset(
            "/data/parts", filesystem=fsspec.filesystem("orchestra"), format="parquet", partitioning="hive"
        )
        assert dataset.count_rows() == 30_000
        found = dataset.to_table(filter=pyarrow.dataset.field("part") == 1)
        assert found.num_rows == 10_000
        assert set(found["id"].to_pylist()) == set(range(1, 30_000, 3))

    def test_pyarrow_reads_through_its_own_handler(self) -> None:
        """The way Ray Data takes: PyFileSystem over FSSpecHandler."""
        handler = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("orchestra")))
        assert handler.get_file_info("/data/table.parquet").type == pyarrow.fs.FileType.File
        assert handler.get_file_info("/data/nope").type == pyarrow.fs.FileType.NotFound
        assert pyarrow.parquet.read_table("/data/table.parquet", filesystem=handler).num_rows == 30_000


@pytest.mark.usefixtures("configured")
def test_torch_loads_a_checkpoint() -> None:
    """From an open file, with torch's safe loader."""
    with fsspec.open("orchestra:///data/checkpoint.pt") as file:
        loaded = torch.load(file, weights_only=True)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], torch.arange(100_000))


def load(samples: Samples, start_method: str) -> list[bytes]:
    """Return all samples, read by two workers."""
    loader: DataLoader[bytes] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=4,
        num_workers=2,
        collate_fn=as_they_are,
        multiprocessing_context=start_method,
        timeout=90,
    )
    return [data for batch in loader for data in batch]


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
class TestDataLoader:
    def test_workers_read_what_is_there(self, node: FolderNode, start_method: str) -> None:
        """Two workers of each kind, after the parent has read with the same file system."""
        samples = Samples(node.config, [f"/data/{number:03d}.bin" for number in range(FILES)])
        assert samples.fs.cat_file("/data/000.bin") == content(0)
        assert load(samples, start_method) == [content(number) for number in range(FILES)]
        assert samples.fs.cat_file("/data/001.bin") == content(1)

    def test_errors_of_workers_arrive_as_they_are(self, node: FolderNode, start_method: str) -> None:
        """A missing file in a worker is a NotFoundError in the parent, with the path in its text."""
        # Each worker has delivered a batch before one of them fails: torch does not stop half-started workers cleanly.
        paths = ["/data/000.bin"] * 8 + ["/data/nope"] * 4
        with pytest.raises(NotFoundError, match="/data/nope"):
            load(Samples(node.config, paths), start_method)


@pytest.mark.usefixtures("configured")
def test_images_are_decoded_from_open_files() -> None:
    """PIL reads the file object lazily, with seeks."""
    with fsspec.open("orchestra:///data/red.png") as file, Image.open(file) as image:
        assert (image.size, image.getpixel((1, 1))) == ((64, 48), (255, 0, 0))
