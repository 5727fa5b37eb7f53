"""Data sets of the hub by name, with configuration, split and revision, from a server on this machine.

The hub itself was not asked.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub_server import COMMIT, NAME, RECORDS, serve_hub

CODE = """
import json, sys, time
wait = time.sleep  # the hub's client waits between its retries, 45 s in all where nothing answers
time.sleep = lambda seconds: wait(min(seconds, 0.05))
from sqft.data.hub import hub_commit, read_hub
from sqft.errors import DataError
from sqft.sections import HubSource
found = []
for values in json.loads(sys.argv[1]):
    source = HubSource(**values)
    try:
        found.append([[record.fields for record in read_hub(source)], hub_commit(source)])
    except DataError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def ask(endpoint: str, cache: Path, *sources: dict[str, Any]) -> list[Any]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", CODE, json.dumps(sources)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_data_set_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = {"hub": NAME}
    with serve_hub() as endpoint:
        whole, part, streamed, pinned, *refused = ask(
            endpoint,
            tmp_path,
            source,
            source | {"config": "main", "split": "test"},
            source | {"records": 3},
            source | {"revision": COMMIT},
            source | {"split": "none"},
            source | {"config": "none"},
            {"hub": "someone/nothing"},
        )
        assert whole == [RECORDS, COMMIT]
        assert part == [RECORDS[:1], COMMIT]
        assert streamed == [RECORDS[:3], COMMIT]
        assert pinned == whole
        for message, words in zip(refused, ("none", "main", "someone/nothing"), strict=True):
            assert words in message
            assert "a local file can be given" in message
            assert "\n" not in message
    with socket.socket() as held:  # a port of ours that nobody listens on
        held.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{held.getsockname()[1]}"
        cached, unknown = ask(gone, tmp_path, source, {"hub": "someone/nothing"})  # without the hub
    assert cached == whole
    assert "someone/nothing" in unknown
