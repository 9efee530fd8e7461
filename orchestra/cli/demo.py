"""`orchestra demo`: the main job on this machine, with nothing but this command.

Owns: options and what is printed. Leaves to others: running it (orchestra.demo).
"""

from __future__ import annotations

import importlib.util

import click

from orchestra.cli.output import print_json, printable
from orchestra.clock import SystemClock
from orchestra.errors import OrchestraError

_NEEDED = ("moto", "sklearn", "PIL", "torch")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; progress goes to standard error.")
@click.option("--keep", is_flag=True, help="Leave the temporary folder: configuration, cache, logs.")
@click.option(
    "--face",
    type=click.Choice(["auto", "fuse", "fsspec"]),
    default="auto",
    show_default=True,
    help="Read a mounted folder, or through fsspec; auto: fsspec only where nothing can be mounted.",
)
def demo(as_json: bool, keep: bool, face: str) -> None:
    """Train from a mounted S3 bucket, cold and warm, on this machine."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OrchestraError(f"the demo needs {', '.join(missing)}: pip install 'orchestra-fs[demo]'")
    from orchestra.demo.report import broken_promise
    from orchestra.demo.run import run_demo

    def say(line: str) -> None:
        click.echo(printable(line), err=as_json)

    clock = SystemClock()
    started_ns = clock.now_ns()
    report = run_demo(face, keep=keep, say=say)
    say(f"all of it took {(clock.now_ns() - started_ns) / 1e9:.0f} s")
    if as_json:
        print_json(report.as_json())
    wrong = broken_promise(report)
    if wrong is not None:
        raise OrchestraError(wrong)
