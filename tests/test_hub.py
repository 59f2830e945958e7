"""Models by their name on the Hugging Face hub: the hub's real client, and a server here that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from test_checkpoint import same_params

import djax
from djax.checkpoints.source import SHIPPED

NAME, COMMIT = "someone/some-model", "0123456789abcdef0123456789abcdef01234567"
READ = {file.name: file.read_bytes() for file in SHIPPED.iterdir()}
# What repositories have besides: code, pickles, and the weights once more for another program.
NOT_READ = dict.fromkeys(
    ["README.md", "modeling.py", "pytorch_model.bin", "original/model.safetensors", "onnx/config.json"], b"not for djax"
)
FILES = READ | NOT_READ


class Hub(BaseHTTPRequestHandler):
    """The endpoints that `snapshot_download` asks, for one open and one gated model."""

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = [{"type": "file", "path": n, "size": len(data), "oid": etag(data)} for n, data in FILES.items()]
            self.answer(json.dumps(files).encode())
        elif path.startswith(f"/{NAME}/resolve/") and path.split("/", 5)[-1] in FILES:
            data = FILES[path.split("/", 5)[-1]]
            self.answer(data, **{"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/someone/gated"):
            self.answer(b"{}", 403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
        elif path.startswith("/api/models/someone/broken"):
            self.answer(b"<html>", 200)
        else:
            self.answer(b"{}", 401, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})

    do_HEAD = do_GET

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *message):
        pass


def etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@pytest.fixture
def user(hub, tmp_path):
    """Runs Python as a user whose hub is this one, with a cache of their own."""
    mine = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    # Where the machine has its own settings for the real hub.
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}

    def run(*arguments, **environment):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=others | mine | {"COLUMNS": "200"} | environment
        )

    return run


DECODE = f"""
import djax
question = "Anna has 12 pens. She buys 7 more. She gives 4 to Tom. How many pens does Anna have now?"
for path in ({NAME!r}, None):
    print(djax.generate(djax.load(path), question, gen_length=64).text.split()[-1])
"""
FAIL = """
import sys, djax
for name in sys.argv[1:]:
    try:
        djax.load(name)
    except djax.PathError as error:
        print(error)
"""


def test_fetched_once_then_from_the_cache(hub, user, tmp_path):
    done = user("-c", DECODE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["15", "15"], "the shipped model's answer"
    fetched = {path.split("/", 5)[-1] for path in hub.asked if "/resolve/" in path}
    assert fetched == READ.keys()
    (snapshot,) = (tmp_path / "hf").glob("hub/models--someone--some-model/snapshots/*")
    assert {file.name: file.read_bytes() for file in snapshot.rglob("*")} == READ

    # Gone: nobody listens there now.
    hub.shutdown()
    hub.server_close()
    asked = len(hub.asked)
    done = user("-m", "djax.cli", "convert", NAME, "out")
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked
    same_params(djax.load(tmp_path / "out").params, djax.load().params)
    # As an interrupted download leaves it.
    (snapshot / "model.safetensors").unlink()
    done = user("-m", "djax.cli", "info", NAME)
    assert done.returncode == 2 and "does not have all of it" in done.stderr


def test_what_cannot_be_had(hub, user, tmp_path):
    """One line that says what would work."""
    done = user("-c", FAIL, "someone/unknown", "someone/gated", "someone/broken")
    assert done.returncode == 0, done.stderr
    unknown, gated, broken = done.stdout.splitlines()
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    assert unknown == (
        "someone/unknown: there is no such directory, and as a model of the Hugging Face hub it cannot be had: "
        f"{endpoint} knows no such model; check the name, or run `hf auth login` if it is a private one"
    )
    assert f"agree at {endpoint}/someone/gated, then run `hf auth login`" in gated
    assert "cannot be had: JSONDecodeError: Expecting value" in broken

    hub.shutdown()
    hub.server_close()
    no_network = user("-m", "djax.cli", "info", NAME)
    told_offline = user("-m", "djax.cli", "convert", NAME, "out", HF_HUB_OFFLINE="1")
    for done, reason in ((no_network, "Connection refused"), (told_offline, "HF_HUB_OFFLINE")):
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert f"the hub's cache, {tmp_path}/hf/hub, does not have all of it, and {endpoint} cannot be asked" in line
        assert reason in line
        assert f"run `hf download {NAME} --local-dir DIR`, bring DIR here and give its path" in line
    assert not (tmp_path / "out").exists()
