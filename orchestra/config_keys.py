"""How one value of the configuration is checked, and how its error reads.

Owns: the kinds of keys (sizes, durations, words ...), near misses of names, the length of a message. Leaves to others:
which keys there are (config_file, config_mounts) and where a value stood.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestra.errors import ConfigError
from orchestra.units import DURATION_LIMIT_S, format_duration, format_size, parse_duration_s, parse_size_bytes

# A message stays one readable line even when the value in it is a pasted megabyte.
MESSAGE_CHARACTERS_MAX = 600
# Python itself refuses to read numbers of over 4,300 digits, in words that do not help here.
NUMBER_CHARACTERS_MAX = 64
# More people than this are a group.
USERS_MAX = 256
_USER = re.compile(r"\*|@?[A-Za-z0-9_][A-Za-z0-9_.$-]{0,63}")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table: its name in the file, its field in the settings, and how its value is checked.

    `parse` takes what TOML gave and raises ValueError with a sentence that says what is allowed; `literal` turns the
    text of an environment variable into what TOML would have given.
    """

    name: str
    field: str
    parse: Callable[[object], object]
    literal: Callable[[str], object] = str


def sizes(least: int, most: int, *, power_of_two: bool = False) -> Callable[[object], int]:
    """Return a check for sizes from `least` to `most` bytes; it gives bytes."""
    allowed = f"{format_size(least)} to {format_size(most)}" + (", a power of two" if power_of_two else "")

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"expected a size such as 10GiB, got {value!r} (allowed: {allowed})")
        _check_length(value, "a size such as 10GiB", allowed)
        try:
            size = parse_size_bytes(value)
        except ValueError as error:
            raise ValueError(f"{error} (allowed: {allowed})") from error
        if not least <= size <= most or (power_of_two and size & (size - 1)):
            raise ValueError(f"{value!r} is not allowed (allowed: {allowed})")
        return size

    return parse


def durations(least_s: float) -> Callable[[object], float]:
    """Return a check for durations of at least `least_s`; it gives seconds."""
    allowed = f"{format_duration(least_s)} to 100 years"

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"expected a duration such as 60s, got {value!r} (allowed: {allowed})")
        _check_length(value, "a duration such as 60s", allowed)
        try:
            seconds = parse_duration_s(value)
        except ValueError as error:
            raise ValueError(f"{error} (allowed: {allowed})") from error
        if not least_s <= seconds <= DURATION_LIMIT_S:
            raise ValueError(f"{value!r} is not allowed (allowed: {allowed})")
        return seconds

    return parse


def _check_length(value: object, expected: str, allowed: str) -> None:
    if isinstance(value, str) and len(value) > NUMBER_CHARACTERS_MAX:
        raise ValueError(f"expected {expected}, got a text of {len(value)} characters (allowed: {allowed})")


def counts(least: int, most: int) -> Callable[[object], int]:
    """Return a check for whole numbers from `least` to `most`."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}, got {value!r}")
        return value

    return parse


def ratios(least: float, most: float) -> Callable[[object], float]:
    """Return a check for numbers from `least` to `most`."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"expected a number from {least:g} to {most:g}, got {value!r}")
        return float(value)

    return parse


def words(*allowed: str) -> Callable[[object], str]:
    """Return a check for one of `allowed`."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}, got {value!r}")
        return value

    return parse


def switch(value: object) -> bool:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def folder(value: object) -> Path:
    """Check for an absolute path; a leading `~` is the home folder."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected the path of a folder, got {value!r}")
    try:
        folder = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the home folder in {value!r} is not known") from error
    if not folder.is_absolute():
        raise ValueError(f"expected an absolute path, got {value!r}")
    return folder


def users(value: object) -> tuple[str, ...]:
    """Check for a list of users of this machine: names, numbers, "@group", or "*" for all."""
    if not isinstance(value, list) or len(value) > USERS_MAX:
        raise ValueError(f'expected a list of at most {USERS_MAX} users such as ["alice", "@ml"], got {value!r}')
    for one in value:
        if not isinstance(one, str) or _USER.fullmatch(one) is None:
            raise ValueError(f'expected the name or number of a user, "@group" or "*", got {one!r}')
    return tuple(value)


def switch_literal(text: str) -> object:
    """Return the boolean that `text` names, else `text` (which `switch` then refuses)."""
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)


def number_literal(text: str) -> object:
    """Return the number that `text` names, else `text` (which the key's check then refuses)."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a near miss of one of `known`, else the list of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(names)})"


def config_error(message: str) -> ConfigError:
    """Return the error for `message`, cut where it would be longer than a person reads."""
    if len(message) > MESSAGE_CHARACTERS_MAX:
        message = message[:MESSAGE_CHARACTERS_MAX] + " ..."
    return ConfigError(message)


def checked(where: str, key: Key, value: object) -> object:
    """Return the setting that `value` means. Raises ConfigError that begins with `where`."""
    try:
        return key.parse(value)
    except ValueError as error:
        raise config_error(f"{where}: {error}") from error
