"""Batches to the accelerator ahead of their use: pinned memory, a stream beside the one that computes.

Owns: the copies and their order on the device. Leaves to others: making batches. On a machine without a GPU nothing is
started, and batches go through as they are, moved to the device that was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from orchestra.errors import UsageError

# Two batches ahead: one is being copied while the next is being made. More only takes memory of the device.
DEPTH = 2


def prefetch_to_device(loader: Iterable[Any], device: torch.device | str, *, depth: int = DEPTH) -> Iterator[Any]:
    """Yield the loader's batches on `device`, up to `depth` of them being copied while one is used.

    A batch may be a tensor or lists, tuples (also named ones) and mappings of them; what is no tensor goes through as
    it is. On CUDA the copies run on a stream of their own, from pinned memory (`pin_memory=True` in a DataLoader saves
    pinning here), and the computing stream waits for its batch alone. Anywhere else batches are moved one by one.
    """
    if depth < 1:
        raise UsageError(f"depth: expected at least 1, got {depth}")
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'device: torch finds no GPU for {target}; take "cpu", or install torch with CUDA')
    if target.type != "cuda":
        return (_moved(batch, lambda tensor: tensor.to(target)) for batch in loader)
    return _prefetched(loader, target, depth)


def _prefetched(loader: Iterable[Any], device: torch.device, depth: int) -> Iterator[Any]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: deque[tuple[Any, torch.cuda.Event]] = deque()
    for batch in loader:
        waiting.append(_begin_copy(batch, device, stream))
        if len(waiting) > depth:
            yield _finish_copy(*waiting.popleft(), device)
    while waiting:
        yield _finish_copy(*waiting.popleft(), device)


def _begin_copy(batch: Any, device: torch.device, stream: torch.cuda.Stream) -> tuple[Any, torch.cuda.Event]:
    # Tensors that are on the device already may still be being computed there.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copied = _moved(batch, lambda tensor: _pinned(tensor).to(device, non_blocking=True))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return copied, event


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    # The caching host allocator keeps the pinned copy until the stream has read it.
    return tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()


def _finish_copy(batch: Any, event: torch.cuda.Event, device: torch.device) -> Any:
    current = torch.cuda.current_stream(device)
    current.wait_event(event)

    def use(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(
            current
        )  # its memory was made on the other stream: not to be reused before this one is done
        return tensor

    return _moved(batch, use)


def _moved(batch: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the same structure with every tensor moved."""
    if isinstance(batch, torch.Tensor):
        return move(batch)
    if isinstance(batch, Mapping):
        return {key: _moved(value, move) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, move) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, move) for value in batch)
    return batch
