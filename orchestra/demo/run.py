"""The demo from beginning to end: server, bucket, node, folder, training, verification; then nothing is left of it.

Owns: the order of things, and choosing the face. Leaves to others: each step, and printing.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from orchestra.clock import Clock, SystemClock
from orchestra.demo import dataset, verify
from orchestra.demo.bucket import Bucket, running_bucket
from orchestra.demo.node import MOUNT_PATH, Node, running_node
from orchestra.demo.report import DemoReport, Epoch, count_requests, epoch_line, make_epoch
from orchestra.demo.training import FOLDER_EXAMPLE, FSSPEC_EXAMPLE, example_path, train
from orchestra.errors import OrchestraError
from orchestra.units import format_size

Say = Callable[[str], None]
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_demo(face: str, *, keep: bool, say: Say) -> DemoReport:
    """Run the whole demo; `face` is auto, fuse or fsspec; `say` is given a line whenever there is news.

    Afterwards nothing runs, nothing is mounted, and the temporary folder is gone unless `keep`. Raises OrchestraError
    if a step fails or a byte differs.
    """
    clock = SystemClock()
    with ExitStack() as stack:
        stack.enter_context(_interrupted_once())
        folder = stack.enter_context(_temporary_folder(keep, say))
        bucket = stack.enter_context(running_bucket())
        data_bytes = _introduce(bucket, say)
        node = stack.enter_context(running_node(folder, bucket.options))
        stack.callback(_ignore_signals)  # runs before what is above is taken down
        face = _attach(node, face, say)
        epochs, accuracy = _train(node, bucket, face, data_bytes, say, clock)
        say("verifying every byte of the namespace against the bucket")
        files, size_bytes = _verify(node, bucket, face)
        say(f"verified: {files} files, {format_size(size_bytes)}, all as in the bucket (sha256)")
        return DemoReport(face, epochs, accuracy, files, size_bytes)


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM raise KeyboardInterrupt, and no other one disturb what cleans up after it."""

    def interrupt(number: int, frame: object) -> None:
        _ignore_signals()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _temporary_folder(keep: bool, say: Say) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="orchestra-demo-"))
    try:
        yield folder
    finally:
        if keep:
            say(f"kept: {folder} (configuration, cache, logs)")
        elif os.path.ismount(folder / "mnt"):
            say(f"{folder / 'mnt'} is still mounted; unmount it, then remove {folder}")
        else:
            shutil.rmtree(folder)


def _introduce(bucket: Bucket, say: Say) -> int:
    """Say what is in the bucket; return the bytes of its pictures."""
    sizes = bucket.sizes()
    pictures = [size for key, size in sizes.items() if key.startswith(f"{dataset.DIGITS_FOLDER}/")]
    big = format_size(sizes[dataset.BIG_KEY])
    say(f"an S3 server at {bucket.options['endpoint_url']} holds {len(pictures)} pictures and one object of {big}")
    return sum(pictures)


def _attach(node: Node, face: str, say: Say) -> str:
    """Mount the namespace unless `face` is fsspec or, with auto, it cannot be mounted; return the face to use."""
    if face != "fsspec":
        try:
            node.mount()
        except OrchestraError as error:
            if face == "fuse":
                raise
            say(f"no folder can be mounted here, so the files are read through fsspec ({error.message})")
        else:
            say(f"the bucket is the folder {node.mount_folder}{MOUNT_PATH}")
            return "fuse"
    say(f"the bucket is orchestra://{MOUNT_PATH}")
    return "fsspec"


def _train(
    node: Node, bucket: Bucket, face: str, data_bytes: int, say: Say, clock: Clock
) -> tuple[tuple[Epoch, ...], float]:
    """Run the example for its two epochs; return what each of them cost, and the accuracy that was reached."""
    if face == "fuse":
        example, data = example_path(FOLDER_EXAMPLE), f"{node.mount_folder}{MOUNT_PATH}/{dataset.DIGITS_FOLDER}"
    else:
        example, data = example_path(FSSPEC_EXAMPLE), f"orchestra://{MOUNT_PATH}/{dataset.DIGITS_FOLDER}"
    say(f"training: python {example.name} --data {data}")
    epochs: list[Epoch] = []
    accuracy = 0.0
    known = len(bucket.requests())
    missed_before = node.counters().miss_bytes
    began_ns = clock.now_ns()
    for figures in train(example, data, node.environment, node.folder / "training.log"):
        missed = node.counters().miss_bytes
        counted = count_requests(bucket.requests(known), began_ns, figures.ended_ns)
        epochs.append(make_epoch(figures, counted, missed - missed_before, data_bytes))
        say(epoch_line(len(epochs), epochs[-1]))
        began_ns, missed_before, accuracy = figures.ended_ns, missed, figures.accuracy
    say(f"accuracy on pictures kept for testing: {accuracy:.1%}")
    return tuple(epochs), round(accuracy, 4)


def _verify(node: Node, bucket: Bucket, face: str) -> tuple[int, int]:
    expected = bucket.digests(verify.digest_of)
    if face == "fuse":
        return verify.compare(verify.folder_digests(Path(f"{node.mount_folder}{MOUNT_PATH}")), expected)
    return verify.compare(verify.fsspec_digests(f"orchestra://{MOUNT_PATH}", node.folder / "orchestra.toml"), expected)
