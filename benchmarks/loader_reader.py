"""Epochs of small files through a DataLoader, in a process of its own: reads one JSON object, prints one.

Every contestant gives the same samples (the file's bytes as a tensor) in batches of the same size with the same number
of workers; what is timed is the epoch, from making the loader's iterator to the last batch; each epoch has workers of
its own. Owns: the loaders, each as its makers recommend. Leaves to others: what is served (loader_contestants.py), the
tables (loaders.py).
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from orchestra.torch import FileDataset


def as_tensor(data: Any) -> torch.Tensor:
    """Return the bytes as they are."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Files(Dataset[torch.Tensor]):
    """One open and read per sample: a folder, whatever is behind it."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self.paths = [f"{folder}/{name}" for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return as_tensor(Path(self.paths[index]).read_bytes())


class S3fsFiles(Dataset[torch.Tensor]):
    """One `cat_file` per sample; the file system is made in the worker, as s3fs asks for."""

    def __init__(self, prefix: str, names: list[str], options: dict[str, Any]) -> None:
        self.paths = [prefix + name for name in names]
        self.options = options
        self.filesystem: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.filesystem is None:
            self.filesystem = importlib.import_module("fsspec").filesystem("s3", **self.options)
        return as_tensor(self.filesystem.cat_file(self.paths[index]))


def connector(setup: dict[str, Any], names: list[str]) -> Any:
    """s3torchconnector's map-style dataset."""
    module = importlib.import_module("s3torchconnector")
    config = module.S3ClientConfig(force_path_style=True)
    return module.S3MapDataset.from_objects(
        [f"s3://{setup['bucket']}/{name}" for name in names],
        region="us-east-1",
        endpoint=setup["url"],
        transform=read_object,
        s3client_config=config,
    )


def read_object(reader: Any) -> torch.Tensor:
    """Return what s3torchconnector's reader gives."""
    return as_tensor(reader.read())


def first_value(sample: Any) -> torch.Tensor:
    """Return the tensor of a sample of webdataset."""
    return as_tensor(sample["bin"])


def webdataset(setup: dict[str, Any]) -> Any:
    """Local tar files, as its cache leaves them."""
    shards = sorted(str(path) for path in Path(setup["folder"]).glob("*.tar"))
    module = importlib.import_module("webdataset")
    return module.WebDataset(shards, shardshuffle=False).map(first_value)


def mosaic(setup: dict[str, Any], batch_size: int) -> Any:
    """Local MDS shards, as its cache leaves them."""
    module = importlib.import_module("streaming")

    class Shards(module.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, index: Any) -> Any:
            return as_tensor(super().__getitem__(index)["x"])

    return Shards(local=setup["folder"], batch_size=batch_size, shuffle=False)


def litdata(setup: dict[str, Any]) -> Any:
    """Local chunks, as its cache leaves them."""
    module = importlib.import_module("litdata")

    class Chunks(module.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, index: Any) -> Any:
            return as_tensor(super().__getitem__(index))

    return Chunks(setup["folder"], shuffle=False)


def make_loader(method: str, setup: dict[str, Any], names: list[str], options: dict[str, int]) -> Iterable[Any]:
    """Return the batches of an epoch."""
    makers: dict[str, Callable[[], Any]] = {
        "orchestra": lambda: FileDataset(names, None, as_tensor, **setup),
        "folder": lambda: Files(setup["folder"], names),
        "s3fs": lambda: S3fsFiles(setup["prefix"], names, setup["options"]),
        "s3torchconnector": lambda: connector(setup, names),
        "webdataset": lambda: webdataset(setup),
        "mosaic": lambda: mosaic(setup, options["batch_size"]),
        "litdata": lambda: litdata(setup),
    }
    dataset = makers[method]()
    if method == "litdata":
        batches: Iterable[Any] = importlib.import_module("litdata").StreamingDataLoader(dataset, **options)
        return batches
    return DataLoader(dataset, **options)  # type: ignore[arg-type]


def cpu_s() -> float:
    """Return the CPU seconds of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Do the epochs."""
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    loader = make_loader(request["method"], request["setup"], request["names"], request["loader"])
    before = cpu_s()
    began = time.perf_counter()
    files, byte_sum = 0, 0
    for _ in range(request["epochs"]):
        for batch in loader:
            files += len(batch)
            byte_sum += int(batch[:, 0].sum()) if request["check"] else 0
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "files": files, "cpu_s": cpu_s() - before, "byte_sum": byte_sum}))


if __name__ == "__main__":
    main()
