"""Names of models: folders, hub ids, and neither."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from vlm import UserError, load
from vlm.cli import main
from vlm.hub import fetch


def failed(kind: type[Any]) -> Exception:
    error: Exception = kind("404 Client Error", response=httpx.Response(404, request=httpx.Request("GET", "http://h")))
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (failed(RepositoryNotFoundError), "nobody/nothing: neither a folder here nor a model on the hub"),
        (failed(GatedRepoError), "nobody/nothing: the hub gives this model only to those it let in"),
        (LocalEntryNotFoundError("no network"), "nobody/nothing: no such folder here, and the hub can't be reached"),
        (ConnectionError("no network"), "nobody/nothing: no such folder here, and the hub can't be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("command", ["chat", "serve", "import", "export", "train"])
def test_a_wrong_or_unreachable_hub_id_is_one_sentence(
    command: str,
    error: Exception,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def download(name: str, **_: Any) -> str:
        assert name == "nobody/nothing"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    out = str(tmp_path / "out")
    recipe = Path(__file__).resolve().parents[2] / "configs" / "finetune.yaml"
    arguments = {
        "chat": ["nobody/nothing", "hello"],
        "serve": ["nobody/nothing", "--port", "0"],
        "import": ["nobody/nothing", "--out", out],
        "export": ["nobody/nothing", "--to", "vlm", "--out", out],
        "train": [str(recipe), "model.pretrained=nobody/nothing", f"data_root={tmp_path}", "--out", out],
    }
    assert main([command, *arguments[command]]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"vlm {command}: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_is_downloaded_without_pickles_and_loaded_behind_the_same_doors(
    tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tiny_models("early", "mlp") if name == "some/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("some/model")[0].config.fusion == "early"
    assert not any("bin" in pattern or "pt" in pattern or "py" in pattern for pattern in asked[0])
    (tmp_path / "config.json").write_text('{"model_type": "vlm", "auto_map": {"AutoModel": "trap.Model"}}')
    with pytest.raises(UserError, match="auto_map"):
        load("some/trap")


@pytest.mark.parametrize("name", ["./gone", "/gone/there", "~/gone", "a/b/c", "gone", "gone/"])
def test_what_can_be_no_hub_id_is_a_missing_folder(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such model folder"):
        fetch(name)
