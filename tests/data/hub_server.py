"""As much of the hub's interface as loading one data set takes, for a process whose HF_ENDPOINT it is."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "someone/sums"
COMMIT = "c" * 40
RECORDS = [{"question": f"what is {n} plus {n}?", "answer": str(2 * n)} for n in range(40)]
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
---
"""
FILES = {
    "README.md": CARD.encode(),
    "train.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode(),
    "test.jsonl": json.dumps(RECORDS[0]).encode() + b"\n",
}


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        interface, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if path == interface or path.startswith(f"{interface}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.send_json({"id": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith(f"{interface}/tree/"):
            self.send_json([self.entry(name) for name in FILES])
        elif path.startswith(f"{interface}/paths-info/"):
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.send_json([self.entry(name) for name in asked if name in FILES])
        elif path.startswith(files) and path.split("/")[-1] in FILES:
            self.send_file(FILES[path.split("/")[-1]])
        else:
            code = "EntryNotFound" if path.startswith(files) else "RepoNotFound"
            self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD = do_POST = answer

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "oid": _digest(FILES[name]), "size": len(FILES[name]), "path": name}

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes) -> None:
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            self.send(206, part, headers)
        else:
            self.send(200, data, headers)

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[str]:
    """The address of a server that lasts as long as the context."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
