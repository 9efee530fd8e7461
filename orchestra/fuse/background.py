"""Starting a mount in the background: a process of its own, and a pipe on which it says how that went.

Owns: both ends of that pipe and the log file. Leaves to others: the command that the process runs (the command line
gives it), serving. The lines on the pipe are JSON: {"note": ...} for a person to read, then {"ready": pid} or
{"error": ...}.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from orchestra.errors import MountError


def start_in_background(
    command_with: Callable[[int], Sequence[str]], log_file: Path, on_note: Callable[[str], None]
) -> int:
    """Run the command that serves, given the descriptor to report on, as a process that outlives this one.

    Returns its pid once it is ready. Raises MountError with the sentence that it ended with, or when the log cannot be
    written.
    """
    with _opened(log_file) as log:
        ours, theirs = os.pipe()
        with os.fdopen(ours, "rb") as said:
            try:
                process = subprocess.Popen(
                    command_with(theirs),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
            finally:
                os.close(theirs)
            try:
                return _wait_ready(said, on_note, log_file)
            except BaseException:
                process.terminate()  # it unmounts what it may have mounted
                process.wait()
                raise


def _opened(log_file: Path) -> BinaryIO:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return log_file.open("ab")
    except OSError as error:
        raise MountError(
            f"the mount's log {log_file} cannot be written: {error.strerror}; set XDG_STATE_HOME to a folder of yours, "
            "or mount with --foreground"
        ) from error


def _wait_ready(said: Any, on_note: Callable[[str], None], log_file: Path) -> int:
    for line in said:
        message = json.loads(line)
        if "ready" in message:
            return int(message["ready"])
        if "error" in message:
            raise MountError(str(message["error"]))
        on_note(str(message["note"]))
    raise MountError(f"the process of the mount ended before it was ready; its log is {log_file}")


class ReadyPipe(logging.Handler):
    """The process's end: passes warnings on until the mount is ready, so that its starter's user sees them."""

    def __init__(self, fd: int) -> None:
        super().__init__(logging.WARNING)
        self._fd = fd
        os.set_inheritable(fd, False)

    def emit(self, record: logging.LogRecord) -> None:
        self.note(record.getMessage())

    def note(self, text: str) -> None:
        """Pass a line on to the starter's user."""
        self.say({"note": text})

    def ready(self) -> None:
        """Tell the starter that the mount answers, and let it go."""
        self.say({"ready": os.getpid()})
        self._end()

    def fail(self, sentence: str) -> None:
        """Tell the starter why there will be no mount."""
        self.say({"error": sentence})
        self._end()

    def say(self, message: dict[str, object]) -> None:
        """Write a message, unless the other end is gone or was told the last one."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self._end()

    def _end(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
