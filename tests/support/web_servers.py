"""Three web servers that know a folder in three ways: aiohttp (ETag, ranges), nginx (the same, real), http.server
(neither ranges nor ETags)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from aiohttp import web


@contextlib.asynccontextmanager
async def aiohttp_server(folder: Path) -> AsyncIterator[str]:
    """Serve `folder` in this loop, with ETags, ranges, conditions and index pages; yields its URL."""

    async def answer(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["path"]
        try:
            is_folder = path.is_dir()
            if not is_folder and not path.is_file():
                raise web.HTTPNotFound
        except OSError as error:  # a name too long
            raise web.HTTPNotFound from error
        if not is_folder:
            return web.FileResponse(path)
        if not request.path.endswith("/"):
            raise web.HTTPMovedPermanently(request.rel_url.raw_path + "/")
        names = [child.name + "/" * child.is_dir() for child in path.iterdir()]
        links = "".join(f'<a href="{quote(name)}">{escape(name)}</a><br>' for name in ["../", *names])
        return web.Response(text=f"<html><body>{links}</body></html>", content_type="text/html")

    application = web.Application()
    application.router.add_get("/data/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/data"
    finally:
        await runner.cleanup()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that hangs up is none
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # passed on as it came


@contextlib.contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """Serve `folder` by Python's http.server in a thread; yields its URL."""
    server = _Server(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_NGINX = """
daemon off; master_process off; pid {work}/pid; error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; default_type application/octet-stream;
  client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
  uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
  server {{ listen 127.0.0.1:{port}; root {folder}; autoindex on; }}
}}
"""


@contextlib.asynccontextmanager
async def nginx_server(folder: Path, work: Path) -> AsyncIterator[str]:
    """Serve `folder` by nginx in a process; yields its URL."""
    program = shutil.which("nginx")
    assert program is not None, "nginx is installed where the system tests run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (work / "nginx.conf").write_text(_NGINX.format(work=work, port=port, folder=folder))
    process = subprocess.Popen([program, "-c", str(work / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        await _wait_until_it_listens(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


async def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(10):
        while True:
            assert process.poll() is None, "nginx ended; see its error.log"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0)  # a foreign process offers no event to wait for; 10 s bound it
                continue
            writer.close()
            await writer.wait_closed()
            return
