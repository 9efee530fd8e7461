"""The process that trains in overlap.py: torch's DataLoader (or a library's own dataset in it) and a step that sleeps.

Takes one JSON object on standard input, {"kind", "setup", "train"}, and prints one line: seconds of each epoch, and how
long of them it waited for batches. An epoch lasts from the call of `iter(loader)`, so the start of its workers counts,
to the end of the last step. With "pack" it writes the shards that a library reads, instead.

Owns: the loops and each library's few lines. Leaves to others: what is read (overlap.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler


@dataclass(slots=True)
class Train:
    """What is trained on: names and size of the files, and how."""

    names: list[str]
    size: int
    workers: int
    batch: int
    step_s: float
    epochs: int


class Files(Dataset[int]):
    """A map-style dataset of whole files below a folder; a sample is a file's length."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> int:
        return len(Path(self.folder, self.names[index]).read_bytes())


class FsspecFiles(Files):
    """The same through an fsspec file system, opened in each worker."""

    def __init__(self, folder: str, names: list[str], protocol: str, options: dict[str, Any]) -> None:
        super().__init__(folder, names)
        self.protocol = protocol
        self.options = options
        self.filesystem: Any = None

    def __getitem__(self, index: int) -> int:
        if self.filesystem is None:
            import fsspec

            self.filesystem = fsspec.filesystem(self.protocol, **self.options)
        return len(self.filesystem.cat_file(f"{self.folder}/{self.names[index]}"))


class Lengths(IterableDataset[int]):
    """Any iterable of samples, as lengths."""

    def __init__(self, samples: Any, field: str | None) -> None:
        self.samples = samples
        self.field = field

    def __iter__(self) -> Iterator[int]:
        for sample in self.samples:
            yield len(sample[self.field] if self.field else sample)


def run(loader: Callable[[int], Any], train: Train) -> dict[str, Any]:
    """Train; `loader(epoch)` gives the batches of lengths."""
    epochs, waits = [], []
    for epoch in range(train.epochs):
        began = time.perf_counter()
        waited = byte_count = 0.0
        batches = iter(loader(epoch))
        while True:
            asked = time.perf_counter()
            lengths = next(batches, None)
            if lengths is None:
                break
            waited += time.perf_counter() - asked
            byte_count += sum(lengths)
            time.sleep(train.step_s * len(lengths) / train.batch)
        epochs.append(time.perf_counter() - began)
        waits.append(waited)
        if byte_count != train.size * len(train.names):
            raise SystemExit(f"trained on {byte_count:.0f} bytes instead of {train.size * len(train.names)}")
    return {"epochs_s": epochs, "waits_s": waits}


def shuffled(dataset: Files, train: Train, sampler: Any = None) -> Callable[[int], Any]:
    """Batches of a map-style dataset in a new order each epoch; its workers stay."""
    import torch

    loader = DataLoader(
        dataset,
        batch_size=train.batch,
        sampler=sampler or RandomSampler(dataset, generator=torch.Generator().manual_seed(1)),
        num_workers=train.workers,
        persistent_workers=True,
        collate_fn=list,
    )
    return lambda epoch: loader


