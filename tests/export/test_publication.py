"""A model goes to the hub whole or not at all; tried against a server of this process."""

import base64
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import ExportError, ModelError
from sqft.export.publication import describe_publication, push_model


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as one commit takes. refuses: with which status, once a commit comes."""

    made: dict[str, Any]
    committed: dict[str, bytes]
    refuses: int | None = None

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/repos/create"):
            type(self).made = json.loads(body)
            return self.answer({"url": "https://huggingface.co/me/model"})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if self.refuses:
            return self.answer({"error": "no"}, self.refuses)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.committed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer(
            {"commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1", "success": True}
        )

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Fresh(Hub):
        committed: dict[str, bytes] = {}  # noqa: RUF012  of this test alone

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    Fresh.endpoint = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Fresh
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(merged_dir: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(merged_dir(), tmp_path / "results" / "merged")
    return tmp_path / "results" / "merged"


def test_all_of_it_goes_in_one_commit(model: Path, hub: Any) -> None:
    results = model / ".eval_results"
    results.mkdir()
    (results / "task.yaml").write_text("- dataset: {id: some/thing}\n")
    (model / ".hidden").write_text("private")
    found = push_model(model, "me/model", private=True, endpoint=hub.endpoint)
    assert found.url == "https://huggingface.co/me/model/commit/1"
    assert (hub.made["name"], hub.made["organization"]) == ("model", "me")
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True
    wanted = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert set(hub.committed) == wanted - {".hidden", ".sqft.json"} | {"README.md"}
    assert set(hub.committed) == set(found.files)
    weights = next(model.glob("*.safetensors"))
    assert hub.committed[weights.name] == weights.read_bytes()
    card = hub.committed["README.md"].decode()
    assert "library_name: transformers" in card
    assert "from_pretrained('me/model'" in card
    assert str(model) not in card
    assert not (model / "README.md").exists()


@pytest.mark.parametrize(("status", "remedy"), [(403, "hf auth login"), (500, "nothing was published")])
def test_a_hub_that_refuses(model: Path, hub: Any, status: int, remedy: str) -> None:
    hub.refuses = status
    with pytest.raises(ExportError, match=remedy):
        push_model(model, "me/model", endpoint=hub.endpoint)


def test_what_cannot_be_published(model: Path, tmp_path: Path) -> None:
    for name in ("model", "a/b/c", "me/mo del"):
        with pytest.raises(ExportError, match=name):
            describe_publication(model, name)
    with pytest.raises(ModelError, match="holds no model"):
        describe_publication(tmp_path, "me/model")
    with pytest.raises(ModelError, match="there is no directory"):
        describe_publication(tmp_path / "none", "me/model")


def test_a_dry_run_sends_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["push", str(model), "me/model", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# model" in shown
    assert "config.json" in shown
    assert "nothing was sent" in shown
