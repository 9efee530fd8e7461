"""What an answer to a range request must look like before its body is taken for the bytes that were asked for. Pure.

Owns: status, encoding, range, length and version of an answer. Leaves to others: getting it (range_client,
http_client). Without aiohttp: the courier's process (engine/courier_process.py) looks at answers by the same
rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from orchestra.errors import StoreError
from orchestra.stores.range_client import RangeAnswer
from orchestra.stores.translate import Operation, changed, error_for_status, retry_after_s, s3_code, unavailable
from orchestra.units import MIB
from orchestra.values import ByteRange, weak_version

# A server that ignores Range sends the whole object: reading up to 16 MiB to cut a block out of it is a slow answer,
# more would be a download per block.
WHOLE_BODY_BYTES_MAX = 16 * MIB
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\s*\Z")


def check_plain_answer(
    answer: RangeAnswer,
    operation: Operation,
    *,
    byte_range: ByteRange,
    size_bytes: int,
    version: str,
    now_s: float,
) -> None:
    """Return if the body of `answer` is exactly `byte_range` of that version; else raise what the answer says."""
    headers = answer.headers
    if answer.status != 206:
        wait_s = retry_after_s(headers, now_s=now_s)
        code = s3_code(bytes(answer.data).decode("utf-8", "replace"))
        raise error_for_status(answer.status, operation, code=code, retry_after_s=wait_s)
    check_encoding(headers, operation)
    check_range_answer(answer.status, headers, byte_range, size_bytes, operation)
    now = version_of_headers(headers, size_bytes)
    if now != version:
        raise changed(operation, was=version, now=now)
    if len(answer.data) != byte_range.length:
        raise unavailable(operation, f"the body has {len(answer.data)} bytes instead of {byte_range.length}")


def check_encoding(headers: Mapping[str, str], operation: Operation) -> None:
    """Raise StoreError for a compressed answer: its lengths and offsets are not those of the object."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "aws-chunked"):
        raise StoreError(
            operation.failed(
                f"the server sends it with Content-Encoding {encoding!r}, so byte ranges would be of the compressed"
                " form: turn compression off for this folder"
            )
        )


def check_range_answer(
    status: int, headers: Mapping[str, str], wanted: ByteRange, size_bytes: int, operation: Operation
) -> int:
    """Return how many bytes of the body come before `wanted`: 0 for a right 206, its start for a small whole body.

    Raises StoreUnavailableError for another range, StaleObjectError for another size, StoreError for a large body
    from a server that ignores ranges.
    """
    if status == 206:
        match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if match is None:
            raise unavailable(operation, "the answer to a range request has no readable Content-Range")
        got = (int(match[1]), int(match[2]) + 1)
        if got != (wanted.start, wanted.stop):
            raise unavailable(
                operation, f"asked for the bytes [{wanted.start}, {wanted.stop}) and got [{got[0]}, {got[1]})"
            )
        if match[3] != "*" and int(match[3]) != size_bytes:
            raise changed(operation, was=f"{size_bytes} bytes", now=f"{match[3]} bytes")
        return 0
    length = headers.get("Content-Length", "")
    if length.isdigit() and int(length) != size_bytes:
        raise changed(operation, was=f"{size_bytes} bytes", now=f"{length} bytes")
    if wanted.start and wanted.stop > WHOLE_BODY_BYTES_MAX:
        raise StoreError(operation.failed("the server ignores byte ranges and the object is too large to be cut here"))
    return wanted.start


def mtime_ns_of(last_modified: str) -> int:
    """Return a Last-Modified header in nanoseconds since 1970, 0 without a readable one."""
    try:
        return int(parsedate_to_datetime(last_modified).timestamp()) * 10**9
    except (ValueError, TypeError, OverflowError):
        return 0


def version_of_headers(headers: Mapping[str, str], size_bytes: int) -> str:
    """Return the ETag as sent, else size and modification time."""
    etag = headers.get("ETag", "").strip()
    return etag or weak_version(size_bytes, mtime_ns_of(headers.get("Last-Modified", "")))
