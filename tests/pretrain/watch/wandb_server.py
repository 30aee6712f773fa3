"""A server on this machine that the genuine W&B client takes for its own: it keeps the history rows of runs, and can be ill.

In: requests of `wandb` (GraphQL, the stream of a run's files, uploads). Out: what the client has to be told to go on; in `runs` what it
sent, each history row once, where the client put it; in `bodies` every byte, so that a test can look for what must not be there.
Written after the requests of wandb 0.31: an operation that a later one adds is answered with no data, and named in `unknown`.
"""

import argparse
import gzip
import http.server
import json
import re
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

KEY = "k" * 40
Ill = Literal["error", "black hole", "slow", "bad JSON"]
SLOW_SECONDS = 2.0
HISTORY = "wandb-history.jsonl"


@dataclass
class StoredRun:
    """What the server knows of a run."""

    project: str
    name: str
    described: dict[str, Any] = field(default_factory=dict)
    """The newest value of each variable that an upsert had."""
    lines: dict[str, list[str]] = field(default_factory=dict)
    """By file of the stream, its lines."""
    tags: list[str] = field(default_factory=list)
    alerts: list[dict[str, str]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its history."""
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    def take(self, name: str, offset: int, content: list[str]) -> None:
        """Lines at a place; those that came before, and were not known to have come, are the same again."""
        lines = self.lines.setdefault(name, [])
        assert offset <= len(lines), f"{name}: {offset} would leave a gap behind {len(lines)}"
        lines[offset : offset + len(content)] = content


class Server:
    """Runs while it is used as a context manager; `port` stays its own, also while it refuses."""

    def __init__(self, rewinds: bool = False) -> None:
        """rewinds: whether it has the feature of `resume_from`."""
        self.runs: dict[str, StoredRun] = {}
        self.bodies: list[bytes] = []
        self.asked: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.unknown: set[str] = set()
        self.ill: Ill | None = None
        self.rewinds = rewinds
        self._num_artifacts = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._serving: Listener | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen."""
        server = self

        class Requests(Answers):
            told = server

        self._serving = Listener(("127.0.0.1", self.port), Requests)
        self.port = self._serving.server_port
        threading.Thread(target=self._serving.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self) -> None:
        """Close the door: whoever comes is refused, until `open`."""
        if self._serving is not None:
            self._serving.shutdown()
            self._serving.server_close()
            self._serving = None

    def __enter__(self) -> "Server":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.refuse()

    def wait(self, seconds: float) -> None:
        self._over.wait(seconds)

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What a request is told, as JSON."""
        with self._lock:
            self.bodies.append(path.encode() + b"\n" + body)
            if path == "/graphql":
                asked = json.loads(body)
                name = asked.get("operationName") or (re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"]) or ["?"])[0]
                self.asked.append(name)
                return self._graphql(name, asked["query"], asked.get("variables") or {})
            if (found := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", path)) is not None:
                return self._stream(self._run(*found.groups()), json.loads(body))
            return {}

    def _run(self, project: str, name: str) -> StoredRun:
        return self.runs.setdefault(name, StoredRun(project, name))

    def _stream(self, run: StoredRun, sent: dict[str, Any]) -> dict[str, Any]:
        for name, part in (sent.get("files") or {}).items():
            if name.endswith(".jsonl"):
                run.take(name, part["offset"], part["content"])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return {}

    def _graphql(self, name: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if "viewer" in query or "Viewer" in name:
            data["viewer"] = {"id": "u", "flags": "{}", "entity": "me", "username": "me", "email": "", "teams": {"edges": []}}
        elif name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            data["model"] = {"id": "1", "name": variables["project"], "entity": ENTITY, "bucket": run and self._bucket(run)}
        elif "upsertBucket" in query:
            known = variables["name"] in self.runs
            run = self._run(variables.get("project") or "", variables["name"])
            run.described |= {key: value for key, value in variables.items() if value is not None}
            run.tags = variables.get("tags") or run.tags
            data["upsertBucket"] = {"bucket": self._bucket(run), "inserted": not known}
        elif "rewindRun" in query:
            if not self.rewinds:
                return {"data": {"rewindRun": None}, "errors": [{"message": "rewind is not enabled for this account"}]}
            run = self.runs[variables["runName"]]
            kept = [line for line in run.lines.get(HISTORY, []) if json.loads(line)["_step"] <= variables["metricValue"]]
            run.lines[HISTORY] = kept
            data["rewindRun"] = {"rewoundRun": self._bucket(run)}
        elif "notifyScriptableRunAlert" in query:
            self.runs[variables["runName"]].alerts.append({key: variables[key] for key in ("title", "text", "severity")})
            data["notifyScriptableRunAlert"] = {"success": True}
        elif "createRunFiles" in query:
            files = [{"name": one, "uploadUrl": f"{self.address}/upload/{one}"} for one in variables["files"]]
            data["createRunFiles"] = {"runID": "store", "uploadHeaders": [], "files": files}
        elif name == "RunHistoryPage":
            run = self.runs.get(variables["run"])
            data["project"] = {"run": run and self._page(run, variables["minStep"], variables["maxStep"])}
        elif "project" in query and "run(" in query:
            run = self.runs.get(variables.get("name") or variables.get("run") or "")
            data["project"] = {"internalId": "1", "run": run and self._public(run)}
        elif name == "ArtifactType":
            data["project"] = {"artifact": None}
        elif name == "CreateArtifact":
            asked = variables.get("input") or variables
            stored = {"id": f"artifact-{self._num_artifacts}", "state": "PENDING", **dict.fromkeys(("aliases", "artifactSequence"))}
            self._num_artifacts += 1
            self.runs[asked["runName"]].artifacts.append(asked)
            data["createArtifact"] = {"artifact": {**stored, "artifactSequence": {"id": "sequence", "latestArtifact": None}}}
        elif "createArtifactManifest" in query:
            name, digest = variables["name"], variables.get("digest", "")
            file = {"id": "file", "name": name, "displayName": name, "uploadUrl": f"{self.address}/manifest/{digest}", "uploadHeaders": []}
            data["createArtifactManifest"] = {"artifactManifest": {"id": "manifest", "file": file}}
        elif "updateArtifactManifest" in query:
            file = {"uploadUrl": f"{self.address}/manifest/{variables.get('digest', '')}", "uploadHeaders": []}
            data["updateArtifactManifest"] = {"artifactManifest": {"id": "manifest", "file": file}}
        elif name == "CreateArtifactFiles":
            nodes = [self._artifact_file(one) for one in variables["input"]["artifactFiles"]]
            data["createArtifactFiles"] = {"files": {"edges": [{"node": node} for node in nodes]}}
        elif "upsertView" in query:
            self.views.append(variables)
            data["upsertView"] = {"view": {"id": "view", "name": variables.get("name") or "view"}, "inserted": True}
        elif "commitArtifact" in query:
            data["commitArtifact"] = {"artifact": {"id": variables["artifactID"], "digest": "", "state": "COMMITTED"}}
        else:
            self.unknown.add(name)
        return {"data": data}

    def _artifact_file(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where a file of an artifact is put."""
        where = {"storagePath": asked["name"], "uploadUrl": f"{self.address}/artifact/{asked['name']}", "uploadHeaders": []}
        return {**where, "uploadMultipartUrls": None, "artifact": {"id": asked["artifactID"]}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        """A run as the writing client sees it."""
        rows = run.lines.get(HISTORY, [])
        return {
            "id": "store",
            "name": run.name,
            "displayName": run.described.get("displayName"),
            "description": "",
            "config": run.described.get("config", "{}"),
            "sweepName": None,
            "project": {"id": "1", "name": run.project, "entity": ENTITY},
            "historyLineCount": len(rows),
            "eventsLineCount": len(run.lines.get("wandb-events.jsonl", [])),
            "logLineCount": 0,
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "summaryMetrics": run.described.get("summaryMetrics", "{}"),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _page(self, run: StoredRun, first: int, end: int) -> dict[str, Any]:
        """A part of a run's history."""
        last = max((row["_step"] for row in run.rows), default=-1)
        rows = [line for line in run.lines.get(HISTORY, []) if first <= json.loads(line)["_step"] < end]
        return {"historyKeys": {"lastStep": last}, "history": rows}

    def _public(self, run: StoredRun) -> dict[str, Any]:
        """A run as the reading client (`wandb.Api`) sees it."""
        last = max((row["_step"] for row in run.rows), default=-1)
        empty = ("notes", "group", "jobType", "sweepName", "heartbeatAt", "commit", "readOnly")
        texts = {
            "systemMetrics": "{}",
            "state": "finished",
            "createdAt": "2020-01-01T00:00:00",
            "projectId": "1",
            "user": {"name": "me", "username": "me"},
        }
        keys = {"lastStep": last, "sets": [], "keys": {}}
        counted = {"historyLineCount": len(run.rows), "historyKeys": keys}
        return {
            **dict.fromkeys(empty),
            **self._bucket(run),
            **texts,
            **counted,
            "parquetHistory": {"liveData": run.rows, "parquetUrls": []},
        }


ENTITY = {"id": "2", "name": "me"}


class Listener(http.server.ThreadingHTTPServer):
    """Ends without waiting for who is still asking, and without a word about who has gone."""

    daemon_threads, block_on_close = True, False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Answers(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    told: Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        encoding = self.headers.get("content-encoding")
        body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body) if encoding == "deflate" else body
        ill = self.told.ill
        if ill == "black hole":
            self.told.wait(3600)
            self.close_connection = True
            return None
        if ill == "slow":
            self.told.wait(SLOW_SECONDS)
        if ill == "error":
            return self._tell(500, b"it broke")
        if ill == "bad JSON":
            return self._tell(200, b'{"data": {"viewer": ')
        self._tell(200, json.dumps(self.told.answer(self.command, urlsplit(self.path).path, body)).encode())
        return None

    def _tell(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET = do_PUT = _do


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ill", choices=["error", "black hole", "slow", "bad JSON"])
    with Server() as one:
        one.ill = parser.parse_args().ill
        print(one.address, flush=True)
        while True:
            time.sleep(10)
