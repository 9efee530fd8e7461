"""TensorBatches: DataLoader's own batches, from memory, files and the namespace, and what is larger than memory."""

from __future__ import annotations

import gzip
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from orchestra.client.shared import close_shared_clients
from orchestra.errors import NotFoundError, UsageError
from orchestra.torch import TensorBatches, prefetch_to_device
from tests.support.folder_node import FolderNode, folder_node

ROWS = 203


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """203 rows of four features, and a target."""
    features = torch.arange(ROWS * 4, dtype=torch.float32).reshape(ROWS, 4)
    return features, torch.arange(ROWS, dtype=torch.float32)


def same(one: Any, other: Any) -> bool:
    """Whether two epochs are alike, batch for batch."""
    pairs = list(zip(one, other, strict=True))
    assert pairs
    return all(
        type(a) is type(b) and len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in pairs
    )


class TestLikeDataLoader:
    @pytest.mark.parametrize("batch_size", [1, 7, 64, ROWS, 1000])
    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("shuffle", [False, True])
    def test_the_batches_are_dataloaders(
        self, tensors: tuple[torch.Tensor, torch.Tensor], batch_size: int, drop_last: bool, shuffle: bool
    ) -> None:
        """Three epochs with one generator each, shuffled or not, dropping the last or not."""
        options: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last, "shuffle": shuffle}
        ours = TensorBatches(*tensors, **options, generator=torch.Generator().manual_seed(5))
        theirs = DataLoader(TensorDataset(*tensors), **options, generator=torch.Generator().manual_seed(5))
        assert len(ours) == len(theirs)
        for _ in range(3):
            mine, wanted = list(ours), list(theirs)
            assert len(mine) == len(wanted) == len(ours)
            assert not wanted or same(mine, wanted)

    def test_torchs_own_seed_decides_where_there_is_no_generator(
        self, tensors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """torch.manual_seed gives the batches, and leaves the default generator, as with DataLoader."""
        torch.manual_seed(11)
        wanted = [list(DataLoader(TensorDataset(*tensors), batch_size=16, shuffle=True)) for _ in range(2)]
        after = torch.rand(1)
        torch.manual_seed(11)
        batches = TensorBatches(*tensors, batch_size=16, shuffle=True)
        assert all(same(batches, epoch) for epoch in wanted)
        assert torch.equal(torch.rand(1), after)

    def test_many_gathers_make_one_epoch(self) -> None:
        """A table of many times what one gather takes comes out whole, in the permutation's order."""
        table = torch.arange(40_000, dtype=torch.float64)[:, None].repeat(1, 32)
        batches = list(TensorBatches(table, batch_size=100, shuffle=True))
        assert {len(batch[0]) for batch in batches} == {100}
        column = torch.cat([batch[0][:, 0] for batch in batches])
        assert not torch.equal(column, table[:, 0])
        assert torch.equal(column.sort().values, table[:, 0])

    def test_unshuffled_batches_are_views_and_shuffled_ones_are_not(
        self, tensors: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """A slice is the table's own memory; a gather is the caller's."""
        for shuffle in (False, True):
            first = next(iter(TensorBatches(*tensors, batch_size=8, shuffle=shuffle)))[0]
            assert (first.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()) is not shuffle


def frame() -> pandas.DataFrame:
    """A table of three features and a label."""
    generator = np.random.default_rng(0)
    made = pandas.DataFrame({f"f{n}": generator.random(ROWS) for n in range(3)})
    made["label"] = np.arange(ROWS) % 2
    return made


def write(table: pandas.DataFrame, path: Path) -> None:
    """Write the table in the form that the path's name asks for."""
    if path.suffix == ".parquet":
        table.to_parquet(path, row_group_size=20)
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(pyarrow.Table.from_pandas(table), path, chunksize=20)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_bytes(gzip.compress(table.to_csv(index=False).encode()))


class TestFiles:
    @pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.csv", "t.csv.gz"])
    def test_a_table_gives_features_and_target(self, tmp_path: Path, name: str) -> None:
        """All columns but the target are a matrix of floats; the target comes behind it."""
        table = frame()
        write(table, tmp_path / name)
        features, target = next(iter(TensorBatches(tmp_path / name, batch_size=50, target="label")))
        assert torch.equal(features, torch.tensor(table[["f0", "f1", "f2"]].to_numpy(np.float32)[:50]))
        assert torch.equal(target, torch.tensor(table["label"].to_numpy(np.float32)[:50]))

    def test_columns_are_taken_as_named(self, tmp_path: Path) -> None:
        """`features` decides which and in what order, `dtype` of what type, several files are one table."""
        table = frame()
        for part in ("a", "b"):
            write(table, tmp_path / f"{part}.parquet")
        batches = TensorBatches(
            [tmp_path / "a.parquet", tmp_path / "b.parquet"],
            batch_size=300,
            features=["f2", "f0"],
            dtype=torch.float64,
        )
        (matrix,) = batches.tensors
        twice = np.concatenate([table[["f2", "f0"]].to_numpy()] * 2)
        assert (batches.row_count, len(batches)) == (2 * ROWS, 2)
        assert torch.equal(matrix, torch.from_numpy(twice))

    @pytest.mark.parametrize("buffer_rows", [None, 1000])
    def test_files_of_one_table_may_differ_in_the_order_of_their_columns(
        self, tmp_path: Path, buffer_rows: int | None
    ) -> None:
        """And in their types; a column that one of them lacks is an error that names the file."""
        table = frame()
        write(table, tmp_path / "a.parquet")
        write(table[["label", "f2", "f0", "f1"]].round().astype({"f0": int}), tmp_path / "b.parquet")
        write(table.drop(columns="f1"), tmp_path / "c.parquet")
        options: dict[str, Any] = {"batch_size": 2 * ROWS, "target": "label", "buffer_rows": buffer_rows}
        ((features, target),) = TensorBatches([tmp_path / "a.parquet", tmp_path / "b.parquet"], **options)
        wanted = pandas.concat([table, table.round()])
        assert torch.equal(features, torch.tensor(wanted[["f0", "f1", "f2"]].to_numpy(np.float32)))
        assert torch.equal(target, torch.tensor(wanted["label"].to_numpy(np.float32)))
        with pytest.raises(UsageError, match=r"c\.parquet: no column 'f1'"):
            list(TensorBatches([tmp_path / "a.parquet", tmp_path / "c.parquet"], **options))

    def test_missing_values_are_nan_or_an_error(self, tmp_path: Path) -> None:
        """In fractions; whole numbers have nothing to say it with."""
        pandas.DataFrame({"x": [1.0, None, 3.0]}).to_csv(tmp_path / "t.csv", index=False)
        (matrix,) = TensorBatches(tmp_path / "t.csv").tensors
        assert matrix[:, 0].isnan().tolist() == [False, True, False]
        with pytest.raises(UsageError, match="'x' has missing values, which int64 cannot hold"):
            TensorBatches(tmp_path / "t.csv", dtype=torch.int64)

    def test_an_npy_file_is_mapped_and_never_changed(self, tmp_path: Path) -> None:
        """Writing into a batch of a mapped array changes the batch alone."""
        array = np.arange(24, dtype=np.float32).reshape(6, 4)
        np.save(tmp_path / "x.npy", array)
        for (batch,) in TensorBatches(tmp_path / "x.npy", batch_size=2):
            batch.zero_()
        assert np.array_equal(np.load(tmp_path / "x.npy"), array)

    def test_what_is_wrong_with_a_file_is_said(self, tmp_path: Path) -> None:
        """A missing file, a missing column, a column of text or of times, an array where a table is meant."""
        table = frame().assign(text="x", when=pandas.Timestamp("2026-01-01"))
        write(table, tmp_path / "t.parquet")
        np.save(tmp_path / "x.npy", np.zeros(3))
        with pytest.raises(NotFoundError, match=r"gone\.csv"):
            TensorBatches(tmp_path / "gone.csv")
        with pytest.raises(NotFoundError, match=r"gone\.npy"):
            TensorBatches(tmp_path / "gone.npy")
        with pytest.raises(UsageError, match="no column 'f9'; there are f0, f1"):
            TensorBatches(tmp_path / "t.parquet", features=["f9"])
        for options in ({}, {"buffer_rows": 10}):
            with pytest.raises(UsageError, match=r"t\.parquet: no column 'y'; there are f0, f1"):
                TensorBatches(tmp_path / "t.parquet", target="y", **options)
        (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
        for options in ({}, {"buffer_rows": 10}):
            with pytest.raises(UsageError, match=r"cut\.parquet cannot be read as parquet: "):
                TensorBatches(tmp_path / "cut.parquet", **options)
        with pytest.raises(UsageError, match="column 'text' holds"):
            TensorBatches(tmp_path / "t.parquet")
        with pytest.raises(UsageError, match="column 'when' holds timestamp"):
            TensorBatches(tmp_path / "t.parquet", features=["when"])
        with pytest.raises(UsageError, match="this is an array"):
            TensorBatches([tmp_path / "x.npy"])
        np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(UsageError, match=r"objects\.npy: holds Python objects"):
            TensorBatches(tmp_path / "objects.npy")
        for content in (b"", b"no array", (tmp_path / "x.npy").read_bytes()[:-1]):
            (tmp_path / "broken.npy").write_bytes(content)
            with pytest.raises(UsageError, match=r"broken\.npy cannot be read as npy: "):
                TensorBatches(tmp_path / "broken.npy")

    @pytest.mark.parametrize("array", [np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype="u1")])
    def test_arrays_of_every_form_are_mapped(self, tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
        """Without a row, column by column, of one dimension."""
        np.save(tmp_path / "x.npy", array)
        (tensor,) = TensorBatches(tmp_path / "x.npy").tensors
        assert torch.equal(tensor, torch.tensor(array))


def epoch_of(batches: TensorBatches) -> list[tuple[float, ...]]:
    """Return every row of an epoch, in its order."""
    return [tuple(row) for features, _ in batches for row in features.tolist()]


class TestStreamed:
    def test_in_order_it_is_the_table(self, tmp_path: Path) -> None:
        """Read by row groups, unshuffled batches are those of the table in memory."""
        write(frame(), tmp_path / "t.parquet")
        for drop_last in (False, True):
            options: dict[str, Any] = {"batch_size": 16, "target": "label", "drop_last": drop_last}
            streamed = TensorBatches(tmp_path / "t.parquet", buffer_rows=45, **options)
            held = TensorBatches(tmp_path / "t.parquet", **options)
            assert len(streamed) == len(list(streamed)) == len(held)
            assert same(streamed, held)

    @pytest.mark.parametrize("buffer_rows", [1, 45, 10_000])
    def test_shuffled_every_row_comes_once(self, tmp_path: Path, buffer_rows: int) -> None:
        """Two files of row groups: each row once an epoch, in another order every time, the same for one generator."""
        table = frame()
        paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
        write(table[:100], paths[0])
        write(table[100:], paths[1])

        def made() -> TensorBatches:
            generator = torch.Generator().manual_seed(2)
            return TensorBatches(
                paths, batch_size=16, shuffle=True, target="label", buffer_rows=buffer_rows, generator=generator
            )

        batches = made()
        first, second = epoch_of(batches), epoch_of(batches)
        wanted = [tuple(row) for row in table[["f0", "f1", "f2"]].to_numpy(np.float32).tolist()]
        assert sorted(first) == sorted(second) == sorted(wanted)
        assert len({tuple(first), tuple(second), tuple(wanted)}) == 3
        assert epoch_of(made()) == first

    def test_the_buffer_is_bounded(self, tmp_path: Path) -> None:
        """No batch is cut from more rows than the buffer and what was left of the last."""
        write(frame(), tmp_path / "t.parquet")
        batches = TensorBatches(tmp_path / "t.parquet", batch_size=16, shuffle=True, buffer_rows=45)
        sizes = {features.untyped_storage().nbytes() // (4 * 4) for (features,) in batches}
        assert max(sizes) <= 45 + 15

    def test_what_cannot_be_streamed_is_refused(self, tmp_path: Path) -> None:
        """Tensors, text files, and a table that is asked for its tensors."""
        write(frame(), tmp_path / "t.csv")
        write(frame(), tmp_path / "t.parquet")
        with pytest.raises(UsageError, match="only Parquet"):
            TensorBatches(tmp_path / "t.csv", buffer_rows=10)
        with pytest.raises(UsageError, match="expected a tensor, a numpy array, a path"):
            TensorBatches(torch.zeros(3), buffer_rows=10)
        with pytest.raises(UsageError, match="buffer_rows: expected at least 1"):
            TensorBatches(tmp_path / "t.parquet", buffer_rows=0)
        with pytest.raises(UsageError, match="not in memory"):
            _ = TensorBatches(tmp_path / "t.parquet", buffer_rows=10).tensors


def test_nonsense_is_refused() -> None:
    """No source, no rows, rows of different number, a batch of nothing."""
    with pytest.raises(UsageError, match="at least one tensor"):
        TensorBatches()
    with pytest.raises(UsageError, match="batch_size"):
        TensorBatches(torch.zeros(3), batch_size=0)
    with pytest.raises(UsageError, match=r"dtype: expected a torch type that numpy has, .* got torch\.bfloat16"):
        TensorBatches(torch.zeros(3), dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"one number of rows; their shapes are \(3,\), \(4,\)"):
        TensorBatches(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match="one number of rows"):
        TensorBatches(torch.tensor(3.0))


class TestDevice:
    def test_batches_of_any_form_arrive_in_order(self) -> None:
        """Lists, tuples, named tuples, mappings and what is no tensor keep their form and place."""
        pair = namedtuple("pair", "x y")
        made: list[Any] = [torch.ones(2), [torch.zeros(1), "name"], pair(torch.ones(1), 3), {"a": (torch.ones(1),)}]
        moved = list(prefetch_to_device(made, "cpu"))
        assert [type(batch) for batch in moved] == [type(batch) for batch in made]
        assert moved[1][1] == "name"
        assert torch.equal(moved[3]["a"][0], torch.ones(1))
        assert all(batch.device.type == "meta" for batch in prefetch_to_device([torch.ones(3)], "meta"))
        with pytest.raises(UsageError, match="depth"):
            prefetch_to_device([], "cpu", depth=0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_gpu_that_is_not_there_is_said(self, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """In one sentence, by both that take a device."""
        with pytest.raises(UsageError, match='torch finds no GPU for cuda; take "cpu"'):
            prefetch_to_device([], "cuda")
        with pytest.raises(UsageError, match='torch finds no GPU for cuda; take "cpu"'):
            next(iter(TensorBatches(*tensors, device="cuda")))

    def test_tensor_batches_go_to_their_device(self, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """`device` moves every tensor of every batch."""
        moved = list(TensorBatches(*tensors, batch_size=100, device="meta"))
        assert [[tuple(t.shape) for t in batch] for batch in moved] == [[(n, 4), (n,)] for n in (100, 100, 3)]
        assert {t.device.type for batch in moved for t in batch} == {"meta"}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("pin", [False, True])
    def test_a_gpu_gets_the_same_batches(self, tensors: tuple[torch.Tensor, torch.Tensor], pin: bool) -> None:
        """Copies on a side stream arrive whole before they are used, pinned by the loader or here."""
        held = tuple(tensor.pin_memory() for tensor in tensors) if pin else tensors
        moved = TensorBatches(
            *held, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1), device="cuda"
        )
        wanted = TensorBatches(*tensors, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))
        assert same([[tensor.cpu() for tensor in batch] for batch in moved], wanted)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderNode]:
    """A node with one table in each form."""
    with folder_node(tmp_path_factory.mktemp("node"), freshness="1h") as running:
        for name in ("t.parquet", "t.arrow", "t.csv"):
            write(frame(), running.store / name)
        np.save(running.store / "x.npy", np.arange(ROWS, dtype=np.float32))
        yield running
        close_shared_clients()


@pytest.mark.system
class TestNamespace:
    @pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.csv"])
    def test_tables_are_read_from_the_namespace(self, node: FolderNode, name: str) -> None:
        """An orchestra: path gives what the file gives."""
        inside = TensorBatches(f"orchestra:///data/{name}", batch_size=64, target="label", config=node.config)
        assert same(inside, TensorBatches(node.store / name, batch_size=64, target="label"))

    def test_arrays_and_streams_too(self, node: FolderNode) -> None:
        """npy is read at first and mapped once it is cached; row groups are streamed."""
        for _ in range(2):
            (array,) = TensorBatches("orchestra:///data/x.npy", config=node.config).tensors
            assert torch.equal(array, torch.arange(ROWS, dtype=torch.float32))
            array.zero_()
        streamed = TensorBatches(
            "orchestra:///data/t.parquet", batch_size=64, buffer_rows=30, target="label", config=node.config
        )
        assert same(streamed, TensorBatches(node.store / "t.parquet", batch_size=64, target="label"))

    def test_a_missing_file_is_said(self, node: FolderNode) -> None:
        """NotFoundError with the path."""
        with pytest.raises(NotFoundError, match=r"/data/gone\.parquet"):
            TensorBatches("orchestra:///data/gone.parquet", config=node.config)
