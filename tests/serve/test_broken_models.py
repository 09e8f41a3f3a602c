"""`vlm chat` on model folders that can't answer: one sentence that names the folder, exit 1, no traceback."""

import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import serve.runner
from tests.serve.helpers import picture
from vlm.cli import main

Break = Callable[[Path], None]


def fill(part: str, value: float) -> Break:
    """Weights whose name has `part` in it."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {k: torch.full_like(v, value) if part in k else v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})

    return spoil


def configure(**settings: Any) -> Break:
    """Settings of config.json, of its text_config where that has them."""

    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        for name, value in settings.items():
            place = config["text_config"] if name in config["text_config"] else config
            place[name] = value
        file.write_text(json.dumps(config))

    return spoil


def write(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:150]) and None


def renumber(folder: Path) -> None:
    """Words of the tokenizer get ids that the model doesn't have."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number + 500 * (number > 100) for word, number in vocab.items()}
    file.write_text(json.dumps(tokenizer))


BROKEN = {
    "weights NaN": (fill("embed_tokens", float("nan")), "the model gave non-finite logits"),
    "weights infinite": (fill("embed_tokens", float("inf")), "the model gave non-finite logits"),
    "encoder NaN": (fill("vision_tower", float("nan")), "the vision tower gave non-finite features"),
    "projector NaN": (fill("multi_modal_projector", float("nan")), "non-finite"),
    "epsilon NaN": (configure(rms_norm_eps=float("nan")), "non-finite"),
    "another width": (configure(hidden_size=48), r"weights don't fit its config.json: .* is \[305, 64\] there"),
    "another vocabulary": (configure(vocab_size=1000), r"there, and \[1000, 64\] is asked for"),
    "more layers": (configure(num_hidden_layers=5), "weights lack 18 tensors"),
    "fewer layers": (configure(num_hidden_layers=1), "no place for 18 of its tensors"),
    "no fusion": (configure(fusion="sideways"), "cannot be loaded"),
    "no image token": (configure(image_token_id=99), "tokenizer doesn't fit its config.json"),
    "tokenizer cut off": (cut("tokenizer.json"), "cannot be loaded"),
    "tokenizer no JSON": (write("tokenizer.json", bytes(range(256))), "cannot be loaded"),
    "tokenizer of another": (renumber, "tokenizer doesn't fit its config.json .the prompt has token"),
    "template cut off": (cut("chat_template.jinja"), "chat template or tokenizer fails"),
    "template that refuses": (
        write("chat_template.jinja", b"{{ raise_exception('no') }}"),
        "refuses these messages: no",
    ),
    "weights cut off": (cut("model.safetensors"), "weights are cut off or broken"),
}


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """(folder, conversation, more words) -> exit code and what was said on stdout and stderr."""
    picture(1).save(tmp_path / "a.png")

    def run(folder: Path, conversation: bool, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\nand now?\n"))
        prompt = () if conversation else ("what is it?",)
        capsys.readouterr()  # what was said while the model was made
        words = ["chat", str(folder), *prompt, "--image", str(tmp_path / "a.png"), "--device", "cpu", *more]
        code = main([*words, "--max-tokens", "4"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("conversation", [False, True], ids=["question", "conversation"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_told_in_one_sentence(
    tiny_models: Any, tmp_path: Path, ask: Any, name: str, conversation: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models("early", "mlp"), folder)
    spoil, why = BROKEN[name]
    spoil(folder)
    code, out, err = ask(folder, conversation)
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"vlm chat: {folder}: ")
    assert not out.strip()
    assert re.search(why, err), err


@pytest.mark.parametrize("conversation", [False, True], ids=["question", "conversation"])
@pytest.mark.parametrize("method", ["encode", "prefill", "decode"])
def test_a_forward_that_raises_ends_it(
    tiny_models: Any, ask: Any, monkeypatch: pytest.MonkeyPatch, method: str, conversation: bool
) -> None:
    real, calls = getattr(serve.runner.ModelRunner, method), 0

    def raising(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 or method == "encode":  # the first is the engine's own trial
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more lines")
        return real(*arguments, **settings)

    monkeypatch.setattr(serve.runner.ModelRunner, method, raising)
    folder = tiny_models("early", "mlp")
    code, _, err = ask(folder, conversation)
    assert code == 1
    assert err == (
        f"vlm chat: {folder}: the model failed on this request (mat1 and mat2 shapes cannot be multiplied)\n"
    )


def test_debug_shows_where_a_model_failed(
    tiny_models: Any, tmp_path: Path, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models("early", "mlp"), folder)
    fill("embed_tokens", float("nan"))(folder)
    assert ask(folder, False)[0] == 1
    assert not caplog.records
    with pytest.raises(ValueError, match="non-finite logits"):
        ask(folder, False, "--debug")
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert not logging.getLogger("serve.engine").disabled
