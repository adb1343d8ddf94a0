"""The workspace as JSON: as it was looked at, of keys that runs write, and pushed to a server of our own."""

import base64
import importlib.util
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sdtrain.tracker.dashboard import SECTIONS, Curves, Pictures, workspace
from sdtrain.tracker.jsonl import read_rows

TOOL = Path(__file__).parents[2] / "tools" / "dashboard.py"
SNAPSHOT = Path(__file__).with_name("dashboard.json")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("dashboard", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.fixture
def server():
    """(address, requests, answers): each answer is (status, content), given in turn."""
    requests, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], content))
            status, said = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}", requests, answers
        made.shutdown()
        thread.join()


def test_the_workspace_is_the_one_that_was_looked_at():
    """After a change that is wanted: python tools/dashboard.py quick-project --out tests/tools/dashboard.json"""
    assert workspace("quick-project") == json.loads(SNAPSHOT.read_text())


def test_of_a_run_it_shows_its_group_and_of_a_project_the_stages_apart(tool, tmp_path):
    (tmp_path / "config.yaml").write_text("name: quick\ntracker:\n  project: mine\n")
    code, said, _ = tool(tmp_path)
    assert (code, said) == (0, f"{tmp_path / 'dashboard.json'}\n")
    view = json.loads((tmp_path / "dashboard.json").read_text())
    assert (view["project"], view["displayName"]) == ("mine", "sdtrain: quick")
    (runs,) = view["spec"]["section"]["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "quick")
    whole = workspace("mine")
    assert [key["name"] for key in whole["spec"]["section"]["runSets"][0]["grouping"]] == ["group", "jobType"]
    assert whole["name"] != view["name"] == workspace("mine", "quick")["name"]


def test_every_panel_shows_what_runs_write(finished):
    rows = read_rows(finished / "metrics.jsonl")
    keys = {key for row in rows if "event" not in row for key in row}
    pictures = {row["name"] for row in rows if row.get("event") == "image"}
    for panel in (panel for panels in SECTIONS.values() for panel in panels):
        if isinstance(panel, Curves):
            found = any(re.fullmatch(panel.pattern, key) for key in keys) if panel.pattern else bool(panel.keys)
            missing = set(panel.keys) - keys - {"peak_device_memory_bytes"}
            assert found, panel.title
            assert not missing, panel.title
        elif isinstance(panel, Pictures):
            assert set(panel.keys) <= pictures
        else:
            assert panel.key.removesuffix("_by_prompt") in pictures


def test_without_a_key_nothing_is_pushed(tool, tmp_path):
    code, _, error = tool("quick", "--out", tmp_path / "made.json", "--push")
    assert code == 2
    needs = "dashboard: --push needs a key for https://api.wandb.ai; run `wandb login`, or set WANDB_API_KEY\n"
    assert error == needs
    assert (tmp_path / "made.json").is_file()


def test_it_is_pushed_as_a_view_of_the_project(tool, server, monkeypatch, tmp_path):
    address, requests, answers = server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "secret-secret-secret")
    answers.append((200, {"data": {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}}))
    code, said, _ = tool("quick", "--entity", "we", "--out", tmp_path / "made.json", "--push")
    assert code == 0
    assert said.splitlines()[1] == "workspace 'sdtrain' of we/quick (?nw=abc)"
    ((path, authorisation, sent),) = requests
    assert (path, base64.b64decode(authorisation.split()[1])) == ("/graphql", b"api:secret-secret-secret")
    about = sent["variables"]
    assert (about["entityName"], about["projectName"], about["type"]) == ("we", "quick", "project-view")
    assert json.loads(about["spec"]) == workspace("quick")["spec"]
    assert "secret" not in said


def test_a_server_that_refuses_or_is_gone_is_a_line(tool, server, monkeypatch, tmp_path):
    address, _, answers = server
    monkeypatch.setenv("WANDB_API_KEY", "secret-secret-secret")
    monkeypatch.setenv("WANDB_BASE_URL", address)
    view = {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}}}
    answers += [(200, {"errors": [{"message": "no such project"}], "data": view}), (401, {})]
    for wanted in (f"dashboard: {address} refused it: no such project\n", "did not take it: 401 Unauthorized\n"):
        code, _, error = tool("quick", "--out", tmp_path / "made.json", "--push")
        assert (code, error.endswith(wanted)) == (1, True), error
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, _, error = tool("quick", "--out", tmp_path / "made.json", "--push")
    assert (code, error.count("\n")) == (1, 1)
    assert "secret" not in error


def test_what_is_no_run_is_said_in_one_line(tool, tmp_path):
    (tmp_path / "config.yaml").write_text("name: [\n")
    for place, wanted in (("outputs/absent", "there is no run at outputs/absent"), (tmp_path, "is not a run's")):
        code, _, error = tool(place)
        assert (code, error.count("\n")) == (2, 1)
        assert wanted in error
    code, _, error = tool("quick", "--out", tmp_path / "config.yaml" / "x.json")
    assert (code, error.startswith("dashboard: cannot write")) == (2, True)
