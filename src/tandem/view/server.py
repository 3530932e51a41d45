"""A small server for the viewer: on this machine only, for reading only, and for one run only."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tandem.errors import InputError
from tandem.view.page import static_file, with_title
from tandem.view.reading import RunRecord, read_run
from tandem.view.report import report_page
from tandem.view.sample_index import SampleIndex, index_content
from tandem.view.samples import sample_content

HOST = "127.0.0.1"
_OWN_NAMES = {"127.0.0.1", "localhost", "[::1]"}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ViewServer(ThreadingHTTPServer):
    """Serves the viewer, the report and the samples of one run.

    What can be asked for are names that this file and the run's index know; no part of an address is ever made into a
    path. A page of another site that has its own name resolve to this machine is told by the Host header and refused.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run: RunRecord, port: int) -> None:
        """Raises InputError where the port cannot be had; 0 takes a free one."""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port {port} cannot be used: {error.strerror}; give another, or leave it out for a free one."
            ) from error
        self.run = run
        self.samples = SampleIndex(run)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def content_of(self, path: str, query: dict[str, list[str]]) -> tuple[str, str]:
        """What stands at an address, with its type. Raises LookupError or ValueError where there is nothing."""
        if path == "/":
            return "text/html", with_title(static_file("viewer.html"), f"{self.run.name}: tokens")
        if path.startswith("/static/"):
            name = path.removeprefix("/static/")
            return _TYPES[name.rpartition(".")[2]], static_file(name)
        if path == "/report.html":
            return "text/html", report_page(read_run(self.run.path), "server")
        if path == "/api/index":
            return "application/json", _json(viewer_content(self.run, self.samples))
        if path == "/api/sample":
            sample = self.samples.sample(query["file"][0], int(query["row"][0]))
            return "application/json", _json(sample_content(sample))
        raise LookupError(path)


def viewer_content(run: RunRecord, samples: SampleIndex) -> dict[str, Any]:
    """What the viewer begins with: which run it is, and the index of its samples as they are now."""
    return {"run": {"name": run.name, "stage": run.stage}, **index_content(samples.refresh())}


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    server_version, sys_version = "tandem", ""

    def do_GET(self) -> None:
        self._answer(self.wfile.write)

    def do_HEAD(self) -> None:
        self._answer(lambda _: 0)

    def _answer(self, write: Callable[[bytes], int]) -> None:
        status, kind, body = self._find()
        content = body.encode("utf-8", errors="replace")
        try:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            # The report's own policy, which names its scripts, stands in the page.
            policy = "frame-ancestors 'none'" if self.path == "/report.html" else _POLICY
            self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _find(self) -> tuple[HTTPStatus, str, str]:
        if _name_of(self.headers.get("Host", "")) not in _OWN_NAMES:
            return HTTPStatus.FORBIDDEN, "text/plain", "this server answers only under the names of this machine\n"
        try:
            parts = urlsplit(self.path)
            kind, body = self.server.content_of(parts.path, parse_qs(parts.query))
        except (LookupError, ValueError, InputError) as error:
            return HTTPStatus.NOT_FOUND, "text/plain", f"there is nothing here: {error}\n"
        return HTTPStatus.OK, kind, body

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not told to the person."""


def _name_of(host: str) -> str:
    """The Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
