"""ColumnCubes: numpy's own values, the same series however it is made, and memory that is used again safely."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader

from orchestra.errors import NotFoundError, UsageError
from orchestra.torch import ColumnCubes

TABLES, ROWS, COLUMNS = 5, 20, 30


@pytest.fixture
def frames() -> np.ndarray[Any, Any]:
    """Five tables of 20 rows and 30 columns."""
    return np.random.default_rng(7).random((TABLES, ROWS, COLUMNS))


def small(frames: Any, **options: Any) -> ColumnCubes:
    """Cubes of 5 x 8 x 6, four of them, made by two threads unless said otherwise."""
    return ColumnCubes(frames, 8, 6, **{"seed": 3, "count": 4, "threads": 2, **options})


def test_a_cube_is_what_numpy_answers(frames: np.ndarray[Any, Any]) -> None:
    """Values, shape, type and even the order in memory are those of frames[:, :rows, chosen]."""
    cubes = small(frames)
    made = list(cubes)
    assert len(made) == len(cubes) == 4
    for index, cube in enumerate(made):
        wanted = frames[:, :8, cubes.chosen_columns(index)]
        assert np.array_equal(cube, wanted)
        assert (cube.shape, cube.dtype, cube.strides) == (cubes.shape, wanted.dtype, wanted.strides)


def test_columns_of_a_cube_are_drawn_without_repetition_and_differ_between_cubes(frames: np.ndarray[Any, Any]) -> None:
    """Each cube has six different columns, and over the series all thirty come up."""
    chosen = [small(frames).chosen_columns(index).tolist() for index in range(100)]
    assert all(len(set(columns)) == 6 for columns in chosen)
    assert set(itertools.chain(*chosen)) == set(range(COLUMNS))
    assert len({tuple(columns) for columns in chosen}) == 100


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_series_does_not_depend_on_the_threads(frames: np.ndarray[Any, Any], threads: int) -> None:
    """Any number of threads gives the same cubes in the same order."""
    for cube, wanted in zip(small(frames, threads=threads), map(small(frames).cube, range(4)), strict=True):
        assert np.array_equal(cube, wanted)


def test_seed_and_epoch_decide_the_series(frames: np.ndarray[Any, Any]) -> None:
    """Iterating again gives the same; another seed or epoch gives another."""
    cubes = small(frames)
    first = np.stack(list(cubes))
    assert np.array_equal(first, np.stack(list(cubes)))
    assert not np.array_equal(first, np.stack(list(small(frames, seed=4))))
    cubes.set_epoch(1)
    assert not np.array_equal(first, np.stack(list(cubes)))


@pytest.mark.system
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_workers_together_give_the_series_in_order(frames: np.ndarray[Any, Any], start_method: str) -> None:
    """Two DataLoader workers make every other cube each; the loader's order is the series."""
    cubes = small(frames, out="torch", threads=None, count=5)
    loader = DataLoader(cubes, batch_size=None, num_workers=2, multiprocessing_context=start_method, timeout=90)
    made = list(loader)
    assert len(made) == 5
    for index, cube in enumerate(made):
        assert torch.equal(cube, cubes.cube(index))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cube_in_use_is_never_overwritten(frames: np.ndarray[Any, Any], threads: int) -> None:
    """Cubes, and views of parts of them, keep their values while 500 more are made; memory that nobody has any
    more is used again."""
    cubes = small(frames, count=None, threads=threads)
    series = iter(cubes)
    kept = [next(series) for _ in range(3)]
    part = next(series)[1:3, :, 2]
    addresses = {next(series).ctypes.data for _ in range(500)}
    assert len(addresses) < 100
    for index, cube in enumerate(kept):
        assert np.array_equal(cube, cubes.cube(index))
    assert np.array_equal(part, cubes.cube(3)[1:3, :, 2])


def test_a_torch_cube_in_use_is_never_overwritten(frames: np.ndarray[Any, Any]) -> None:
    """The same for tensors and their views."""
    cubes = small(frames, count=None, out="torch")
    series = iter(cubes)
    part = next(series)[0]
    for _ in range(50):
        next(series)
    assert torch.equal(part, cubes.cube(0)[0])


