"""``ghost-dist push``, to a server of our own that answers as the Hub does: the Hub cannot be
reached from tests. The client is huggingface_hub itself."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ghost_dist.errors import CheckpointError, ConfigError, RunFolderError
from ghost_dist.pipeline.push import prepare_upload
from ghost_dist.pipeline.recover import recover


@pytest.fixture(scope="module")
def run(config_at, tmp_path_factory):
    path = tmp_path_factory.mktemp("pushed") / "run"
    recover(config_at(path, calibration__windows=8))
    return path


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes commits whose files are sent with them, refuses a token."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.url}/me/model", "name": "me/model"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.commits.append((self.path, lines))
            url = f"{self.server.url}/me/model/commit/abc"
            return self.answer(200, {"commitUrl": url, "commitOid": "abc"})
        return self.answer(200, {})  # validate-yaml and such

    def answer(self, status, tree):
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.created, server.commits = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub_url, *arguments, token="hf_right"):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "ghost_dist", "push", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_file_arrives_as_it_is(run, hub):
    done = push(hub.url, run, "me/model", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"{hub.url}/me/model/commit/abc")
    [created] = hub.created
    assert created["name"] == "model"
    assert created.get("private") or created.get("visibility") == "private"
    [(path, lines)] = hub.commits
    assert path.startswith("/api/models/me/model/commit/main")
    [header] = [line["value"] for line in lines if line["key"] == "header"]
    assert header["summary"] == "Layers [3, 5) removed and recovered (ghost)"
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    folder = run / "checkpoint"
    assert sent == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert {"README.md", "config.json", "result.json", "model.safetensors"} <= set(sent)


def test_a_dry_run_sends_nothing(run, hub):
    done = push(hub.url, run, "me/model", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "names no licence" in done.stdout
    assert "config.yaml names paths of this machine" in done.stdout
    assert not hub.created
    assert not hub.commits


def test_a_refused_token_and_no_hub_are_said(run, hub):
    done = push(hub.url, run, "me/model", token="hf_wrong")
    assert done.returncode == 1
    assert "me/model" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.commits
    done = push("http://127.0.0.1:9", run, "me/model")
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "goes on with what is missing" in done.stderr


def test_what_is_not_whole_is_not_sent(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert prepare_upload(copy, "me/model").files["config.json"] > 0
    result = json.loads((copy / "result.json").read_bytes())
    (copy / "result.json").write_text(json.dumps({**result, "serving": {"batch": 1}}))
    prepare_upload(copy, "me/model")  # its speed was measured after the export
    with pytest.raises(ConfigError, match="no name on the Hub"):
        prepare_upload(copy, "me/model/too")
    weights = copy / "checkpoint" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    with pytest.raises(CheckpointError):
        prepare_upload(copy, "me/model")
    weights.write_bytes(content)
    (copy / "checkpoint" / "result.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"does not belong to .*result\.json"):
        prepare_upload(copy, "me/model")
    (copy / "result.json").unlink()
    with pytest.raises(RunFolderError, match="is not finished"):
        prepare_upload(copy, "me/model")
