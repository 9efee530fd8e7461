"""Train a small image classifier from a folder of class folders, through tf.data. TensorFlow as it comes.

    python examples/tensorflow_images.py --data /data/digits --epochs 2

FOLDER holds one folder per class, and each of those holds PNG files. Every fifth file is kept for testing. One line is
printed per epoch, and one JSON object with the exact figures where a program reads them (standard output is a pipe).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

SIDE = 32  # every picture is scaled to SIDE x SIDE grey pixels
TEST_EVERY = 5


def find_samples(folder: str) -> tuple[list[str], list[str], list[int]]:
    """Return the class names, every picture below them and its class's number, all in sorted order."""
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    paths, labels = [], []
    for label, name in enumerate(classes):
        names = sorted(n for n in os.listdir(os.path.join(folder, name)) if n.endswith(".png"))
        paths += [os.path.join(folder, name, n) for n in names]
        labels += [label] * len(names)
    return classes, paths, labels


def make_dataset(tf: Any, paths: list[str], labels: list[int], options: argparse.Namespace, shuffle: bool) -> Any:
    """Return batches of decoded pictures, read and decoded by `--workers` calls at a time."""

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_png(tf.io.read_file(path), channels=1)
        image = tf.image.resize(image, (SIDE, SIDE))
        return tf.cast(image, tf.float32) / 255.0, label

    dataset = tf.data.Dataset.from_tensor_slices((paths, labels))
    if shuffle:
        dataset = dataset.shuffle(len(paths), seed=options.seed)
    return dataset.map(load, num_parallel_calls=options.workers).batch(options.batch_size).prefetch(2)


def make_model(tf: Any, class_count: int) -> Any:
    """Return two convolutions and a dense layer: enough for digits, quick on a CPU."""
    return tf.keras.Sequential(
        [
            tf.keras.Input((SIDE, SIDE, 1)),
            tf.keras.layers.Conv2D(16, 5, strides=2, padding="same", activation="relu"),
            tf.keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(class_count),
        ]
    )


class Stopwatch:
    """Adds up the time that the loop waits for its data."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def watch(self, dataset: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the dataset's batches, counting how long each took to come."""
        began = time.perf_counter()
        for batch in dataset:
            self.waited_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()
        self.waited_s += time.perf_counter() - began


def make_steps(tf: Any, model: Any) -> tuple[Any, Any]:
    """Return a training step and a function that counts right answers, both compiled."""
    optimizer = tf.keras.optimizers.Adam(2e-3)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator, unused-ignore]
    def train_step(images: Any, labels: Any) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator, unused-ignore]
    def count_right(images: Any, labels: Any) -> Any:
        answers = tf.argmax(model(images, training=False), axis=1, output_type=tf.int32)
        return tf.reduce_sum(tf.cast(answers == labels, tf.int32))

    return train_step, count_right


def run_epoch(steps: tuple[Any, Any], train: Any, test: Any) -> dict[str, float]:
    """Train on every training picture once, then classify every test picture; return the figures."""
    train_step, count_right = steps
    stopwatch = Stopwatch()
    began = time.perf_counter()
    seen = right = tested = 0
    for images, labels in stopwatch.watch(train):
        train_step(images, labels)
        seen += len(labels)
    for images, labels in stopwatch.watch(test):
        right += int(count_right(images, labels))
        tested += len(labels)
    time_s = time.perf_counter() - began
    return {
        "time_s": time_s,
        "images_per_s": (seen + tested) / time_s,
        "data_wait_fraction": stopwatch.waited_s / time_s,
        "accuracy": right / tested,
        # Seconds since boot mean the same in every process, so that a log of the storage can be cut at the epoch.
        "ended_boottime_s": time.clock_gettime(time.CLOCK_BOOTTIME),
    }


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Train a small image classifier through tf.data.")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="one folder per class, with PNG files in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="pictures read and decoded at a time (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Find the pictures, then train on them."""
    options = parse_arguments()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its notes on CPU features are no news to the user
    try:
        import tensorflow as tf  # after the options, so that --help answers where it is not installed
    except ImportError:
        raise SystemExit("this example needs TensorFlow: pip install tensorflow-cpu") from None

    classes, paths, labels = find_samples(options.data)
    if not paths:
        raise SystemExit(f"no PNG files in class folders below {options.data}")
    print(f"{len(paths)} pictures in {len(classes)} classes", flush=True)
    tf.keras.utils.set_random_seed(options.seed)
    kept = [index for index in range(len(paths)) if index % TEST_EVERY]
    train = make_dataset(tf, [paths[i] for i in kept], [labels[i] for i in kept], options, shuffle=True)
    test = make_dataset(tf, paths[::TEST_EVERY], labels[::TEST_EVERY], options, shuffle=False)
    steps = make_steps(tf, make_model(tf, len(classes)))
    for epoch in range(1, options.epochs + 1):
        figures = run_epoch(steps, train, test)
        if not sys.stdout.isatty():
            print(json.dumps({"epoch": epoch, **figures}), flush=True)
        print(
            f"epoch {epoch}: {figures['time_s']:.2f} s, {figures['images_per_s']:.0f} images/s, "
            f"{figures['data_wait_fraction']:.0%} waiting for data, accuracy {figures['accuracy']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
