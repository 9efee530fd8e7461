"""file_dataset: batches of files through tf.data. Runs where TensorFlow is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.client.shared import close_shared_clients
from orchestra.errors import NotFoundError, UsageError
from orchestra.tensorflow import file_dataset
from tests.support.folder_node import FolderNode, folder_node

FILES = 10


def test_without_tensorflow_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names the package to install."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match="pip install tensorflow-cpu"):
        file_dataset(["a"])


def test_nonsense_is_refused() -> None:
    """A batch of nothing, a shard that there is not."""
    with pytest.raises(UsageError, match="batch_size: expected at least 1, got 0"):
        file_dataset(["a"], batch_size=0)
    for shard in ((2, 2), (0, 0), (-1, 2)):
        with pytest.raises(UsageError, match=r"shard: expected \(index, count\)"):
            file_dataset(["a"], shard=shard)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """Two class folders of five files."""
    pytest.importorskip("tensorflow")
    with folder_node(tmp_path_factory.mktemp("node"), freshness="1h") as running:
        fill(running.store)
        yield running
        close_shared_clients()


def fill(folder: Path) -> None:
    for number in range(FILES):
        path = folder / f"class{number % 2}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{number}\0".encode())


WANTED = [(f"{number}\0".encode(), number % 2) for number in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]


@pytest.mark.system
class TestWithTensorFlow:
    def test_batches_come_in_order_with_their_labels(self, node: FolderNode) -> None:
        """Class folders are labels; contents keep their zeros; the last batch is short unless dropped."""
        dataset = file_dataset("orchestra:///data", batch_size=4, config=node.config)
        batches = [(contents.numpy().tolist(), labels.numpy().tolist()) for contents, labels in dataset]
        assert [len(contents) for contents, _ in batches] == [4, 4, 2]
        assert [pair for contents, labels in batches for pair in zip(contents, labels, strict=True)] == WANTED
        dropped = file_dataset("orchestra:///data", batch_size=4, drop_last=True, config=node.config)
        assert [len(contents) for contents, _ in dropped] == [4, 4]

    def test_a_transform_makes_tensors(self, node: FolderNode) -> None:
        """It sees one file's bytes, and its results are joined to batches."""
        import tensorflow as tf

        dataset = file_dataset(
            "orchestra:///data", transform=lambda data: tf.strings.length(data), batch_size=10, config=node.config
        )
        ((lengths, labels),) = list(dataset)
        assert (lengths.numpy().tolist(), labels.numpy().tolist()) == ([2] * 10, [0] * 5 + [1] * 5)

    def test_shards_are_disjoint_and_together_everything(self, node: FolderNode) -> None:
        """By `shard`, and by tf.data's own."""
        whole = sorted(content for content, _ in WANTED)
        ours = [file_dataset("orchestra:///data", shard=(index, 3), config=node.config) for index in range(3)]
        theirs = [file_dataset(str(node.store), batch_size=1).shard(3, index) for index in range(3)]
        for shards in (ours, theirs):
            found = [content for shard in shards for contents, _ in shard for content in contents.numpy().tolist()]
            assert sorted(found) == whole

    def test_shuffling_is_seeded_and_new_every_epoch(self, node: FolderNode) -> None:
        """Two epochs differ; the same seed gives the same two."""

        def epochs() -> list[list[bytes]]:
            dataset = file_dataset("orchestra:///data", batch_size=10, shuffle=True, seed=1, config=node.config)
            return [contents.numpy().tolist() for _ in range(2) for contents, _ in dataset]

        first, second = epochs()
        assert first != second
        assert sorted(first) == sorted(second) == sorted(content for content, _ in WANTED)
        assert epochs() == [first, second]

    def test_without_labels_there_are_contents_alone(self, node: FolderNode) -> None:
        """A list of paths; a missing one is an error that names it."""
        path = str(node.store / "class0" / "2.txt")
        assert [contents.numpy().tolist() for contents in file_dataset([path])] == [[b"2\0"]]
        with pytest.raises(Exception, match=NotFoundError.__name__):
            list(file_dataset([f"{path}.gone"]))
