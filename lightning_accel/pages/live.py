"""The server of a live page: it answers this machine alone, reads only, and knows runs by their number, not by paths.

A page of a stranger can make a browser ask an address of this machine; its `Host` header tells (DNS rebinding), and so
others than this machine's own names are refused. Nothing is served from disk by its name, so no path can escape.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_accel.errors import explain
from lightning_accel.pages.page import render
from lightning_accel.pages.runs import Run, find_runs, real, signature

_OWN = "127.0.0.1"
_STALE_S = 120.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Live:
    """What a live page needs to know: the address that tells what is new, and what is known."""

    def __init__(self, address: str, version: str) -> None:
        self.address, self.version = address, version


class Board(ThreadingHTTPServer):
    """Serves the runs of a folder on this machine.

    Args:
        folder: Where the runs are.
        port: 0 takes a free one.
        clock: Seconds since 1970, against which a fit is told to be silent.
        axes: What runs are compared by, as `compare` takes it.

    Raises:
        ValueError: There is no such folder, or no run with such a number.
        OSError: The port is taken.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, *, port: int = 0, clock: Callable[[], float] = time.time, **axes: Any
    ) -> None:
        if not folder.is_dir():
            raise ValueError(
                explain("a board shows a folder of runs", str(folder), "name one that is there")
            )
        self.folder, self.clock, self.axes = folder, clock, axes
        self._lock = threading.Lock()
        self._read: tuple[tuple[Any, ...], list[Run]] | None = None
        self.render()  # what was asked for wrongly is said before anybody looks
        super().__init__((_OWN, port), _Answers)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a browser hangs up; anything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{_OWN}:{self.server_port}/"

    def runs(self) -> list[Run]:
        """Return all runs; they are read again where a file of theirs is new."""
        with self._lock:
            now = signature(self.folder)
            if self._read is None or now != self._read[0]:
                self._read = now, find_runs(self.folder)
            return self._read[1]

    def render(self) -> str:
        """Return the page as it is now."""
        runs = self.runs()
        live = Live("/state.json", self.version(runs))
        states = [self.state(run) for run in runs]
        title = self.folder.resolve().name or str(self.folder)
        axes = self.axes if any(run.report for run in runs) else {}
        return render(runs, title=title, states=states, live=live, **axes)

    def version(self, runs: Sequence[Run]) -> str:
        """Return a word that changes when anything that is shown does."""
        said = (self._read and self._read[0], [self.state(run) for run in runs])
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def state(self, run: Run) -> str:
        """Return what is said at the head of a run whose files cannot say it: that a fit fell silent."""
        updated = real(run.progress.get("updated"))
        if run.progress.get("state") != "running" or updated is None:
            return ""
        silent_s = self.clock() - updated
        if silent_s < _STALE_S:
            return ""
        return f"silent for {silent_s / 60:.0f} min, at epoch {run.progress.get('epoch')}: ended from outside, or in a long step"


class _Answers(BaseHTTPRequestHandler):
    """One request."""

    server: Board
    server_version = "lightning-accel"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """Answer with the page, or with what is new."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the user's."""

    def _answer(self) -> None:
        if not self._is_own():
            self._send(403, "text/plain", "This board answers its own machine alone.\n")
            return
        path = urlsplit(self.path).path
        try:
            if path == "/":
                self._send(200, "text/html", self.server.render())
            elif path == "/state.json":
                version = self.server.version(self.server.runs())
                self._send(200, "application/json", json.dumps({"version": version}))
            else:
                self._send(404, "text/plain", "There is no such page.\n")
        except (ValueError, OSError) as error:
            self._send(500, "text/plain", f"{error}\n")

    def _is_own(self) -> bool:
        port = self.server.server_port
        return self.headers.get_all("Host", []) in ([f"{_OWN}:{port}"], [f"localhost:{port}"])

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
