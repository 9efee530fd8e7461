"""AWS Signature Version 4 for requests without a body, pure.

Owns: the canonical request and its signature. Leaves to others: sending (s3_wire.py). Golden-tested against the
examples of the S3 documentation.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_UNRESERVED = "-_.~"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key; never shown."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


def encode_path(path: str) -> str:
    """Return an S3 path as it is signed and sent: every byte but unreserved ones and "/" percent-encoded."""
    return quote(path, safe="/" + _UNRESERVED)


def encode_query(parameters: Sequence[tuple[str, str]]) -> str:
    """Return the canonical query: sorted, every byte but unreserved ones percent-encoded."""
    if not parameters:
        return ""
    pairs = [(quote(name, safe=_UNRESERVED), quote(value, safe=_UNRESERVED)) for name, value in parameters]
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


@dataclass(frozen=True, slots=True)
class Request:
    """What is signed: `path` and `query` are already encoded, `headers` hold at least `host`, names in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


@lru_cache(maxsize=4)
def _stamp(wall_s: int) -> str:
    """Return the time as it is signed; a thousand requests a second share one."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y%m%dT%H%M%SZ")


@lru_cache(maxsize=16)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    """Derive the key of one day: the same for every request of it, so derived once."""
    key = ("AWS4" + secret).encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _with_single_spaces(value: str) -> str:
    return " ".join(value.split()) if " " in value else value


def signed_headers(request: Request, credentials: Credentials, *, region: str, wall_s: float) -> dict[str, str]:
    """Return all headers to send: those of the request, the date, the payload's hash, and Authorization."""
    stamp = _stamp(int(wall_s))
    headers = {**request.headers, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    if credentials.session_token:
        headers["x-amz-security-token"] = credentials.session_token
    ordered = sorted(headers)
    names = ";".join(ordered)
    lines = "\n".join([f"{name}:{_with_single_spaces(headers[name])}" for name in ordered])
    canonical = f"{request.method}\n{request.path}\n{request.query}\n{lines}\n\n{names}\n{EMPTY_SHA256}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = _signing_key(credentials.secret_access_key, stamp[:8], region)
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope},SignedHeaders={names},Signature={signature}"
    )
    return headers
