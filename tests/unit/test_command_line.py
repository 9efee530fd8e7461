"""The command line's frame: which commands there are, how a run ends, what it prints then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from orchestra import __version__
from orchestra.cli.main import COMMANDS, cli, main
from orchestra.cli.output import format_percent, printable
from orchestra.errors import StoreError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Make `orchestra rm` raise what is put into the list."""
    errors: list[BaseException] = []

    @click.command()
    def rm() -> None:
        raise errors[0]

    monkeypatch.setattr("orchestra.cli.files.rm", rm)
    return errors


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    """Each line of `orchestra --help` is the first of that command's help, and the command exists."""
    context = click.Context(cli, info_name="orchestra")
    command = cli.get_command(context, name)
    assert command is not None
    assert command.help is not None
    assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name][1]


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Both print to standard output."""
    assert main(["--help"]) == 0
    assert "Commands:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"orchestra {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mont"], "no such command 'mont'; did you mean 'mount'?"),
        (["mount", "ad"], "Did you mean 'add'?"),
        (["ls", "--long"], "No such option '--long'"),
        (["cat"], "Missing argument 'PATH...'"),
        (["mount", "add", "/x", "s3://b", "--option", "novalue"], "expected KEY=VALUE"),
        (["x\ry\b"], "no such command 'x\\ry\\x08'"),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 30: an unknown command or flag is status 2, with a near miss where there is one, without a traceback."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert "Traceback" not in output.err


def test_an_error_is_one_line_and_status_1(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """What orchestra raises on purpose is one line on standard error, control characters escaped."""
    failing.append(StoreError("the store\nsaid \x1b[31mno"))
    assert main(["rm"]) == 1
    assert capsys.readouterr() == ("", "orchestra: the store\\nsaid \\x1b[31mno\n")


def test_debug_adds_the_traceback(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """--debug shows where an error came from, and the line after it."""
    failing.append(StoreError("no"))
    assert main(["--debug", "rm"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("orchestra: no\n")


def test_what_nobody_foresaw_is_called_a_bug(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """An error that is not orchestra's own is one line too, and says how to report it."""
    failing.append(ZeroDivisionError("by zero"))
    assert main(["rm"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "this is a bug" in error
    assert "--debug" in error


def test_an_interrupt_ends_with_130(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C prints nothing."""
    failing.append(KeyboardInterrupt())
    assert main(["rm"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_left_is_no_error() -> None:
    """Row 32: `orchestra --help | true` ends with 141 like any program in a pipe, and says nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "orchestra", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_output_that_cannot_be_written_is_one_line() -> None:
    """A full disk behind `>` is told as such, with status 1, and is no bug of ours."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "orchestra", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 1
    assert result.stderr == b"orchestra: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nothing(closed: str) -> None:
    """Started without standard streams, a command goes on, and nothing that it opens takes their place."""
    code = "import os; from orchestra.cli import main; main._open_closed_streams(); print(1); os.fstat(0), os.fstat(1)"
    result = subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" {closed} && "$0" -m orchestra --help {closed}', sys.executable, code],
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_arguments_need_not_be_utf_8() -> None:
    """Row 31: bytes that are no text arrive, and are shown as the bytes they are."""
    command: list[str | bytes] = [sys.executable, "-m", "orchestra", "rm", b"/caf\xe9"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(b"orchestra: cannot remove /caf\\xe9: ")


@pytest.mark.parametrize(
    "arguments", [["rm", "/x"], ["mkdir", "/x"], ["cp", "./a", "/x"], ["cp", "/x", "orchestra:///y"]]
)
def test_writing_is_refused_by_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that would write says that it cannot, before it looks at anything."""
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "cannot write to it" in error
    assert arguments[1] in error


def test_help_imports_no_command() -> None:
    """`orchestra --help` loads no client, no store library and no command's module."""
    code = (
        "import sys, json\n"
        "from orchestra.cli.main import main\n"
        "main(['--help'])\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    modules = set(json.loads(result.stderr))
    unwanted = {
        "orchestra.cli.files",
        "orchestra.client.node",
        "fsspec",
        "aiohttp",
        "obstore",
        "torch",
        "pyarrow",
        "rich",
    }
    assert "orchestra.cli.main" in modules
    assert not modules & unwanted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本", "plain é 日本"),
        ("a\nb\tc\x1b[0m", "a\\nb\\tc\\x1b[0m"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\ufeffx", "\\ufeffx"),
        ("caf\udce9", "caf\\xe9"),
    ],
)
def test_names_cannot_harm_a_terminal(text: str, shown: str) -> None:
    """Row 39: control, bidirectional and unpaired characters are printed escaped; other letters as they are."""
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "0 %"), (10, 10, "100 %"), (999_999, 1_000_000, "99 %"), (1, 1_000_000, "1 %"), (0, 0, "-")],
)
def test_a_percentage_is_never_rounded_to_all_or_nothing(part: int, whole: int, text: str) -> None:
    """Only everything is 100 %, and only nothing is 0 %."""
    assert format_percent(part, whole) == text


def test_every_command_is_documented() -> None:
    """docs/cli.md names each command and each command of a group."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    context = click.Context(cli, info_name="orchestra")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        below = sorted(command.commands) if isinstance(command, click.Group) else [""]
        for one in below:
            assert f"orchestra {name} {one}".strip() in text


def test_completion_prints_a_script() -> None:
    """The script for bash goes to standard output."""
    command = [sys.executable, "-m", "orchestra"]
    environ = os.environ | {"_ORCHESTRA_COMPLETE": "zsh_source"}
    result = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert b"_ORCHESTRA_COMPLETE=zsh_complete" in result.stdout