def test_a_broken_off_series_begins_anew_and_a_saved_one_goes_on(frames: np.ndarray[Any, Any]) -> None:
    """`break` leaves nothing behind; load_state_dict continues after the last cube handed out."""
    cubes = small(frames)
    for _ in cubes:
        break
    assert cubes.state_dict()["next"] == 1
    other = small(frames, seed=99)
    other.load_state_dict(cubes.state_dict())
    assert np.array_equal(np.stack(list(other)), np.stack([cubes.cube(index) for index in (1, 2, 3)]))
    assert len(list(other)) == 4
    assert np.array_equal(next(iter(cubes)), cubes.cube(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_values_are_converted_once_and_kept(frames: np.ndarray[Any, Any], dtype: Any) -> None:
    """`dtype` is the type of every cube."""
    cubes = small(frames * 100, dtype=dtype)
    assert np.array_equal(cubes.cube(0), (frames * 100)[:, :8, cubes.chosen_columns(0)].astype(dtype))
    assert cubes.cube(0).dtype == dtype


@pytest.mark.parametrize("kind", ["frames", "parquet", "csv", "npy files", "one npy file", "tensor"])
def test_tables_come_in_many_forms(frames: np.ndarray[Any, Any], tmp_path: Path, kind: str) -> None:
    """Data frames, files of each kind and tensors give the cubes that the array gives."""
    named = [pandas.DataFrame(table, columns=[f"c{n}" for n in range(COLUMNS)]) for table in frames]
    source: Any = named
    if kind == "tensor":
        source = torch.from_numpy(frames)
    elif kind == "one npy file":
        np.save(tmp_path / "all.npy", frames)
        source = tmp_path / "all.npy"
    elif kind != "frames":
        source = [tmp_path / f"{number}.{kind.split()[0]}" for number in range(TABLES)]
        for path, frame in zip(source, named, strict=True):
            if kind == "parquet":
                frame.to_parquet(path, row_group_size=3)
            elif kind == "csv":
                frame.to_csv(path, index=False)
            else:
                np.save(path, frame.to_numpy())
    assert np.array_equal(small(source).cube(1), small(frames).cube(1))


def test_fractions_of_a_later_table_stay_fractions(frames: np.ndarray[Any, Any]) -> None:
    """Whole numbers in the first table and fractions, or nothing at all, in the second: as np.stack has it."""
    whole, broken = np.arange(600).reshape(20, 30), frames[0].copy()
    broken[3, 3] = np.nan
    cubes = small([whole, broken])
    stacked = np.stack([whole, broken])
    for index, cube in enumerate(cubes):
        assert np.array_equal(cube, stacked[:, :8, cubes.chosen_columns(index)], equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 21}, "rows: expected at most 20"),
        ({"rows": 0}, "rows: expected at least 1"),
        ({"columns": 31}, "columns: expected 1 to 30"),
        ({"columns": 0}, "columns: expected 1 to 30"),
        ({"out": "jax"}, 'out: expected "numpy" or "torch"'),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"count": -1}, "count: expected at least 0"),
        ({"threads": 0}, "threads: expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(frames: np.ndarray[Any, Any], options: dict[str, Any], message: str) -> None:
    """One sentence that says what is allowed."""
    with pytest.raises(UsageError, match=message):
        ColumnCubes(frames, **{"rows": 8, "columns": 6, **options})


def test_tables_that_do_not_fit_together_are_refused(frames: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Another number of columns, no table at all, one that is no list, flat data, text, times, a missing file."""
    with pytest.raises(UsageError, match="table 1 has 29 columns, table 0 has 30"):
        small([frames[0], frames[1][:, :29]])
    with pytest.raises(UsageError, match="at least one table"):
        small([])
    for nonsense in (frames[0], frames[:0], frames.astype(str)):
        with pytest.raises(UsageError, match="expected an array of numbers of shape"):
            small(nonsense)
    for nonsense in (pandas.DataFrame(frames[0]), {"a": frames[0]}, None):
        with pytest.raises(UsageError, match=r"or a list of tables, got (DataFrame|dict|NoneType)"):
            small(nonsense)
    with pytest.raises(UsageError, match="rows and columns of numbers"):
        small([pandas.DataFrame({"a": ["x"] * 20})])
    pandas.DataFrame({"when": pandas.date_range("2026-01-01", periods=20)}).to_parquet(tmp_path / "times.parquet")
    with pytest.raises(UsageError, match="column 'when' holds timestamp"):
        small([tmp_path / "times.parquet"])
    with pytest.raises(NotFoundError, match=r"gone\.parquet"):
        small([tmp_path / "gone.parquet"])
    with pytest.raises(UsageError, match="ends in one of"):
        small([tmp_path / "table.xls"])
