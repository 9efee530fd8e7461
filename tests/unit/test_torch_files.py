"""FileDataset: files as people keep them, whole batches in one call, the same in every process."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from orchestra.client.filesets import PackedNames
from orchestra.client.locations import read_many
from orchestra.client.shared import close_shared_clients, shared_client
from orchestra.errors import ConfigError, NotADirectoryPathError, NotFoundError, UsageError
from orchestra.torch import FileDataset, load_tensor
from tests.support.folder_node import FolderNode, folder_node

IDS = [f"id-{number}" for number in range(12)]


def tensor_of(number: int) -> torch.Tensor:
    """What file `number` holds."""
    return torch.arange(5) + number


def fill(folder: Path) -> None:
    """Twelve tensor files, one per ID, and two class folders of three texts each."""
    (folder / "ids").mkdir()
    for number, name in enumerate(IDS):
        torch.save(tensor_of(number), folder / "ids" / f"{name}.pt")
    for kind in ("dog", "cat"):
        (folder / "classes" / kind / "deeper").mkdir(parents=True)
        (folder / "classes" / kind / "b.txt").write_bytes(f"{kind} b".encode())
        (folder / "classes" / kind / "a.txt").write_bytes(f"{kind} a".encode())
        (folder / "classes" / kind / "deeper" / "c.txt").write_bytes(f"{kind} c".encode())
        (folder / "classes" / kind / "notes.md").write_bytes(b"")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """A node whose namespace has the files at /data."""
    with folder_node(tmp_path_factory.mktemp("node"), freshness="1h") as running:
        fill(running.store)
        yield running
        close_shared_clients()


@pytest.fixture(params=["local", pytest.param("namespace", marks=pytest.mark.system)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """The folder of the files and the configuration to read it with: on this machine, and in the namespace."""
    if request.param == "local":
        fill(tmp_path)
        return str(tmp_path), None
    return "orchestra:///data", request.getfixturevalue("node").config


def pickled_size(thing: Any) -> int:
    return len(pickle.dumps(thing))


class TestFindingFiles:
    def test_class_folders_are_labels(self, place: tuple[str, str | None]) -> None:
        """Classes by name, files sorted, folders within a class belong to it, other endings are left out."""
        folder, config = place
        dataset = FileDataset(f"{folder}/classes", suffix=".txt", config=config)
        assert dataset.classes == ("cat", "dog")
        assert [*dataset] == [
            (f"{kind} {n}".encode(), label) for label, kind in enumerate(("cat", "dog")) for n in "abc"
        ]

    def test_partition_and_labels_dictionaries(self, place: tuple[str, str | None]) -> None:
        """IDs of a partition, a dictionary of labels, one tensor file per ID."""
        folder, config = place
        partition = {"train": IDS[:8], "validation": IDS[8:]}
        labels = {name: number % 3 for number, name in enumerate(IDS)}
        train, validation = (
            FileDataset(partition[part], labels, load_tensor, folder=f"{folder}/ids", suffix=".pt", config=config)
            for part in ("train", "validation")
        )
        assert (len(train), len(validation)) == (8, 4)
        sample, label = validation[1]
        assert torch.equal(sample, tensor_of(9))
        assert label == 0
        batches = list(DataLoader(train, batch_size=4))
        assert torch.equal(batches[1][0], torch.stack([tensor_of(number) for number in range(4, 8)]))
        assert batches[1][1].tolist() == [4 % 3, 5 % 3, 6 % 3, 7 % 3]

    def test_a_folder_without_classes_has_labels_by_name_or_none(self, place: tuple[str, str | None]) -> None:
        """Files of a flat folder; labels by the name without its ending; no labels gives samples alone."""
        folder, config = place
        labels = {name: f"label of {name}" for name in IDS}
        dataset = FileDataset(f"{folder}/ids/", labels, suffix=".pt", config=config)
        assert dataset[0][1] == "label of id-0"
        assert dataset[1][1] == "label of id-1"  # sorted by name with its ending: id-1.pt is before id-10.pt
        assert dataset.paths[2] == f"{folder}/ids/id-10.pt"
        alone = FileDataset(f"{folder}/ids", transform=len, config=config)
        assert alone.labels is None
        assert all(size > 500 for size in alone)

    def test_paths_as_they_are(self, tmp_path: Path) -> None:
        """Path objects with a sequence of labels."""
        fill(tmp_path)
        paths = [tmp_path / "classes" / "dog" / "b.txt", tmp_path / "classes" / "cat" / "a.txt"]
        assert [*FileDataset(paths, [1, 0])] == [(b"dog b", 1), (b"cat a", 0)]

    def test_ids_may_be_numbers(self, tmp_path: Path) -> None:
        """The label of ID 7 is found under 7."""
        (tmp_path / "7.txt").write_bytes(b"seven")
        assert FileDataset([7], {7: "odd"}, folder=tmp_path, suffix=".txt")[0] == (b"seven", "odd")

    def test_what_is_missing_is_said(self, place: tuple[str, str | None]) -> None:
        """A folder that is none, an empty choice, a label, a file: each in one sentence that names it."""
        folder, config = place
        with pytest.raises(NotFoundError, match="nowhere"):
            FileDataset(f"{folder}/nowhere", config=config)
        with pytest.raises(NotADirectoryPathError, match=r"id-0\.pt"):
            FileDataset(f"{folder}/ids/id-0.pt", config=config)
        with pytest.raises(UsageError, match=r"holds no files that end in \.jpg"):
            FileDataset(f"{folder}/ids", suffix=".jpg", config=config)
        with pytest.raises(UsageError, match="labels: none for 'id-1'"):
            FileDataset(IDS[:2], {"id-0": 1}, config=config)
        with pytest.raises(UsageError, match="labels: 1 for 2 files"):
            FileDataset(IDS[:2], [1], config=config)
        nonsense: Any
        for nonsense in (1, "ab"):
            with pytest.raises(UsageError, match="labels: expected a dictionary by ID or a label for each"):
                FileDataset(IDS[:2], nonsense, config=config)
        for nonsense in (None, {"train": IDS}):
            with pytest.raises(UsageError, match="expected a folder or a list of paths or IDs"):
                FileDataset(nonsense, config=config)
        with pytest.raises(NotFoundError, match="gone"):
            FileDataset([f"{folder}/gone"], config=config)[0]


def make_index(data: bytes) -> int:
    """A transform that every start method can pickle."""
    return int(load_tensor(data)[0])


@pytest.mark.system
class TestInTheNamespace:
    @pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
    def test_workers_of_every_kind_read(self, node: FolderNode, start_method: str) -> None:
        """Two workers after the parent has read; the order is the sampler's."""
        dataset = FileDataset(
            IDS, range(12), make_index, folder="orchestra:///data/ids", suffix=".pt", config=node.config
        )
        assert dataset[3] == (3, 3)
        loader = DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context=start_method, timeout=90)
        assert [(batch[0].tolist(), batch[1].tolist()) for batch in loader] == [
            (list(range(first, stop)),) * 2 for first, stop in ((0, 5), (5, 10), (10, 12))
        ]

    def test_a_batch_that_is_not_cached_is_one_message(self, tmp_path: Path) -> None:
        """Twelve cold files cost one message, warm ones none."""
        with folder_node(tmp_path, freshness="1h") as cold:
            fill(cold.store)
            dataset = FileDataset("orchestra:///data/ids", transform=make_index, config=cold.config)
            client = shared_client(cold.config)
            sent = client.messages_sent
            first = dataset.__getitems__(list(range(12)))
            assert client.messages_sent == sent + 1
            assert dataset.__getitems__(list(range(12))) == first
            assert client.messages_sent == sent + 1
            assert sorted(first) == list(range(12))
            close_shared_clients()

    def test_both_kinds_of_path_in_one_call(self, node: FolderNode, tmp_path: Path) -> None:
        """Contents come in the order of the paths, wherever each lies."""
        (tmp_path / "here").write_bytes(b"here")
        paths = [str(tmp_path / "here"), "orchestra:///data/classes/cat/a.txt", str(tmp_path / "here")]
        assert read_many(paths, node.config) == [b"here", b"cat a", b"here"]


