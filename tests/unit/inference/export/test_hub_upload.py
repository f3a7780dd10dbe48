"""What leaves this machine: looked through first, then sent by the real client to a stand-in for the hub."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rm_scale.errors import ModelError
from rm_scale.inference.export.hub_upload import plan_upload
from tests.support.launching import environment


@pytest.fixture
def folder(full_run: Path, tmp_path: Path) -> Path:
    """As an export has it."""
    names = ("run", "checkpoint-*", "training_args.bin")
    return Path(shutil.copytree(full_run, tmp_path / "model", ignore=shutil.ignore_patterns(*names)))


def test_what_would_be_published(folder: Path) -> None:
    planned = plan_upload(folder, "me/model")
    assert {name for name, _ in planned.files} == {path.name for path in folder.iterdir()}
    assert {"config.json", "README.md", "scoring_contract.json", "model.safetensors"} <= dict(planned.files).keys()
    lines = planned.lines()
    assert lines[0].startswith(f"to me/model: {len(planned.files)} files")
    assert "the model card begins:" in lines and any("library_name" in line for line in lines)
    (folder / "notes.json").write_text(json.dumps({"data": "/home/someone/data"}))
    assert any("notes.json names a path of this machine (/home/someone/data)" in line for line in warnings(folder))
    (folder / "notes.json").unlink()
    (folder / "modeling.py").write_text("x = 1")
    assert any("modeling.py is code that others would run" in line for line in warnings(folder))
    (folder / "README.md").unlink()
    assert any("there is no model card" in line for line in warnings(folder))


def warnings(folder: Path) -> tuple[str, ...]:
    return plan_upload(folder, "me/model").warnings


def test_links_are_no_paths_of_this_machine(folder: Path) -> None:
    (folder / "scoring_contract.json").unlink()
    (folder / "README.md").write_text("https://example.org/data/set and docs/data/x and 3/home/4")
    assert warnings(folder) == ()


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "run/metrics.jsonl", "run/plan.json", ".env", ".cache.json", "a.pkl"]
)
def test_what_is_never_published(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"{name}: is not published .*Fix: export into a folder of its own"):
        plan_upload(folder, "me/model")


@pytest.mark.parametrize("secret", ["hf_" + "a" * 30, "sk-" + "B2" * 20, "-----BEGIN RSA PRIVATE KEY-----"])
def test_secrets_stay_here(folder: Path, secret: str) -> None:
    (folder / "notes.json").write_text(json.dumps({"x": secret}))
    with pytest.raises(ModelError, match=r"notes\.json: holds what looks like a secret"):
        plan_upload(folder, "me/model")


def test_names_of_repositories(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"push_to_hub=nowhere: is no name of a repository\. Fix: USER/NAME"):
        plan_upload(folder, "nowhere")


# --- Sending ---------------------------------------------------------------------------------------------------------


class Hub:
    """Takes what the client sends as the hub does, all files within the commit."""

    def __init__(self) -> None:
        self.token = "a-token"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def answer(self, address: str, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{address}/me/model", "name": "me/model"}
        if path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if path == "/api/models/me/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{address}/me/model/commit/1", "commitOid": "1", "success": True}
        return {"sha": "1", "id": "me/model", "siblings": []}


@contextmanager
def standing_in(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
            address = f"http://{self.headers['Host']}"
            answer = hub.answer(address, self.path, body) if allowed else {"error": "who are you?"}
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


SEND = """
import sys
from pathlib import Path
from rm_scale.errors import UserError
from rm_scale.inference.export.hub_upload import plan_upload, upload
folder = Path(sys.argv[1])
try:
    print(upload(folder, plan_upload(folder, "me/model")))
except UserError as error:
    sys.exit(str(error))
"""


def send(folder: Path, address: str, token: str) -> subprocess.CompletedProcess[str]:
    variables = environment(HF_ENDPOINT=address, HF_TOKEN=token, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    return subprocess.run(
        [sys.executable, "-c", SEND, str(folder)], env=variables, capture_output=True, text=True, timeout=120
    )


def test_everything_arrives_in_a_private_repository(folder: Path) -> None:
    hub = Hub()
    with standing_in(hub) as address:
        done = send(folder, address, hub.token)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{address}/me/model"
    assert [asked["visibility"] for asked in hub.created] == ["private"]
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_that_refuses(folder: Path) -> None:
    hub = Hub()
    with standing_in(hub) as address:
        done = send(folder, address, "another-token")
    assert done.returncode == 1 and hub.files == {}
    assert "push_to_hub=me/model: the hub did not take it (" in done.stderr
    assert "Fix: HF_TOKEN with write access in the environment" in done.stderr
    assert "another-token" not in done.stderr
