"""What differs between two listings of one prefix. Pure.

Owns: the comparison. Leaves to others: what is done about it.
"""

from __future__ import annotations

from orchestra.metadata.records import Record, RecordEntry

# Beyond so many names a listing is told of as a whole.
NAMES_MAX = 4096


def differ(old: RecordEntry | None, new: RecordEntry | None) -> bool:
    """Whether the store now says something else. Times do not count: a store may tell them to the millisecond in a
    listing and to the second in an answer to HEAD."""
    if old is None or new is None:
        return old is not new
    return (old.kind, old.size_bytes, old.version) != (new.kind, new.size_bytes, new.version)


def differing_names(old: Record, new: Record, *, names_max: int = NAMES_MAX) -> list[bytes] | None:
    """Return the names that came, went or are another version; None if they are more than `names_max`.

    A million rows of which none differs cost a comparison of memory; else it is some 2 us a row.
    """
    if old.same_rows(new):
        return []
    found: list[bytes] = []
    left = right = 0
    while left < len(old) or right < len(new):
        ours = old.row(left) if left < len(old) else None
        theirs = new.row(right) if right < len(new) else None
        if ours is None or (theirs is not None and theirs.name < ours.name):
            assert theirs is not None
            found.append(theirs.name)
            right += 1
        elif theirs is None or ours.name < theirs.name:
            found.append(ours.name)
            left += 1
        else:
            if differ(ours, theirs):
                found.append(ours.name)
            left += 1
            right += 1
        if len(found) > names_max:
            return None
    return found
