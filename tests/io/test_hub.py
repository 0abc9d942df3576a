from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mmdiff.errors import CheckpointError
from mmdiff.io import hub


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        seen.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


def test_an_existing_path_wins_over_an_id(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert hub.resolve("owner/name") == Path("owner/name")
    assert not calls


def test_an_id_is_fetched_at_its_revision_without_code_or_pickles(calls, tmp_path):
    assert hub.resolve("GSAI-ML/LLaDA-8B-Base", "abc123") == tmp_path
    (call,) = calls
    assert (call["repo_id"], call["revision"]) == ("GSAI-ML/LLaDA-8B-Base", "abc123")
    wanted = [
        "config.json",
        "model-00001-of-00006.safetensors",
        "model.safetensors.index.json",
        "image_tokenizer/config.json",
    ]
    refused = ["modeling_llada.py", "pytorch_model.bin", "model.pth", "x.ckpt", "data.pkl", "weights.gguf"]
    assert [n for n in wanted + refused if any(fnmatch(n, p) for p in call["allow_patterns"])] == wanted


@pytest.mark.parametrize(
    "text", ["./runs/x", "../x/y", "/abs/x", "x", "a/b/c", "https://host/x", "-a/b", "pipe:ls/x", ""]
)
def test_what_is_neither_path_nor_id_never_reaches_the_network(calls, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "":
        assert hub.resolve(text) == Path()
        return
    with pytest.raises(CheckpointError, match="not an id on the hub"):
        hub.resolve(text)
    with pytest.raises(CheckpointError):
        hub.resolve(Path("owner/name"))
    assert not calls


@pytest.mark.parametrize(("offline", "advice"), [("1", "HF_HUB_OFFLINE is set"), ("0", "check the id")])
def test_an_unreachable_hub_is_a_sentence_without_addresses(monkeypatch, offline, advice):
    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("https://host/?token=SECRET")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError, match=advice) as error:
        hub.resolve("owner/name")
    assert "SECRET" not in str(error.value)


def test_upload_needs_a_card_and_sends_no_other_files(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="no model card"):
        hub.push(tmp_path, "owner/name")
    (tmp_path / "README.md").write_text("card")
    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            sent["repo"] = (repo_id, options)

        def upload_folder(self, **options: Any) -> str:
            sent["upload"] = options
            return "https://huggingface.co/owner/name"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push(tmp_path, "owner/name").endswith("owner/name")
    assert sent["repo"] == ("owner/name", {"private": True, "exist_ok": True})
    assert sent["upload"]["allow_patterns"] == hub.FILES


def test_an_existing_path_wins_over_the_name_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny") == hub.EMBEDDED
    assert hub.is_embedded(hub.resolve("tiny"))
    (tmp_path / "tiny").mkdir()
    assert not hub.is_embedded(hub.resolve("tiny"))
