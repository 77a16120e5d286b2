"""A W&B server on loopback that hands out the runs of one sweep and keeps what they send: no account, no network."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

_SWEEP = {"id": "U3dlZXA6MQ==", "name": "sweep1"}
_OWNER = {"id": "RW50aXR5OjE=", "name": "me"}
_PROJECT = {"id": "UHJvamVjdDox", "name": "ours", "entity": _OWNER}
_NOTHING = {"artifact": None, "artifactType": None}
_VERSIONS = {
    "cliVersionInfo": {"max_cli_version": "99.0.0", "min_cli_version": "0.0.1"},
    "latestLocalVersionInfo": None,
    "features": [],
    "deploymentId": "x",
    "frontendHost": "http://127.0.0.1",
    "exposesExplicitRunQueueAckPath": True,
}


class FakeWandb(ThreadingHTTPServer):
    """Attributes:
    runs: Commands for the agent, the next first: each the arguments of one run.
    config: The sweep, as it was sent.
    sent: What runs streamed, by run.
    buckets: What was said of runs when they began.
    refuses: Names of the runs that are turned away when they begin.
    """

    daemon_threads = True

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.runs = runs
        self.config = "{}"
        self.sent: dict[str, list[Any]] = {}
        self.buckets: list[dict[str, Any]] = []
        self.refuses: set[str] = set()
        self.handed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL request."""
        if "agentHeartbeat" in query:
            commands = [] if json.loads(given.get("runState") or "{}") else [self._next()]
            return {"agentHeartbeat": {"agent": {"id": "QTox"}, "commands": json.dumps(commands)}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "QTox"}}}
        if "upsertSweep" in query:
            self.config = given["config"]
            sweep = {**_SWEEP, "project": _PROJECT}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if "upsertBucket" in query:
            self.buckets.append(given)
            name = given.get("name") or "x"
            known = {
                "id": "QjoxOg==",
                "projectId": _PROJECT["id"],
                "name": name,
                "displayName": name,
            }
            rest = {"description": "", "config": "{}", "sweepName": "sweep1", "historyLineCount": 0}
            bucket = {**known, **rest, "project": _PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/up/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "QjoxOg==", "uploadHeaders": [], "files": files}}
        if "organization" in query:
            return {"entity": {"organization": None}}
        return self._known()

    def _next(self) -> dict[str, Any]:
        if not self.runs:
            return {"type": "exit"}
        self.handed += 1
        args = {name: {"value": value} for name, value in self.runs.pop(0).items()}
        program = yaml.safe_load(self.config)["program"]
        return {"type": "run", "run_id": f"run{self.handed}", "args": args, "program": program}

    def _known(self) -> dict[str, Any]:
        viewer = {"id": "VTox", "flags": "{}", "entity": "me", "username": "me", "email": "me@x.y"}
        state = {"state": "RUNNING", "displayName": "sweep1", "description": "", "method": "grid"}
        times = {"createdAt": "2026-01-01T00:00:00", "runCount": 0, "runs": {"edges": []}}
        sweep = {**_SWEEP, **state, **times, "config": self.config}
        return {
            "viewer": {**viewer, "teams": {"edges": []}},
            "serverInfo": _VERSIONS,
            "project": {**_PROJECT, "sweep": sweep, "model": None, "bucket": None, **_NOTHING},
            "model": {"bucket": None},
            "entity": _OWNER,
        }


class _Answers(BaseHTTPRequestHandler):
    server: FakeWandb

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        try:
            content = json.loads(self._body())
        except ValueError:
            content = {}
        query, given = content.get("query", ""), content.get("variables") or {}
        if "upsertBucket" in query and given.get("name") in self.server.refuses:
            self._reply({"errors": [{"message": "permission denied"}]}, 403)
        elif (
            "rtifact(" in query and "mutation" in query
        ):  # tables go up as artifacts, which are not kept
            self._reply({"data": None, "errors": [{"message": "no artifacts here"}]})
        elif self.path.startswith("/graphql"):
            self._reply({"data": self.server.answer(query, given)})
        else:
            run = self.path.split("/")[-2] if "file_stream" in self.path else self.path
            self.server.sent.setdefault(run, []).append(content)
            self._reply({})


@contextmanager
def wandb_server(runs: list[dict[str, Any]]) -> Iterator[FakeWandb]:
    """Run one within."""
    with FakeWandb(runs) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
