"""Saved models on the Hugging Face hub, which a small server on this machine stands in for; their model cards."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import random_images, tiny_vit

from cpvit import PruneConfig, load_pruned, plan_of, prune_, save_pruned
from cpvit.weights.card import CARD
from cpvit.weights.saving import FILES

SHA = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """What ``huggingface_hub`` asks of the hub: repositories, commits of small files, listings, files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body, path = self.body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        _, _, _, user, name, verb, _ = path.split("/")
        if verb == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert verb == "commit"
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                self.server.messages.append(item["value"]["summary"])
            else:
                content = base64.b64decode(item["value"]["content"])
                self.server.repositories[f"{user}/{name}"][item["value"]["path"]] = content
        address = f"{self.server.address}/{user}/{name}/commit/{SHA}"
        return self.answer({"success": True, "commitUrl": address, "commitOid": SHA})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.repositories:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            files = self.server.repositories[name]
            if "tree" in parts:
                listed = [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for path, content in files.items()
                ]
                return self.answer(listed)
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "modelId": name, "sha": SHA, "siblings": siblings})
        user, name, _, revision, *path = parts
        content = self.server.repositories[f"{user}/{name}"]["/".join(path)]
        assert revision == SHA
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET  # noqa: N815 -- the base class's name


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_stand_in")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model() -> Any:
    model = tiny_vit(mlp_ratio=4.0).float()
    prune_(model, PruneConfig(method="cpvit-merge", keep_per_block=(30, 20, 9)))
    return model


def test_a_model_goes_to_the_hub_and_comes_back(model: Any, hub: StandIn, tmp_path: Path) -> None:
    folder = save_pruned(model, tmp_path / "saved", push_to_hub="somebody/tiny-60")
    held = hub.repositories["somebody/tiny-60"]
    assert sorted(held) == sorted((*FILES, CARD))
    assert all(held[name] == (folder / name).read_bytes() for name in held)
    assert hub.messages == ["vit_tiny_patch16_224: keep_per_block"]
    again = load_pruned("hf-hub:somebody/tiny-60")
    images = random_images().float()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    assert plan_of(again) == plan_of(model)
    assert 'load_pruned("hf-hub:somebody/tiny-60")' in held[CARD].decode()


def test_only_the_files_of_a_saved_model_are_uploaded(model: Any, hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("private")
    save_pruned(model, tmp_path / "saved", push_to_hub="somebody/tiny-60")
    assert "notes.txt" not in hub.repositories["somebody/tiny-60"]


def test_a_repository_that_is_not_there_is_named(hub: StandIn) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf-hub:nobody/nothing cannot be fetched .*give hf-hub:user/name"
    ):
        load_pruned("hf-hub:nobody/nothing")


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/b"])
def test_a_name_that_is_no_repository_is_refused(model: Any, hub: StandIn, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the repository as user/name"):
        save_pruned(model, tmp_path, push_to_hub=name)
    assert hub.repositories == {}


def test_the_card_says_how_it_was_pruned_and_what_it_costs(model: Any, tmp_path: Path) -> None:
    plan = plan_of(model)
    assert plan is not None
    card = (save_pruned(model, tmp_path, results={"top-1 %": 81.54}) / CARD).read_text()
    for text in (
        "library_name: cpvit",
        f"pruned to {100 * plan.macs_ratio:.0f}% of the MACs",
        "| method | cpvit-merge, keep_per_block",
        "| tokens leaving each block | 31 21 10 (of 36) |",
        "| heads | none |",
        f"| MACs per image | {100 * plan.macs_ratio:.1f}% of the dense model's |",
        "| image | 3 x 40 x 56 |",
        "| top-1 % | 81.54 |",
        'load_pruned("THIS_FOLDER")',
    ):
        assert text in card
    assert "was not measured" not in card
    assert str(tmp_path) not in card
    assert "was not measured" in (save_pruned(model, tmp_path) / CARD).read_text()


def test_a_card_of_heads_says_which_are_left(tmp_path: Path) -> None:
    model = tiny_vit(mlp_ratio=4.0)
    plan = prune_(model, PruneConfig(keep_rate=0.5, head_keep_rate=0.4), calibration=random_images())
    card = (save_pruned(model, tmp_path) / CARD).read_text()
    left = " ".join(str(count) for count in plan.heads_per_block)
    assert f"| heads | left in each block: {left} of 5 5 5 |" in card


def test_a_readme_that_somebody_wrote_stays(model: Any, tmp_path: Path) -> None:
    save_pruned(model, tmp_path)
    (tmp_path / CARD).write_text("# Mine\n")
    save_pruned(model, tmp_path)
    assert (tmp_path / CARD).read_text() == "# Mine\n"


def test_a_folder_without_a_card_still_loads(model: Any, tmp_path: Path) -> None:
    (save_pruned(model, tmp_path) / CARD).unlink()
    assert plan_of(load_pruned(tmp_path)) == plan_of(model)
