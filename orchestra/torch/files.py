"""FileDataset: one sample a file, a whole batch read in one call.

Owns: what a sample is. Leaves to others: which files there are (client.filesets), reading them (client.locations),
order and batches (samplers, DataLoader), how a worker hands them over (handover).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from orchestra.client.filesets import find_files
from orchestra.client.locations import read_many, ready
from orchestra.errors import UsageError
from orchestra.torch.handover import reuse_memory


def load_tensor(data: bytes) -> Any:
    """Return what `torch.save` wrote, loaded with torch's safe loader; a transform for files of tensors."""
    return torch.load(io.BytesIO(data), weights_only=True)


class FileDataset(Dataset[Any]):
    """A map-style dataset of files: sample i is `transform(bytes)`, with its label beside it if there are labels.

    `source` is a folder (with class folders, their numbers are the labels and `classes` their names), or a sequence of
    paths, or of IDs, whose files are `folder`/ID`suffix`. `labels` is a dictionary by ID or a sequence. So
    `FileDataset(partition["train"], labels, load_tensor, folder="orchestra:///data", suffix=".pt")` takes the usual two
    dictionaries. Paths that begin with `orchestra:` lie in the namespace, others on this machine.

    A DataLoader asks for a whole batch at once (`__getitems__`): what is not cached is then fetched together, in one
    message. Works in workers made by fork, spawn and forkserver; pickles as its names and labels alone. What
    DataLoader's own collation makes in a worker is handed over in memory that is used again (handover).
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Any],
        labels: Mapping[Any, Any] | Sequence[Any] | None = None,
        transform: Callable[[bytes], Any] | None = None,
        *,
        folder: str | os.PathLike[str] = "",
        suffix: str = "",
        config: str | None = None,
    ) -> None:
        self._files = find_files(source, labels, folder=folder, suffix=suffix, config=config)
        self._config = config
        self.transform = transform
        self._fingerprint: str | None = None
        # Now and not in each worker, which inherits it by fork: 50 ms of imports and of reading the configuration.
        ready(self._files.paths, config)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, in the order of their labels; empty if there are none."""
        return self._files.classes

    @property
    def paths(self) -> Sequence[str]:
        """The path of every sample."""
        return self._files.paths

    @property
    def labels(self) -> Sequence[Any] | None:
        """The label of every sample, None if there are no labels."""
        return self._files.labels

    def __len__(self) -> int:
        return len(self._files.paths)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples, read in one call. Raises NotFoundError, StoreError and what `transform` raises."""
        reuse_memory()
        contents: Sequence[Any] = read_many([self._files.paths[index] for index in indices], self._config)
        if self.transform is not None:
            contents = [self.transform(data) for data in contents]
        labels = self._files.labels
        if labels is None:
            return list(contents)
        return [(sample, labels[index]) for sample, index in zip(contents, indices, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this dataset from another: a checkpoint that holds it can be refused later."""
        if self._fingerprint is None:  # a loader that keeps state asks after every batch; a million files cost 0.2 s
            self._fingerprint = self._files.fingerprint()
        return {"files": len(self), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise UsageError unless the state was taken of the same files with the same labels in the same order: a
        sampler's position means something else in any other."""
        mine = self.state_dict()
        if dict(state) != mine:
            raise UsageError(
                f"the checkpoint was taken of another dataset: {state.get('files')} files, here are {mine['files']}; "
                "names, order or labels differ"
            )
