"""Train from TFRecord shards in a folder, through tf.data: TensorFlow as it comes, the folder may be a mounted one.

    python examples/tensorflow_tfrecords.py --data /tmp/records --make 2000     # writes shards, then trains
    python examples/tensorflow_tfrecords.py --data /mnt/orchestra/records --epochs 2

Shards are read several at a time (`interleave`), which is what keeps a store's latency from being waited for.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

FEATURES = 16
CLASSES = 4
SHARDS = 8


def write_shards(tf: Any, folder: Path, count: int, seed: int) -> None:
    """Write `count` samples of four classes, each a cloud around a centre of its own, as eight shards."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = tf.random.Generator.from_seed(seed)
    centres = generator.normal((CLASSES, FEATURES)) * 2
    for shard in range(SHARDS):
        numbers = range(shard, count, SHARDS)
        with tf.io.TFRecordWriter(str(folder / f"{shard:05d}-of-{SHARDS:05d}.tfrecord")) as writer:
            for label in (number % CLASSES for number in numbers):
                values = (centres[label] + generator.normal((FEATURES,))).numpy().tolist()
                feature = {
                    "features": tf.train.Feature(float_list=tf.train.FloatList(value=values)),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())


def make_dataset(tf: Any, paths: list[str], options: argparse.Namespace) -> Any:
    """Return shuffled batches of features and labels."""
    form = {"features": tf.io.FixedLenFeature([FEATURES], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}

    def parse(records: Any) -> tuple[Any, Any]:
        parsed = tf.io.parse_example(records, form)
        return parsed["features"], parsed["label"]

    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths), seed=options.seed)
    dataset = dataset.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.shuffle(1000, seed=options.seed).batch(options.batch_size)
    return dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def main() -> None:
    """Write the shards if asked to, then train on them."""
    parser = argparse.ArgumentParser(description="Train from TFRecord shards through tf.data.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="where *.tfrecord files lie")
    parser.add_argument("--make", type=int, metavar="COUNT", help="first write so many samples to FOLDER")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its notes on CPU features are no news to the user
    try:
        import tensorflow as tf  # after the options, so that --help answers where it is not installed
    except ImportError:
        raise SystemExit("this example needs TensorFlow: pip install tensorflow-cpu") from None

    tf.keras.utils.set_random_seed(options.seed)
    if options.make:
        write_shards(tf, Path(options.data), options.make, options.seed)
    paths = sorted(str(path) for path in Path(options.data).glob("*.tfrecord"))
    if len(paths) < 2:
        raise SystemExit(f"expected at least two *.tfrecord files in {options.data}, found {len(paths)}")
    train, test = make_dataset(tf, paths[1:], options), make_dataset(tf, paths[:1], options)
    model = tf.keras.Sequential(
        [tf.keras.Input((FEATURES,)), tf.keras.layers.Dense(32, activation="relu"), tf.keras.layers.Dense(CLASSES)]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    for epoch in range(1, options.epochs + 1):
        began = time.perf_counter()
        model.fit(train, verbose=0)
        _, accuracy = model.evaluate(test, verbose=0)
        print(
            f"epoch {epoch}: {time.perf_counter() - began:.2f} s, {len(paths)} shards, accuracy {accuracy:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