def folder(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """Files below a folder: a mount, or native."""
    return shuffled(Files(setup["folder"], train.names), train)


def planned_folder(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """Files below a mounted folder, in an order that is told to the node: one line."""
    from orchestra.torch import PlannedSampler

    dataset = Files(setup["folder"], train.names)
    sampler = PlannedSampler([f"{dataset.folder}/{name}" for name in train.names], 0, config=setup["config"])
    loader = shuffled(dataset, train, sampler)(0)

    def batches(epoch: int) -> Any:
        if epoch and not sampler.is_published:
            raise SystemExit("the node was not told the order")
        return loader

    return batches


def fsspec_files(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """Files through fsspec."""
    return shuffled(FsspecFiles(setup["folder"], train.names, setup["protocol"], setup["options"]), train)


def webdataset_shards(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """Tar files streamed over HTTP by curl, as webdataset's documentation has it."""
    webdataset = importlib.import_module("webdataset")
    urls = [f"pipe:curl -s {setup['url']}/{name}" for name in setup["shards"]]

    def batches(epoch: int) -> Any:
        order = list(urls)
        random.Random(epoch).shuffle(order)
        samples = webdataset.WebDataset(order, shardshuffle=False, empty_check=False).shuffle(100)
        return DataLoader(Lengths(samples, "bin"), batch_size=train.batch, num_workers=train.workers, collate_fn=list)

    return batches


def litdata_shards(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """litdata's chunks, its dataset and its DataLoader."""
    litdata = importlib.import_module("litdata")
    # Its client refuses plain HTTP and has no option for it; the origin speaks nothing else.
    importlib.import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = litdata.StreamingDataset(
        setup["uri"], cache_dir=setup["cache"], shuffle=True, storage_options=setup["storage_options"]
    )

    def batches(epoch: int) -> Iterator[list[int]]:
        loader = litdata.StreamingDataLoader(
            dataset, batch_size=train.batch, num_workers=train.workers, collate_fn=lengths_of
        )
        yield from loader

    return batches


def lengths_of(samples: list[Any]) -> list[int]:
    """Return the lengths of a batch; a function of the module, as workers may be spawned."""
    return [len(sample["x"] if isinstance(sample, dict) else sample) for sample in samples]


def mosaic_shards(setup: dict[str, Any], train: Train) -> Callable[[int], Any]:
    """mosaicml-streaming's shards, its dataset in torch's DataLoader."""
    streaming = import_streaming()
    dataset = streaming.StreamingDataset(
        remote=setup["uri"], local=setup["cache"], shuffle=True, batch_size=train.batch, num_canonical_nodes=1
    )

    def batches(epoch: int) -> Any:
        return DataLoader(dataset, batch_size=train.batch, num_workers=train.workers, collate_fn=lengths_of)

    return batches


def import_streaming() -> Any:
    """Import mosaicml-streaming's own part: its package also imports torchvision and transformers, which bring CUDA and
    100 MB; two names of transformers that it compares types with are made up."""
    for name, word in (("feature_extraction_utils", "BatchFeature"), ("tokenization_utils_base", "BatchEncoding")):
        stub = types.ModuleType(f"transformers.{name}")
        setattr(stub, word, type(word, (), {}))
        sys.modules.setdefault("transformers", types.ModuleType("transformers"))
        sys.modules[f"transformers.{name}"] = stub
    found = importlib.util.find_spec("streaming")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("mosaicml-streaming is not installed")
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def pack(setup: dict[str, Any]) -> None:
    """Write `count` samples of `size` bytes as the shards of a library, about `shard` samples each, below `target`."""
    target = Path(setup["target"])
    samples = (random.Random(index).randbytes(setup["size"]) for index in range(setup["count"]))
    target.mkdir(parents=True)
    if setup["library"] == "webdataset":
        webdataset = importlib.import_module("webdataset")
        with webdataset.ShardWriter(f"{target}/%04d.tar", maxcount=setup["shard"], verbose=0) as writer:
            for index, data in enumerate(samples):
                writer.write({"__key__": f"{index:06d}", "bin": data})
    elif setup["library"] == "streaming":
        limit = setup["shard"] * (setup["size"] + 64)
        with import_streaming().MDSWriter(out=str(target), columns={"x": "bytes"}, size_limit=limit) as writer:
            for data in samples:
                writer.write({"x": data})
    else:
        writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(
            str(target), chunk_size=setup["shard"]
        )
        for index, data in enumerate(samples):
            writer[index] = {"x": data}
        writer.done()
        writer.merge()


KINDS: dict[str, Callable[[dict[str, Any], Train], Callable[[int], Any]]] = {
    "folder": folder,
    "planned": planned_folder,
    "fsspec": fsspec_files,
    "webdataset": webdataset_shards,
    "litdata": litdata_shards,
    "streaming": mosaic_shards,
}


def main() -> None:
    """Do what standard input says."""
    request = json.loads(sys.stdin.read())
    if "pack" in request:
        pack(request["pack"])
        print("{}")
        return
    train = Train(**request["train"])
    answer = run(KINDS[request["kind"]](request["setup"], train), train)
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # some libraries leave threads that keep the process


if __name__ == "__main__":
    main()