class TestSmallness:
    def test_a_dataset_pickles_as_its_names(self, tmp_path: Path) -> None:
        """100,000 IDs with labels are their characters and 16 bytes each; what is unpickled is the same."""
        ids = [f"{number:06d}" for number in range(100_000)]
        dataset = FileDataset(ids, range(100_000), load_tensor, folder=tmp_path)
        assert pickled_size(dataset) < 100_000 * (len(f"{tmp_path}/123456") + 16) + 1_000
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.state_dict() == dataset.state_dict()
        assert copy.paths[99_999] == f"{tmp_path}/099999"

    def test_packed_names_are_a_sequence(self) -> None:
        """Any position, slices, other alphabets, names that are no text."""
        names = ["a", "", "zażółć", "\udcff", "last"]
        packed = PackedNames(names)
        assert [*packed] == packed[:] == names
        assert (packed[-1], packed[1:3], len(packed)) == ("last", ["", "zażółć"], 5)
        for index in (5, -6):
            with pytest.raises(IndexError, match="of 5 names"):
                packed[index]


def test_a_checkpoint_of_another_dataset_is_refused(tmp_path: Path) -> None:
    """The same files and labels in the same order load; anything else raises."""
    state = FileDataset(IDS, range(12)).state_dict()
    FileDataset(IDS, range(12)).load_state_dict(state)
    for ids, labels in ((IDS[::-1], range(12)), (IDS, range(1, 13)), (IDS[:-1], range(11)), (IDS, None)):
        with pytest.raises(UsageError, match="another dataset"):
            FileDataset(ids, labels).load_state_dict(state)


def test_a_tensor_file_runs_no_code() -> None:
    """load_tensor refuses what is not plain data."""
    buffer = io.BytesIO()
    torch.save({"call": print}, buffer)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_tensor(buffer.getvalue())


def test_a_wrong_configuration_is_told_when_the_dataset_is_made(tmp_path: Path) -> None:
    """And not by each worker: the client is made before workers are, which inherit it by fork."""
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        FileDataset(["orchestra:///data/a"], config=str(tmp_path / "missing.toml"))
