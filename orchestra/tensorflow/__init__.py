"""What a TensorFlow script takes from orchestra: files as a `tf.data.Dataset`, read a batch at a time.

Owns: the pipeline's form. Leaves to others: which files there are (client.filesets), reading them (client.locations).
TensorFlow is imported when a dataset is made, never by importing this module.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from orchestra.client.filesets import find_files
from orchestra.client.locations import read_many
from orchestra.errors import UsageError

__all__ = ["file_dataset"]


def file_dataset(
    source: str | os.PathLike[str] | Sequence[Any],
    labels: Any = None,
    transform: Callable[[Any], Any] | None = None,
    *,
    batch_size: int = 32,
    shuffle: bool = False,
    seed: int | None = None,
    drop_last: bool = False,
    shard: tuple[int, int] | None = None,
    parallel_calls: int | None = None,
    folder: str | os.PathLike[str] = "",
    suffix: str = "",
    config: str | None = None,
) -> Any:
    """Return a `tf.data.Dataset` of batches: contents, with labels beside them if there are any.

    `source`, `labels`, `folder` and `suffix` mean what they mean for `orchestra.torch.FileDataset`. Contents are
    strings of bytes, or what `transform` (a function of tensors, as `dataset.map` takes it) makes of one. A batch is
    read in one call, `parallel_calls` batches at a time (tf.data's choice if None), in a fixed order.

    `shard=(index, count)` keeps every count-th file, before anything is read; tf.distribute may shard the dataset
    instead (by data, which is its policy here). `shuffle` orders all files anew every epoch. Raises UsageError.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard: expected (index, count) with an index from 0 to count - 1, got {shard}")
    tf = _tensorflow()
    files = find_files(source, labels, folder=folder, suffix=suffix, config=config)
    calls = tf.data.AUTOTUNE if parallel_calls is None else parallel_calls
    columns = [tf.constant([os.fsencode(path) for path in files.paths], tf.string)]
    if files.labels is not None:
        columns.append(tf.constant(list(files.labels)))

    def read(paths: Any, *others: Any) -> Any:
        contents = tf.numpy_function(lambda names: _read(names, config), [paths], tf.string)
        contents.set_shape(paths.shape)
        return (contents, *others) if others else contents

    dataset = tf.data.Dataset.from_tensor_slices(tuple(columns))
    if shard is not None:
        dataset = dataset.shard(shard[1], shard[0])
    if shuffle:
        dataset = dataset.shuffle(max(1, len(files.paths)), seed=seed, reshuffle_each_iteration=True)
    dataset = dataset.batch(batch_size, drop_remainder=drop_last).map(read, num_parallel_calls=calls)
    if transform is not None:
        dataset = dataset.unbatch().map(_on_first(transform), num_parallel_calls=calls)
        dataset = dataset.batch(batch_size, drop_remainder=drop_last)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def _on_first(transform: Callable[[Any], Any]) -> Callable[..., Any]:
    def apply(content: Any, *others: Any) -> Any:
        return (transform(content), *others) if others else transform(content)

    return apply


def _read(names: Any, config: str | None) -> Any:
    numpy = importlib.import_module("numpy")
    # An array of objects: numpy's own strings would lose zeros at the end.
    contents = numpy.empty(len(names), dtype=object)
    contents[:] = read_many([os.fsdecode(name) for name in names], config)
    return contents


def _tensorflow() -> Any:
    try:
        return importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise UsageError("orchestra.tensorflow needs TensorFlow: pip install tensorflow-cpu") from error
