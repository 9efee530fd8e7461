"""How commands print: names that cannot harm a terminal, sizes, times, columns, JSON.

Owns: the form of every line on standard output. Leaves to others: what is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from orchestra.units import format_size
from orchestra.values import Entry


def printable(text: str, *, keep: str = "") -> str:
    r"""Return `text` with control, bidirectional and unpaired characters written as \n, \x1b, \u202e, \xff.

    The characters in `keep` stay. Bytes of a name that are not UTF-8 (surrogates) show as the bytes they were.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def format_mtime(mtime_ns: int) -> str:
    """Return local date and time to the minute, or "-" where the store gave none."""
    if mtime_ns == 0:
        return "-"
    return datetime.fromtimestamp(mtime_ns / 1e9).strftime("%Y-%m-%d %H:%M")


def format_percent(part: int, whole: int) -> str:
    """Return "37 %", never "100 %" for less than all and never "0 %" for more than nothing; "-" of nothing."""
    if whole == 0:
        return "-"
    percent = round(100 * part / whole)
    if part < whole:
        percent = min(percent, 99)
    return f"{max(percent, 1) if part else 0} %"


def entry_fields(entry: Entry) -> dict[str, Any]:
    """Return what --json says about an entry; sizes and times exact."""
    return {
        "path": entry.path,
        "type": "directory" if entry.is_directory else "file",
        "size_bytes": entry.size_bytes,
        "mtime_ns": entry.mtime_ns,
        "version": entry.version,
    }


def entry_line(entry: Entry, name: str, *, long: bool) -> str:
    """Return the line of `ls`: the name, a directory's with "/" after it; `long` puts size and time before it."""
    shown = printable(name) + ("/" if entry.is_directory and not name.endswith("/") else "")
    if not long:
        return shown
    size = "-" if entry.is_directory else format_size(entry.size_bytes)
    return f"{'d' if entry.is_directory else '-'} {size:>10}  {format_mtime(entry.mtime_ns):>16}  {shown}"


def print_lines(lines: Iterable[str]) -> None:
    """Write each line to standard output."""
    for line in lines:
        sys.stdout.write(line + "\n")


def print_json(value: Any) -> None:
    """Write `value` as one JSON document; whatever a terminal or a strict reader could stumble over is escaped."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Write "name: value" lines with the values aligned; values are made printable."""
    width = max((len(name) for name, _ in fields), default=0) + 1
    print_lines(f"{name + ':':<{width}} {printable(value)}" for name, value in fields)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows in columns under `header`; cells are made printable, the last column is not padded."""
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print_lines("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
