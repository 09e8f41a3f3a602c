"""What is no LLaVA, or a broken one, is refused in one sentence, and nothing is left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlm.llavas import edit
from tests.vlm.test_convert_llava import give, take
from vlm import UserError
from vlm.cli import main
from vlm.convert import tensors


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        kept = load_file(folder / "model.safetensors")
        del kept[name]
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def put(name: str, *shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        save_file({**held, name: torch.zeros(shape)}, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def retokenize(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"].remove("<image>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def index_without_shard(folder: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


def index(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def twice(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def edit_text(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit(folder / "config.json", text_config={**text, **changes})

    return change


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "not a model folder .no config.json in it"),
    "no JSON": (lambda f: (f / "config.json").write_text("{,"), "config.json: not valid JSON"),
    "half the weights": (
        lambda f: os.truncate(f / "model.safetensors", 9000),
        "model.safetensors: the weights are cut off or broken",
    ),
    "a missing shard": (index_without_shard, "names model-00001-of-00002.safetensors, which is not there"),
    "an index of numbers": (index({"a": 5}), "index.json: not an index of tensors .its weight_map must give each"),
    "an index of nothing": (index({}), "index.json: not an index of tensors .its weight_map must give each"),
    "a list for an index": (index(["a"]), "index.json: not an index of tensors .no weight_map in it"),
    "the same twice": (twice, "b.safetensors: holds .*, and so does a.safetensors"),
    "code of its own": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "evil.M"}), "run code .*auto_map"),
    "code for images": (
        lambda f: edit(f / "processor_config.json", image_processor={"auto_map": {"AutoImageProcessor": "evil.P"}}),
        "processor_config.json asks to run code",
    ),
    "code for the tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "tokenizer_config.json asks to run code",
    ),
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pickled weights .pytorch_model.bin., which are never loaded",
    ),
    "no lm_head": (drop("language_model.lm_head.weight"), "no lm_head in its weights, and its config.json doesn't tie"),
    "tensors missing": (
        drop("multi_modal_projector.linear_2.bias"),
        r"1 missing \(multi_modal_projector.layers.2.bias\)$",
    ),
    "tensors unexpected": (put("language_model.model.layers.0.extra", 3), r"1 unexpected \(.*layers.0.extra\)$"),
    "a layer less": (edit_text(num_hidden_layers=1), r"9 unexpected \(.* and 4 more\)$"),
    "a projector of another width": (
        put("multi_modal_projector.linear_2.weight", 32, 40),
        r"1 of another shape \(multi_modal_projector.linear_2.weight is 32 x 40 and must be 32 x 32\)$",
    ),
    "tied, with a head of its own": (edit_text(tie_word_embeddings=True), "lm_head.weight differs from .*embed_tokens"),
    "no image token": (retokenize, "its tokenizer has no image token .number 5, as its config.json says"),
    "an image token that is a word": (lambda f: edit(f / "config.json", image_token_index=40), "has no image token"),
    "an image token beyond": (lambda f: edit(f / "config.json", image_token_index=999), "has no image token"),
    "too few embeddings": (
        lambda f: (
            put("language_model.model.embed_tokens.weight", 300, 32)(f),
            put("language_model.lm_head.weight", 300, 32)(f),
            edit_text(vocab_size=300)(f),
        ),
        "tokens in its tokenizer, but only 300 embeddings",
    ),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "give one with --chat-template FILE"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "its tokenizer can't be loaded"),
    "no image settings": (lambda f: (f / "processor_config.json").unlink(), "how images are prepared"),
    "unknown image settings": (
        lambda f: edit(f / "processor_config.json", image_processor={"image_processor_type": "PixtralImageProcessor"}),
        "prepared by PixtralImageProcessor, which is unknown here",
    ),
    "an image token below": (lambda f: edit(f / "config.json", image_token_index=-1), "has no image token"),
    "a kind that is no name": (
        lambda f: edit(f / "config.json", model_type=[]),
        "the model_type in its config.json is .., and no name",
    ),
    "an empty chat template": (lambda f: (f / "chat_template.jinja").write_text("\n"), "the chat template is empty"),
    "a broken chat template": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}{{ m.a"),
        "the chat template can't render a message of a user",
    ),
    "quantised weights": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "its weights are quantised .bitsandbytes.; import the model that it was made of",
    ),
    "another kind of model": (
        lambda f: edit(f / "config.json", model_type="bert"),
        "a 'bert' model; .* can be imported",
    ),
    "an encoder that is unknown": (
        lambda f: edit(f / "config.json", vision_config={"model_type": "vit", "image_size": 32, "patch_size": 8}),
        "'vit' is no vision encoder that is known here",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_in_one_sentence(
    copied: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, complaint = BROKEN[what]
    change(copied)
    assert main(["import", str(copied), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert said.startswith(f"vlm import: {copied}")
    with pytest.raises(UserError, match=complaint):
        raise UserError(said)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    (tmp_path / "file").write_text("")
    for source, complaint in (
        (tmp_path / "none", "no such model folder"),
        ("no/such-model", r"no/such-model: no such folder here, and the hub can't be reached \(Cannot find.*folder\)$"),
    ):
        for command in (take, give):
            with pytest.raises(UserError, match=complaint):
                command(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_hub_id_is_told_from_a_network_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def unknown(name: str, allow_patterns: list[str]) -> None:
        import httpx
        from huggingface_hub.errors import RepositoryNotFoundError

        asked.extend(allow_patterns)
        request = httpx.Request("GET", "https://hub.example")
        raise RepositoryNotFoundError("401 Client Error.", response=httpx.Response(401, request=request))

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    with pytest.raises(UserError, match="no/such-model: neither a folder here nor a model on the hub"):
        take("no/such-model", tmp_path / "out")
    assert "*.safetensors" in asked
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked)
