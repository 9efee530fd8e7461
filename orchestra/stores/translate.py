"""The border where foreign failures become ours: one sentence each, credentials and request noise left out.

Owns: which HTTP status and S3 code is which error. Leaves to others: how a library words its failures (each store
knows its own) and what is done about an error (retry.py, limit.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from orchestra.errors import (
    AccessDeniedError,
    NotFoundError,
    OrchestraError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)

# A foreign message is quoted up to here; the rest is request dumps.
REASON_CHARACTERS_MAX = 300
KEY_CHARACTERS_MAX = 200


class UnreachableError(StoreUnavailableError):
    """No connection came about: refused, or no such host. Only retry.py tells it from its parent."""


class ThrottledError(StoreUnavailableError):
    """The store asks for fewer requests (429, 503, SlowDown). Only limit.py tells it from its parent."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What was being done when something failed, for the sentence: `read`, a key, and the store's public name."""

    verb: str
    key: str
    store: str

    def failed(self, reason: str) -> str:
        """Return the sentence "cannot read 'a.jpg' in s3://bucket/: reason"; without a key only the store is named."""
        key = self.key if len(self.key) <= KEY_CHARACTERS_MAX else self.key[:KEY_CHARACTERS_MAX] + "..."
        return f"cannot {self.verb} {f'{key!r} in ' if key else ''}{self.store}: {reason}"


_THROTTLING_CODES = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServerBusy"})
_PASSING_CODES = frozenset({"RequestTimeout", "InternalError", "ServiceUnavailable", "OperationTimedOut"})
_CREDENTIAL_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"})
# 501 (not implemented) and 505 (version) are answers, not accidents.
_PASSING_STATUSES = frozenset({408, 425, 500, 502, 504, 507, 520, 521, 522, 523, 524})
_THROTTLING_STATUSES = frozenset({429, 503, 509})


def error_for_status(
    status: int, operation: Operation, *, code: str = "", retry_after_s: float | None = None
) -> OrchestraError:
    """Return the error for an HTTP answer: what a caller can do about it decides its class."""
    answer = f"HTTP {status} {code}".rstrip()
    failed = operation.failed
    if status in _THROTTLING_STATUSES or code in _THROTTLING_CODES:
        return ThrottledError(failed(f"the store asks for fewer requests ({answer})"), retry_after_s)
    if status in _PASSING_STATUSES or code in _PASSING_CODES:
        return StoreUnavailableError(failed(f"the store failed ({answer})"), retry_after_s)
    if code == "NoSuchBucket":
        return NotFoundError(failed("no such bucket: check the name and the endpoint"))
    if status in (404, 410):
        return NotFoundError(failed("no such object"))
    if code == "RequestTimeTooSkewed":
        return AccessDeniedError(failed(f"the store says this machine's clock is wrong ({answer}): set it"))
    if status in (401, 403, 407) or code in _CREDENTIAL_CODES:
        return AccessDeniedError(failed(f"the store refused the request ({answer}): check the mount's credentials"))
    if status in (412, 416):
        return StaleObjectError(failed("the object changed after it was opened: reopen it"))
    if 300 <= status < 400:
        return StoreError(failed(f"the store points elsewhere ({answer}): check the options region and endpoint_url"))
    return StoreError(failed(f"the store refused the request ({answer})"))


def unreachable(operation: Operation, reason: str) -> UnreachableError:
    """Return the error of a try that did not even get a connection."""
    return UnreachableError(operation.failed(reason))


def unavailable(operation: Operation, reason: str) -> StoreUnavailableError:
    """Return the error for a failure that another try may mend."""
    return StoreUnavailableError(operation.failed(one_line(reason)))


def as_stale(error: NotFoundError, operation: Operation) -> StaleObjectError:
    """Return the error of a read whose object has gone: it was opened, so it is stale rather than missing."""
    return StaleObjectError(operation.failed("the object is gone since it was opened"))


def changed(operation: Operation, *, was: str, now: str) -> StaleObjectError:
    """Return the error of a read that met another version, naming both."""
    return StaleObjectError(operation.failed(f"the object changed after it was opened ({was} is now {now}): reopen it"))


_SECRETS = (
    re.compile(
        r"(?i)\b(x-amz-(?:signature|credential|security-token)|sig|signature|token|secret|password|key)=[^&\s]+"
    ),
    re.compile(r"(?i)\b(authorization|x-amz-security-token)\s*[:=]\s*\S[^,;\"]*"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)()"),
)
_S3_CODE = re.compile(r"<Code>([A-Za-z0-9._-]{1,64})</Code>")


def one_line(text: str) -> str:
    """Return the first line of a foreign message, without credentials, XML or control characters, cut to a bound."""
    line = next((part.strip() for part in text.splitlines() if part.strip()), "no reason was given")
    line = re.sub(r"<\??[A-Za-z/][^>]*>", " ", line)
    for secret in _SECRETS:
        line = secret.sub(lambda match: f"{match[1]}=***" if match[1] else "***", line)
    line = "".join(character if character.isprintable() else " " for character in line)
    return re.sub(r" {2,}", " ", line).strip()[:REASON_CHARACTERS_MAX]


def s3_code(text: str) -> str:
    """Return the code of an S3 error document, or ""."""
    match = _S3_CODE.search(text)
    return match[1] if match else ""


def retry_after_s(headers: Mapping[str, str], *, now_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or a date), None without one or if unreadable."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
