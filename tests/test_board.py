"""The live page: it answers its own machine alone, reads only, and shows what fits write while they go on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
from browser import CHROMIUM, Browser

from lightning_accel.cli import main
from lightning_accel.measure.progress import Progress
from lightning_accel.pages.live import Board

NOW = 1_000_000.0


def progress(folder: Path, epoch: int, **more: object) -> Progress:
    told = {"state": "running", "updated": NOW, "epoch": epoch, "max_epochs": 9, "step": 7 * epoch}
    told |= {"steps_per_s": 3.5, "history": {"val/acc": [[e, e / 10] for e in range(1, epoch + 1)]}}
    found = Progress(folder / "report.json")
    found.write({**told, **more})
    return found


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    reports.sweep(tmp_path / "runs", 2)
    progress(tmp_path / "runs" / "new", 3)
    server = Board(tmp_path / "runs", clock=lambda: NOW + 1)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(
    board: Board, path: str = "/", method: str = "GET", host: str | None = None
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", board.server_port, timeout=30)
    headers = {"Host": host if host is not None else f"127.0.0.1:{board.server_port}"}
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.headers)


def test_a_board_shows_finished_runs_and_those_that_train(board: Board) -> None:
    status, text, headers = ask(board)
    assert status == 200 and "running: epoch 3 of 9, step 21, 3.5 steps/s" in text
    assert "connect-src &#39;self&#39;" in text or "connect-src 'self'" in text
    assert headers["Cache-Control"] == "no-store" and "Access-Control-Allow-Origin" not in headers
    assert ask(board, method="HEAD")[:2] == (200, "")
    before = json.loads(ask(board, "/state.json")[1])["version"]
    assert json.loads(ask(board, "/state.json")[1])["version"] == before and before in ask(board)[1]
    progress(board.folder / "new", 4)
    assert json.loads(ask(board, "/state.json")[1])["version"] != before
    assert "epoch 4 of 9" in ask(board)[1]


def test_a_fit_that_fell_silent_or_failed_is_told_so(board: Board) -> None:
    progress(board.folder / "new", 5, updated=NOW - 600)
    assert "silent for 10 min, at epoch 5" in ask(board)[1]
    progress(board.folder / "new", 5, state="failed", error="ValueError")
    assert "failed (ValueError): epoch 5" in ask(board)[1]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.evil.example:{port}", "192.168.0.1:{port}"])  # fmt: skip
def test_other_hosts_are_refused(board: Board, host: str) -> None:
    for path in ("/", "/state.json"):
        status, text, _ = ask(board, path, host=host.format(port=board.server_port))
        assert status == 403 and "runs" not in text


def test_no_host_at_all_is_refused_and_localhost_is_not(board: Board) -> None:
    assert ask(board, host=f"localhost:{board.server_port}")[0] == 200
    for head in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", board.server_port), 30) as raw:
            raw.sendall(head)
            assert b" 403 " in raw.recv(1000)


@pytest.mark.parametrize("path", ["/0/report.json", "/../secret", "/%2e%2e/secret", "//etc/passwd", "/.hydra/overrides.yaml", "/new/report.progress.json"])  # fmt: skip
def test_no_file_is_served_by_its_path(board: Board, path: str) -> None:
    (board.folder.parent / "secret").write_text("secret")
    assert ask(board, path)[:2] == (404, "There is no such page.\n")
    assert ask(board, "/", method="POST")[0] == 501 == ask(board, "/", method="DELETE")[0]


def test_it_listens_on_this_machine_alone(board: Board) -> None:
    assert board.server_address[0] == "127.0.0.1" and board.address.startswith("http://127.0.0.1:")


def test_what_a_board_cannot_show_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.sweep(tmp_path, 2)
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for words, what in (
        (["nowhere"], "a board shows a folder of runs"),
        ([str(tmp_path), "--port", "99999"], "`--port` is a number from 0 to 65535"),
        ([str(tmp_path), "--y", "speed"], "no run has a number `speed`"),
        ([str(tmp_path), "--port", port], ""),
    ):
        assert main(["board", *words]) == 2
        assert capsys.readouterr().err.startswith(f"lightning-accel board: {what}")
    taken.close()


def test_ctrl_c_ends_it_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Board) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Board, "serve_forever", interrupted)
    assert main(["board", str(tmp_path), "--port", "0"]) == 0
    out, err = capsys.readouterr()
    assert "is at http://127.0.0.1:" in out and err == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.slow
def test_a_page_in_a_browser_renews_itself(board: Board, tmp_path: Path) -> None:
    with Browser(tmp_path / "home") as browser:
        browser.open(board.address)
        head = "document.querySelector('#run-3 summary .state').textContent"
        assert browser.ask(head) == "running: epoch 3 of 9, step 21, 3.5 steps/s"
        browser.ask("document.querySelector('#run-3').open = true")
        progress(board.folder / "new", 8)
        browser.wait_for_load()
        assert "epoch 8 of 9" in browser.ask(head)
        assert browser.ask("document.querySelector('#run-3').open"), "what was open stays open"
        assert browser.said == []
