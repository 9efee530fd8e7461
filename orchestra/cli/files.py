"""`orchestra ls, cat, stat, du` and the refusals of `rm` and `mkdir`: files of the namespace.

Owns: walking, what is printed. Leaves to others: everything about data (client), `cp` (copying).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from orchestra.cli.node import where_lines
from orchestra.cli.output import (
    entry_fields,
    entry_line,
    format_mtime,
    format_percent,
    print_fields,
    print_json,
    print_lines,
    print_table,
    printable,
)
from orchestra.cli.session import Session, pass_session
from orchestra.client.export import read_pieces
from orchestra.config_mounts import uri_without_password
from orchestra.errors import ReadOnlyError
from orchestra.units import format_size
from orchestra.values import Entry

if TYPE_CHECKING:
    from orchestra.client.directory import NodeDirectory
    from orchestra.client.node import NodeClient

_json_option = click.option("--json", "as_json", is_flag=True, help="Print exact values as JSON.")


def walk(list_directory: Callable[[str], Iterable[Entry]], root: Entry) -> Iterator[Entry]:
    """Yield `root` and everything below it, a directory before what it holds, names in order."""
    pending = [root]
    while pending:
        entry = pending.pop()
        yield entry
        if entry.is_directory:
            pending.extend(reversed(list(list_directory(entry.path))))


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("-l", "long", is_flag=True, help="Show sizes and times too.")
@click.option("-R", "--recursive", is_flag=True, help="List what is below, too.")
@_json_option
@pass_session
def ls(session: Session, paths: tuple[str, ...], long: bool, recursive: bool, as_json: bool) -> None:
    """List folders and files."""
    client = session.client
    lister = _Lister(client)
    roots = [client.stat(path) for path in paths or ("/",)]
    if as_json:
        print_json([entry_fields(entry) for root in roots for entry in _listed(lister, root, recursive)])
    else:
        _print_listing(lister, roots, long=long, recursive=recursive)
    lister.warn()


class _Lister:
    """Lists directories, and remembers how many keys were there that no path can show."""

    def __init__(self, client: NodeClient) -> None:
        self._client = client
        self._hidden: dict[str, tuple[int, str]] = {}

    def list(self, path: str) -> NodeDirectory:
        """See Client."""
        view = self._client.list(path)
        if view.hidden_count:
            self._hidden[path] = view.hidden_count, f"{path.rstrip('/')}/{view.hidden_example}"
        return view

    def warn(self) -> None:
        """Say so, in one line, if there were any."""
        if not self._hidden:
            return
        count = sum(count for count, _ in self._hidden.values())
        _, example = next(iter(self._hidden.values()))
        what = f"{count} {'key is' if count == 1 else 'keys are'} hidden that no path can show"
        click.echo(f"orchestra: warning: {what}, such as {printable(example)}", err=True)


def _print_listing(lister: _Lister, roots: list[Entry], *, long: bool, recursive: bool) -> None:
    files = [root for root in roots if not root.is_directory]
    print_lines(entry_line(entry, entry.path, long=long) for entry in files)
    folders = [root for root in roots if root.is_directory]
    headed = recursive or len(roots) > 1
    first = not files
    for root in folders:
        for folder in walk(lister.list, root) if recursive else [root]:
            if not folder.is_directory:
                continue
            if headed:
                print_lines([f"{'' if first else chr(10)}{printable(folder.path)}:"])
            first = False
            print_lines(entry_line(entry, entry.name, long=long) for entry in lister.list(folder.path))


def _listed(lister: _Lister, root: Entry, recursive: bool) -> Iterator[Entry]:
    if not root.is_directory:
        yield root
    elif recursive:
        yield from islice(walk(lister.list, root), 1, None)
    else:
        yield from lister.list(root.path)


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@pass_session
def cat(session: Session, paths: tuple[str, ...]) -> None:
    """Write files to standard output."""
    for path in paths:
        handle = session.client.open(path)
        try:
            for piece in read_pieces(handle):
                sys.stdout.buffer.write(piece)
        finally:
            handle.close()
    sys.stdout.buffer.flush()


@click.command()
@click.argument("path")
@_json_option
@pass_session
def stat(session: Session, path: str, as_json: bool) -> None:
    """Show what is known about a path, and how much of it is cached."""
    client = session.client
    entry = client.stat(path)
    cached_bytes = client.cached_bytes(entry)
    node = f"this node ({client.config.cache.dir})"
    mount = _mount_of(session, entry.path)
    is_pinned = _is_pinned(session, entry.path)
    nodes = [] if client.config.cluster is None or entry.is_directory else _nodes_of(session, entry.path)
    if as_json:
        where = [node] if cached_bytes else []
        percent = 100 * cached_bytes / entry.size_bytes if entry.size_bytes else None
        # Of a folder `du` says it: nothing would be untrue.
        known = None if entry.is_directory else cached_bytes
        cached = {"cached_bytes": known, "cached_percent": percent, "where": where, "nodes": nodes, "pinned": is_pinned}
        print_json({**entry_fields(entry), **cached, "mount": mount and mount[0], "uris": mount and mount[1]})
        return
    fields = [("path", entry.path), ("type", "directory" if entry.is_directory else "file")]
    if not entry.is_directory:
        of = f"{format_size(cached_bytes)} ({format_percent(cached_bytes, entry.size_bytes)})"
        fields += [
            ("size", f"{format_size(entry.size_bytes)} ({entry.size_bytes} bytes)"),
            ("version", entry.version),
            ("modified", _exact_time(entry.mtime_ns)),
            ("cached", of),
        ]
        if nodes:
            fields += [("node", line) for line in where_lines(nodes, entry.size_bytes)]
        else:
            fields.append(("where", node if cached_bytes else "the store only"))
    if is_pinned:
        fields.append(("pinned", "yes: what is cached of it stays (see: orchestra pin)"))
    if mount is not None:
        fields.append(("store", f"{' '.join(mount[1])} (mounted at {mount[0]})"))
    print_fields(fields)


def _is_pinned(session: Session, path: str) -> bool:
    """Whether a pin covers the path."""
    answer = session.daemon_request("GET", "/v1/pins?sizes=no")
    pins = [row["path"].rstrip("/") for row in answer["pins"]]
    return any(path == pin or path.startswith(f"{pin}/") for pin in pins)


def _nodes_of(session: Session, path: str) -> list[dict[str, Any]]:
    """Return what each node of the cluster holds of a file."""
    nodes: list[dict[str, Any]] = session.daemon_request("POST", "/v1/nodes/where", {"path": path})["nodes"]
    return nodes


def _exact_time(mtime_ns: int) -> str:
    if mtime_ns == 0:
        return format_mtime(mtime_ns)
    return datetime.fromtimestamp(mtime_ns // 10**9, UTC).astimezone().isoformat(sep=" ")


def _mount_of(session: Session, path: str) -> tuple[str, list[str]] | None:
    """Return the mount that covers `path` and its stores: the longest prefix."""
    tables: list[dict[str, Any]] = session.daemon_request("GET", "/v1/mounts")["mounts"]
    covering = [
        table for table in tables if table["path"] == "/" or f"{path}/".startswith(f"{table['path'].rstrip('/')}/")
    ]
    if not covering:
        return None
    best = max(covering, key=lambda table: len(table["path"]))
    return best["path"], [uri_without_password(uri) for uri in best["uris"]]


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("-s", "--summarize", is_flag=True, help="Only the total of each PATH.")
@_json_option
@pass_session
def du(session: Session, paths: tuple[str, ...], summarize: bool, as_json: bool) -> None:
    """Show how many bytes a tree has, and how many of them are cached."""
    rows = [row for path in paths or ("/",) for row in _usage(session, path, summarize)]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("SIZE", "CACHED", "", "FILES", "PATH"),
        [
            (
                format_size(row["bytes"]),
                format_size(row["cached_bytes"]),
                format_percent(row["cached_bytes"], row["bytes"]),
                str(row["files"]),
                row["path"],
            )
            for row in rows
        ],
    )


def _usage(session: Session, path: str, summarize: bool) -> list[dict[str, Any]]:
    """Return one row per directory below `path`, what it holds before itself, or one row for `path` alone."""
    client = session.client
    root = client.stat(path)
    rows: dict[str, dict[str, Any]] = {}
    for entry in walk(client.list, root):
        if (entry.is_directory and not summarize) or entry is root:
            rows[entry.path] = {"path": entry.path, "files": 0, "bytes": 0, "cached_bytes": 0}
        if entry.is_directory:
            continue
        cached_bytes = client.cached_bytes(entry)
        for ancestor in _path_and_parents(entry.path):
            row = rows.get(ancestor)
            if row is not None:
                row["files"] += 1
                row["bytes"] += entry.size_bytes
                row["cached_bytes"] += cached_bytes
    return list(reversed(rows.values()))


def _path_and_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield "/"


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("-r", "-R", "--recursive", is_flag=True, help="Remove folders and everything below them.")
def rm(paths: tuple[str, ...], recursive: bool) -> None:
    """Remove files (refused: this version only reads)."""
    raise ReadOnlyError(f"cannot remove {paths[0]}: this version reads the namespace, and cannot write to it")


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("-p", "--parents", is_flag=True, help="Make the folders above, too.")
def mkdir(paths: tuple[str, ...], parents: bool) -> None:
    """Make a folder (refused: this version only reads)."""
    raise ReadOnlyError(f"cannot make {paths[0]}: this version reads the namespace, and cannot write to it")
