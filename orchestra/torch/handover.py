"""Batches from a DataLoader's worker to the training process, in memory that is used again.

Owns: the memory of a worker's batches, who may write to it when, and how the training process comes to it. Leaves to
others: what is in a batch (files), the message that tells of it (DataLoader's queue).

torch makes new shared memory for every tensor of a batch: the kernel clears and maps each of its pages, a descriptor
goes to the training process through a socket with a handshake, and all is undone when the batch is dropped. That takes
more than reading the files. Here a worker has a few segments (memfd: nothing is left behind by a process that is
killed, and /dev/shm may be small); a batch is collated into one, its number goes through the queue, the descriptor only
the first time. A byte at the segment's start says whose it is: the worker writes to it only while that says FREE, and
the training process sets it so when nothing refers to the batch any more. What it gets is an ordinary tensor.

A process that forks while it holds a batch shares it with its child, so such a segment is never written to again. Nor
is one that `share_memory_` took a tensor out of (to send it on does, too): arrays made of the tensor look there yet.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

# Smaller ones (labels) go through the queue as they are: 64 KiB is what its pipe takes without waiting for a reader.
BATCH_BYTES_MIN = 48 * 1024
# Of one worker. A training process that keeps its batches gets the others in memory of torch's own, as ever.
SEGMENTS_MAX = 32
POOL_BYTES_MAX = 256 * 1024 * 1024
_HEADER_BYTES = mmap.PAGESIZE
# Whose a segment is: the worker's; the training process's; nobody's to write to; no longer in the worker's hands.
_FREE, _LENT, _GONE, _RETIRED = range(4)

_Array = np.ndarray[Any, np.dtype[np.uint8]]

_forks = 0
_pool: _Pool | None = None
_mapped: dict[tuple[_Source, int], _Array] = {}

_Source = tuple[int, bytes]  # a worker: its process, and what tells it from another that had the number


def reuse_memory() -> None:
    """In a DataLoader's worker: have the tensors that `default_collate` makes from now on go through memory that is
    used again. Nothing in any other process. Cheap when it is done already."""
    global _pool
    if _pool is not None or get_worker_info() is None or not hasattr(os, "memfd_create"):
        return  # a Python that was built for an old libc has none
    _pool = _Pool()
    default_collate_fn_map[torch.Tensor] = _collated
    for kind in (int, float):
        default_collate_fn_map[kind] = _numbers(default_collate_fn_map[kind])
    ForkingPickler.register(torch.Tensor, _reduced)


# -- in the worker -----------------------------------------------------------------------------------------------------


class _Segment:
    """Shared memory for one batch at a time."""

    def __init__(self, number: int, size_bytes: int) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("orchestra-batch")
        try:
            os.ftruncate(self.fd, _HEADER_BYTES + size_bytes)
            self.memory = np.frombuffer(mmap.mmap(self.fd, _HEADER_BYTES + size_bytes), np.uint8)
        except OSError:
            os.close(self.fd)
            raise
        self.is_known = False  # whether the training process has the descriptor
        self.is_held = False  # whether this process has a tensor on it
        self.is_sent = False
        self.is_shared = False  # with a child of this process, or what else looks there, for good
        self.tensor: Callable[[], torch.Tensor | None] = lambda: None

    @property
    def is_free(self) -> bool:
        """Whether it may be written to."""
        return not self.is_held and not self.is_shared and self.memory[0] == _FREE

    @property
    def is_spoilt(self) -> bool:
        """Whether it will never be free again."""
        return not self.is_held and (self.memory[0] == _GONE or (self.is_shared and self.memory[0] == _FREE))

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor on it; the segment is held until that is dropped."""
        self.is_held = True
        self.is_sent = False
        tensor = _tensor_on(_Lease(self.memory, _bytes_of(shape, dtype), self._come_back), shape, dtype)
        self.tensor = weakref.ref(tensor)
        return tensor

    def is_filled_by(self, tensor: torch.Tensor) -> bool:
        """Whether that is where the tensor lies still."""
        return tensor.data_ptr() == self.memory.ctypes.data + _HEADER_BYTES and tensor.nbytes <= self.size_bytes

    def send(self, source: _Source, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Hand it over; return what `_received` needs."""
        self.is_sent = True
        self.memory[0] = _LENT
        handle = None if self.is_known else DupFd(self.fd)
        self.is_known = True
        return source, self.number, handle, tuple(tensor.shape), tensor.dtype

    def retire(self) -> None:
        """Give it up; the training process sees that it need not keep it."""
        self.memory[0] = _RETIRED
        os.close(self.fd)

    def _come_back(self, is_shared: bool) -> None:
        self.is_shared = self.is_shared or is_shared
        self.is_held = False


class _Pool:
    """The segments of this worker."""

    def __init__(self) -> None:
        self._source: _Source = (os.getpid(), os.urandom(8))
        self._segments: list[_Segment] = []
        self._made = 0
        self._small: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a tensor, not cleared; None if there is no memory to be used again and no more may be made."""
        wanted = _bytes_of(shape, dtype)
        if wanted < BATCH_BYTES_MIN:
            return self.small(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
        with self._lock:
            segment = self._fitting(wanted) or self._new(wanted)
            return None if segment is None else segment.lend(shape, dtype)

    def small(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it; it will go through the queue as it is."""
        self._small[id(tensor)] = tensor
        return tensor

    def sent(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        """Return how a tensor that was made here goes over; None if torch has to see to it: it is another, or a second
        one in the same memory, or not the plain tensor any more that it was."""
        if tensor.requires_grad or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        if self._small.get(id(tensor)) is tensor and 0 < tensor.nbytes < BATCH_BYTES_MIN:
            return _copied, (tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), tuple(tensor.shape), tensor.dtype)
        for segment in tuple(self._segments):  # a copy: another thread may be making a tensor
            if segment.tensor() is tensor and segment.is_filled_by(tensor) and not segment.is_sent:
                return _received, segment.send(self._source, tensor)
        return None

    def close(self) -> None:
        """Close the descriptors of a pool that is another process's."""
        for segment in self._segments:
            os.close(segment.fd)

    def _fitting(self, wanted: int) -> _Segment | None:
        for segment in [one for one in self._segments if one.is_spoilt]:
            self._drop(segment)
        fitting = [one for one in self._segments if one.is_free and wanted <= one.size_bytes <= 2 * wanted]
        return min(fitting, key=lambda one: one.size_bytes, default=None)

    def _new(self, wanted: int) -> _Segment | None:
        # In steps of a quarter to an eighth, so that batches that differ by little can follow one another.
        step = 1 << max(wanted.bit_length() - 3, 12)
        size_bytes = -(-wanted // step) * step
        while len(self._segments) >= SEGMENTS_MAX or self._held_bytes() + size_bytes > POOL_BYTES_MAX:
            unfit = next((one for one in self._segments if one.is_free), None)
            if unfit is None:
                return None
            self._drop(unfit)
        try:
            segment = _Segment(self._made, size_bytes)
        except OSError:
            return None  # no descriptors, no memory, no memfd: torch's own way says so, if it is none either
        self._made += 1
        self._segments.append(segment)
        return segment

    def _held_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self._segments)

    def _drop(self, segment: _Segment) -> None:
        self._segments.remove(segment)
        segment.retire()


def _collated(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """torch's collation of tensors, into a segment if there is one."""
    first = batch[0]
    is_plain = type(first) is torch.Tensor and first.layout is torch.strided and first.device.type == "cpu"
    out = None
    if _pool is not None and is_plain and not first.is_nested and not first.is_quantized:
        out = _pool.tensor((len(batch), *first.shape), first.dtype)
    if out is not None:
        return torch.stack(list(batch), 0, out=out)
    made: torch.Tensor = collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
    return made


def _numbers(collate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's collation of numbers, whose tensor goes through the queue as it is."""

    def collated(batch: Sequence[Any], *, collate_fn_map: Any = None) -> torch.Tensor:
        made = collate(batch, collate_fn_map=collate_fn_map)
        return made if _pool is None else _pool.small(made)

    return collated


def _reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor goes into the queue."""
    sent = _pool.sent(tensor) if _pool is not None else None
    return reduce_tensor(tensor) if sent is None else sent  # type: ignore[no-untyped-call]


# -- in the training process -------------------------------------------------------------------------------------------


def _copied(data: bytes, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a small tensor that came as it is."""
    return _shaped(torch.frombuffer(bytearray(data), dtype=torch.uint8), shape, dtype)


def _received(source: _Source, number: int, handle: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that a worker handed over."""
    if handle is not None:
        _forget_ended()
        fd = handle.detach()
        try:
            _mapped[source, number] = np.frombuffer(mmap.mmap(fd, 0), np.uint8)
        finally:
            os.close(fd)
    memory = _mapped[source, number]

    def come_back(is_shared: bool) -> None:
        if is_shared:
            _mapped.pop((source, number), None)
        memory[0] = _GONE if is_shared else _FREE
        if not _is_running(source):
            _forget_ended()

    return _tensor_on(_Lease(memory, _bytes_of(shape, dtype), come_back), shape, dtype)


def _forget_ended() -> None:
    """Forget what its worker gave up and what ended workers left; what is in use stays mapped until it is not."""
    for key in list(_mapped):  # not its items: to make those may collect garbage, and that forgets some meanwhile
        memory = _mapped.get(key)
        if memory is not None and (memory[0] == _RETIRED or not _is_running(key[0])):
            _mapped.pop(key, None)


def _is_running(source: _Source) -> bool:
    try:
        os.kill(source[0], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's: the number was given anew. What it keeps here is kept for longer, no more
    return True


# -- in both -----------------------------------------------------------------------------------------------------------


class _Lease:
    """Owner of a segment's bytes as a tensor sees them: torch keeps it alive as long as any view of them lives, unless
    the tensor's storage is given other memory. `come_back` is told whether somebody may look at these bytes still."""

    __slots__ = ("__array_interface__", "_come_back", "_forks", "_memory", "storage")
    _is_finalizing = staticmethod(sys.is_finalizing)

    def __init__(self, memory: _Array, size_bytes: int, come_back: Callable[[bool], None]) -> None:
        self._memory = memory
        self._come_back = come_back
        self._forks = _forks
        self.storage: Callable[[], torch.UntypedStorage | None] = lambda: None
        self.__array_interface__ = memory[_HEADER_BYTES : _HEADER_BYTES + size_bytes].__array_interface__

    def __del__(self) -> None:
        if self._is_finalizing():
            return
        storage = self.storage()
        if storage is not None:  # it has other memory now; an array that was made before keeps it alive, not this
            weakref.finalize(storage, _let_go, self._memory).atexit = False
        self._come_back(storage is not None or self._forks != _forks)


def _let_go(memory: _Array) -> None:
    """What refers to `memory` lives until this is called."""


def _tensor_on(lease: _Lease, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    data = torch.from_numpy(np.asarray(lease))
    lease.storage = weakref.ref(data.untyped_storage())
    return _shaped(data, shape, dtype)


def _shaped(data: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    # Not as a view, which is forbidden some things that a batch is not.
    return torch.empty(0, dtype=dtype, device="cpu").set_(data.untyped_storage()).resize_(tuple(shape))


def _bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _count_fork() -> None:
    global _forks
    _forks += 1


def _be_another_process() -> None:
    """A child has its parent's memory mapped: it writes to none of it, and keeps what it has a tensor on, no more."""
    global _pool
    _count_fork()
    if _pool is not None:
        _pool.close()
        _pool = _Pool()
    _mapped.clear()


# Before and after, for a thread that gets or drops a batch meanwhile.
os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_be_another_process)
