"""Proof that a request between nodes comes from one that has the cluster's secret; pure but for the secret's file.

Owns: the headers, what they cover, what is refused. Leaves to others: which routes ask for it (the daemon's listener),
sending (peers).

The proof is HMAC-SHA256 with the secret over method, path with its query, byte range, body, time, a nonce, and the ids
of sender and addressee: what was overheard can neither be sent again nor sent to another node. The secret itself is
never sent. Bytes in flight are neither hidden nor proved by it, and neither is the answer: where the network between
nodes is not trusted, it has to be encrypted. A process that starts knows no nonces: what was overheard in the five
minutes before could be sent to it once more.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from orchestra.clock import Clock
from orchestra.errors import ConfigError, ProofError

FROM: Final = "Orchestra-From"
TO: Final = "Orchestra-To"
TIME: Final = "Orchestra-Time"
NONCE: Final = "Orchestra-Nonce"
MAC: Final = "Orchestra-Proof"
RANGE: Final = "Range"
# Clocks that ntp keeps differ by milliseconds, those that nothing keeps by minutes.
SKEW_MAX_S: Final = 300
# 60 bytes each: 16 MB. At 1,000 requests a second the window is 262 s instead of 300, at 5,000 it is 52 s: still far
# more than clocks differ.
NONCES_MAX: Final = 1 << 18
SECRET_BYTES_MIN: Final = 16
SECRET_BYTES_MAX: Final = 4096
_PURPOSE = "orchestra request proof 1"
_TIME = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_NONCE = re.compile(r"[0-9A-Za-z._-]{8,64}\Z", re.ASCII)
_ID_CHARACTERS_MAX = 255


def sign(
    secret: bytes,
    method: str,
    path: str,
    byte_range: str,
    now_s: int,
    nonce: str,
    from_id: str,
    to_id: str,
    body: bytes = b"",
) -> dict[str, str]:
    """Return the headers that prove the request. `path` is what stands in the request line, with its query;
    `byte_range` is the value of the header Range ("" for none; it is not among the returned headers)."""
    mac = _mac(secret, (method, path, byte_range, str(now_s), nonce, from_id, to_id), body)
    return {FROM: from_id, TO: to_id, TIME: str(now_s), NONCE: nonce, MAC: mac}


class ProofSigner:
    """Signs the requests of one node, each with a nonce of its own."""

    def __init__(self, secret: bytes, own_id: str, clock: Clock) -> None:
        self._secret = secret
        self._own_id = own_id
        self._clock = clock
        self._process = secrets.token_hex(8)
        self._count = 0

    def headers(self, method: str, path: str, to_id: str, *, byte_range: str = "", body: bytes = b"") -> dict[str, str]:
        """Return the headers for one request to `to_id`; see `sign`. A request that is repeated is signed anew."""
        self._count += 1
        nonce = f"{self._process}-{self._count:x}"
        now_s = int(self._clock.wall_s())
        return sign(self._secret, method, path, byte_range, now_s, nonce, self._own_id, to_id, body)


class ProofChecker:
    """Checks the requests that one node receives. Remembers nonces for as long as their time would be accepted; where
    more than `nonces_max` would have to be remembered, it accepts a shorter time instead."""

    def __init__(self, secret: bytes, own_id: str, clock: Clock, *, nonces_max: int = NONCES_MAX) -> None:
        self._secret = secret
        self._own_id = own_id
        self._clock = clock
        self._nonces_max = nonces_max
        self._seen: dict[int, set[int]] = {}  # by the second that the sender signed
        self._seen_count = 0
        self._accepted_after_s = 0
        self._swept_s = 0

    @property
    def nonce_count(self) -> int:
        """How many nonces are remembered."""
        return self._seen_count

    def check(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> str:
        """Return the id of the node that sent the request, whose body is `body`. Raises ProofError.

        `headers` finds names however they are written (aiohttp's does), or has them as this module writes them.
        """
        from_id, to_id, mac = headers.get(FROM, ""), headers.get(TO, ""), headers.get(MAC, "")
        time, nonce = headers.get(TIME, ""), headers.get(NONCE, "")
        if not (from_id and to_id and mac and time and nonce):
            raise ProofError(f"{method} {path[:200]}: the request carries no proof of the cluster's secret")
        if not (_TIME.match(time) and _NONCE.match(nonce) and len(from_id) <= _ID_CHARACTERS_MAX):
            raise ProofError(f"{method} {path[:200]}: not a proof of the cluster's secret")
        if to_id != self._own_id:
            raise ProofError(f"the request of {from_id} was signed for {to_id[:300]}, and this node is {self._own_id}")
        fields = (method, path, headers.get(RANGE, ""), time, nonce, from_id, to_id)
        # As bytes: what others send need not be ASCII, which compare_digest wants of text.
        if not hmac.compare_digest(_mac(self._secret, fields, body).encode(), mac.encode("utf-8", "surrogateescape")):
            raise ProofError(f"the request of {from_id} is not signed with this cluster's secret: compare secret_file")
        self._note(from_id, int(time), nonce)
        return from_id

    def _note(self, from_id: str, time_s: int, nonce: str) -> None:
        """Remember a request that is signed rightly. Raises ProofError for one of another time, or seen before."""
        now_s = int(self._clock.wall_s())
        if abs(now_s - time_s) > SKEW_MAX_S:
            raise ProofError(
                f"the clocks of {from_id} and {self._own_id} differ by {abs(now_s - time_s)} s (at most {SKEW_MAX_S}): "
                "set them (ntp)"
            )
        self._forget_before(now_s - SKEW_MAX_S)
        if time_s <= self._accepted_after_s:
            raise ProofError(f"the request of {from_id} is {now_s - time_s} s old, which is too old for a busy node")
        seen = self._seen.setdefault(time_s, set())
        mark = hash((from_id, nonce))
        if mark in seen:
            raise ProofError(f"the request of {from_id} came before: it is refused the second time")
        seen.add(mark)
        self._seen_count += 1
        if self._seen_count > self._nonces_max:
            self._accepted_after_s = min(self._seen)
            self._seen_count -= len(self._seen.pop(self._accepted_after_s))

    def _forget_before(self, oldest_s: int) -> None:
        if oldest_s == self._swept_s:
            return
        self._swept_s = oldest_s
        for time_s in [time_s for time_s in self._seen if time_s < oldest_s]:
            self._seen_count -= len(self._seen.pop(time_s))


def read_secret(path: Path | str) -> bytes:
    """Return the secret in the file, less white space around it. Raises ConfigError: one line that names the file, what
    is wrong with it, and what to do."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_file(path, os.fstat(fd))
            secret = os.read(fd, SECRET_BYTES_MAX + 1).strip()
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"secret_file {path} cannot be read: {error.strerror}") from error
    if not secret:
        raise ConfigError(f"secret_file {path} is empty: head -c 32 /dev/urandom | base64 > {path}")
    if not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise ConfigError(
            f"secret_file {path} holds {len(secret)} bytes; a secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}"
        )
    return secret


def _check_file(path: Path | str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"secret_file {path} is not a file")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"secret_file {path} can be used by others (mode {mode:04o}): chmod 600 {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"secret_file {path} belongs to another user: chown it to the one who runs the daemon")


def _mac(secret: bytes, fields: tuple[str, ...], body: bytes) -> str:
    if any("\n" in text for text in fields):
        raise ProofError("a line break in a request's first line, range or node id")
    text = "\n".join((_PURPOSE, *fields, hashlib.sha256(body).hexdigest()))
    return hmac.new(secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
