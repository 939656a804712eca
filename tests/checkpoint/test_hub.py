"""What of a hub repository is downloaded: huggingface_hub itself asks a server of our own."""

import hashlib
import http.server
import json
import threading

import pytest
from families import save_checkpoint, save_tokenizer
from huggingface_hub import close_session, constants

from ghost_dist.checkpoint.reader import resolve_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository, as the hub's API shows it; notes what is fetched."""

    def __init__(self, folder):
        self.files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.fetched = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                content, headers = hub.find(self.path, body)
                self.send_response(404 if content is None else 200)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body:
                    self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def find(self, path, body):
        path = path.partition("?")[0]
        if path.startswith("/api/models/me/model/tree/"):
            return json.dumps(self.listing()).encode(), {"Content-Type": "application/json"}
        if path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "me/model", "sha": COMMIT, "siblings": siblings}
            return json.dumps(info).encode(), {"Content-Type": "application/json"}
        name = path.removeprefix(f"/me/model/resolve/{COMMIT}/")
        if name not in self.files:
            return None, {"X-Repo-Commit": COMMIT, "X-Error-Code": "EntryNotFound"}
        if body:
            self.fetched.add(name)
        digest = hashlib.sha256(self.files[name]).hexdigest()
        return self.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}

    def listing(self):
        return [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.files.items()
        ]


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    save_checkpoint("llama", folder)
    save_tokenizer(folder)
    for name in (
        *("original/model.safetensors", "original/params.json", "metal/model.bin"),
        *("consolidated.safetensors", "model-fp32.safetensors", "pytorch_model.bin"),
        *("additional_chat_templates/tool_use.jinja", "modeling_own.py", "README.md"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)  # equal files would be fetched once
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """Function that serves the repository; huggingface_hub asks it, with a cache of its own."""
    hubs = []

    def serve():
        hubs.append(Hub(repository))
        monkeypatch.setattr(constants, "ENDPOINT", hubs[0].address)
        template = hubs[0].address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        return hubs[0]

    yield serve
    close_session()
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


SIDE_FILES = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "additional_chat_templates/tool_use.jinja"),
}


def test_the_shards_that_the_index_names_and_no_others(repository, hub):
    served = hub()
    folder = resolve_checkpoint("me/model")
    index = "model.safetensors.index.json"
    shards = set(json.loads((repository / index).read_text())["weight_map"].values())
    assert len(shards) > 1
    assert served.fetched == {*shards, *SIDE_FILES, index}
    assert all((folder / shard).is_file() for shard in shards)


def test_one_file_without_an_index_and_code_if_asked_for(repository, hub):
    for path in (*repository.glob("model-0*"), repository / "model.safetensors.index.json"):
        path.unlink()
    (repository / "model.safetensors").write_text("weights")
    served = hub()
    folder = resolve_checkpoint("me/model", trust_remote_code=True)
    assert served.fetched == {*SIDE_FILES, "model.safetensors", "modeling_own.py"}
    assert (folder / "model.safetensors").read_text() == "weights"


def test_offline_the_cache_is_enough(repository, hub, monkeypatch):
    hub()
    folder = resolve_checkpoint("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert resolve_checkpoint("me/model") == folder
