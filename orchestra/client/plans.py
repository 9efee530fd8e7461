"""Publishing a reader's plan to its node's daemon: the paths once, then each epoch's order, then where the reader is.

Owns: what was sent and what has to be sent (again, when the daemon is another one). Leaves to others: making orders
(the faces), carrying them out (prefetch). Its sockets are its own and give up early: a plan is help, and a daemon that
hangs must not hold up a training that it does not have to serve.
"""

from __future__ import annotations

import os
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestra.blocks.layout import CacheLayout
from orchestra.client.process import start_daemon
from orchestra.client.wire import ConnectionLostError, DaemonConnection, Posting
from orchestra.config import Config
from orchestra.errors import DaemonUnavailableError, UsageError
from orchestra.prefetch.path_table import pack_paths, table_name
from orchestra.prefetch.plan import NEXT_SAMPLES_MAX, ORDER_PART_SAMPLES, packed_samples

__all__ = ["NEXT_SAMPLES_MAX", "PlanPublisher"]

# A message of 4 MiB that is not taken within this time will not be.
_PUBLISH_TIMEOUT_S = 30.0
# What a training may wait for a message about its position, of which there are ten a second at most.
_POSITION_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Sent:
    epoch: int
    samples: array[int]
    count: int  # how many of them the daemon has


class PlanPublisher:
    """One reader's plan. One thread; after a fork the child publishes nothing.

    Every method may raise any OrchestraError: DaemonUnavailableError when none answers, UsageError for what cannot be
    planned.
    """

    def __init__(self, config: Config, paths: Sequence[str]) -> None:
        """`paths` are absolute in the namespace, by sample. Nothing is sent yet. Raises UsageError."""
        self._config = config
        self._paths_count = len(paths)
        self._parts = list(pack_paths(paths))
        self._table = table_name(self._parts)
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._pid = os.getpid()
        self._sent: list[_Sent] = []
        socket_path = str(CacheLayout(config.cache.dir).socket)
        self._publishing = DaemonConnection(socket_path, timeout_s=_PUBLISH_TIMEOUT_S)
        self._moving = DaemonConnection(socket_path, timeout_s=_POSITION_TIMEOUT_S)
        self._positions = Posting(self._moving)
        self.rest_s = 0.0  # for so long the daemon need not hear where the reader is
        self.failure = ""  # why the first of the files that could not be fetched could not be

    @property
    def messages_sent(self) -> int:
        """How many requests were sent to the daemon."""
        return self._publishing.messages_sent + self._moving.messages_sent

    def publish(self, epoch: int, samples: array[int]) -> None:
        """Have the daemon know the order of the epoch that begins now, and forget earlier ones; what it knows of the
        next one stays if this is what it was told before. Starts the daemon if it may."""
        self._sent = [sent for sent in self._sent if sent.epoch >= epoch]
        self._publish(epoch, samples, len(samples))
        self._positions.close()  # what is outstanding says nothing of this epoch
        self.rest_s = 0.0
        begins = {"plan": self.name, "epoch": epoch, "position": 0}
        if not self._request("POST", "/v1/plans/position", begins)["known"]:  # a daemon that was started since
            self.publish_again()
            self._request("POST", "/v1/plans/position", begins)

    def publish_next(self, epoch: int, samples: array[int], count: int) -> None:
        """Have it know the first `count` samples of the epoch after, too."""
        self._publish(epoch, samples, min(count, len(samples)))

    def _publish(self, epoch: int, samples: array[int], count: int) -> None:
        known = next((sent for sent in self._sent if sent.epoch == epoch), None)
        first = known.count if known is not None and known.samples == samples else 0
        self._sent = [sent for sent in self._sent if sent.epoch < epoch or (first and sent.epoch > epoch)]
        self._sent.append(_Sent(epoch, samples, count))
        self._sent.sort(key=lambda sent: sent.epoch)
        try:
            self._send_order(epoch, samples, first, count)
        except UsageError:
            self.publish_again()  # a daemon that was started since

    def publish_again(self) -> None:
        """Send everything once more: the daemon is another one."""
        declared = self._request("POST", "/v1/plans/paths", {"paths": self._table, "count": self._paths_count})
        for part in declared["missing_parts"]:
            self._request("POST", f"/v1/plans/paths/part?paths={self._table}&part={part}", self._parts[part])
        for sent in self._sent:
            self._send_order(sent.epoch, sent.samples, 0, sent.count)

    def move(self, epoch: int, offset: int) -> bool:
        """Say that `offset` samples of that epoch were drawn; False if the daemon knows nothing of it (then
        `publish_again`). Never starts a daemon."""
        body = {"plan": self.name, "epoch": epoch, "position": offset}
        answer = self._send(self._moving, "POST", "/v1/plans/position", body)
        self.failure = str(answer.get("failure", ""))
        return bool(answer["known"])

    def move_soon(self, epoch: int, offset: int) -> bool:
        """As `move`, for a training that must not wait for it: the answer is that to the position before, True if
        there is none yet. While the daemon has not answered, nothing more is said."""
        body = {"plan": self.name, "epoch": epoch, "position": offset}
        try:
            before = self._positions.post("/v1/plans/position", body)
        except ConnectionLostError as lost:
            raise self._absent() from lost
        if before is None:
            return True
        self.rest_s = float(before.get("rest_s", 0.0))
        self.failure = str(before.get("failure", ""))
        return bool(before["known"])

    @property
    def is_waiting(self) -> bool:
        """Whether the daemon has not answered the last `move_soon` yet."""
        return self._positions.is_waiting

    def end(self) -> None:
        """Say that the reader will read no more. Never starts a daemon; says nothing if nothing is known to it."""
        if not self._sent:
            return
        self._sent.clear()
        self._send(self._moving, "POST", "/v1/plans/end", {"plan": self.name})

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._positions.close()
        self._publishing.close()
        self._moving.close()

    @property
    def is_own(self) -> bool:
        """Whether this is the process that made it: a forked worker's copy of a sampler is nobody's reader."""
        return self._pid == os.getpid()

    def _send_order(self, epoch: int, samples: array[int], first: int, count: int) -> None:
        query = f"plan={self.name}&paths={self._table}&epoch={epoch}&total={len(samples)}"
        for start in range(first, count, ORDER_PART_SAMPLES):
            part = samples[start : min(count, start + ORDER_PART_SAMPLES)]
            self._request("POST", f"/v1/plans/order?{query}&first={start}", packed_samples(part))

    def _request(self, method: str, route: str, body: dict[str, Any] | bytes) -> dict[str, Any]:
        try:
            return self._send(self._publishing, method, route, body)
        except DaemonUnavailableError:
            if not self._config.daemon.autostart:
                raise
            start_daemon(self._config, autostarted=True)
            return self._send(self._publishing, method, route, body)

    def _send(
        self, connection: DaemonConnection, method: str, route: str, body: dict[str, Any] | bytes
    ) -> dict[str, Any]:
        try:
            return connection.request(method, route, body)
        except ConnectionLostError as lost:
            raise self._absent() from lost

    def _absent(self) -> DaemonUnavailableError:
        return DaemonUnavailableError(
            f"no daemon runs for cache.dir {self._config.cache.dir}; start one with: orchestra daemon start"
        )
