import io
import subprocess
import sys

import pytest

from serve.commands import model_name, split_prompt
from serve.terminal import Conversation
from tests.serve.helpers import picture
from vlm.cli import main, parse
from vlm.errors import UserError


@pytest.fixture
def photo(tmp_path):
    picture(1).save(tmp_path / "a photo.png")
    return tmp_path / "a photo.png"


def test_chat_answers_one_question_and_streams_it(tiny_models, photo, capsys):
    folder = str(tiny_models("early", "perceiver"))
    forms = (
        ["chat", folder, "--max-tokens", "8", "--image", str(photo), "what is it?"],
        ["chat", folder, "what is it?", "--image", str(photo), "--max-tokens", "8"],
        ["chat", folder, "--image", str(photo), "--max-tokens", "8", "what is it?"],
    )
    said = []
    for form in forms:
        assert main([*form, "--device", "cpu"]) == 0
        said.append(capsys.readouterr().out)
    assert said == [said[0]] * 3
    assert len(said[0]) > 1


def test_chat_names_what_is_wrong(tiny_models, tmp_path, capsys):
    folder = str(tiny_models("early", "mlp"))
    assert main(["chat", folder, "hi", "--image", str(tmp_path / "none.png")]) == 1
    assert "none.png: no such image" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "hi"]) == 1
    assert "not a model folder" in capsys.readouterr().err
    assert main(["chat", folder, "x" * 600, "--device", "cpu"]) == 1
    assert "context of 512 tokens" in capsys.readouterr().err


def test_a_conversation_remembers_resets_and_survives_mistakes(make_engine, loaded, photo):
    _, processor = loaded()
    engine = make_engine(max_batch=1)
    talk = Conversation(engine, processor, max_tokens=5, temperature=0.0)
    out = io.StringIO()
    lines = f"hello\n\n/image {photo}\nand this?\n/image nowhere.png\n/dance\nmore\n{'x' * 600}\n/quit\nunread\n"
    assert talk.run(io.StringIO(lines), out) == 0
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3
    assert len(talk.images) == 1
    assert talk.messages[2]["content"][0] == {"type": "image"}
    assert "nowhere.png: no such image" in out.getvalue()
    assert "/dance is not known" in out.getvalue()
    assert "/reset starts again" in out.getvalue()
    talk.run(io.StringIO("/reset\n"), out)
    assert (talk.messages, talk.images) == ([], [])
    with pytest.raises(UserError, match="no such image"):
        talk.show(photo.with_name("other.png"))


@pytest.mark.parametrize(
    ("prompt", "images", "expected"),
    [
        (None, ["a.png", "what is it?"], ("what is it?", ["a.png"])),
        (None, ["a.png", "describe"], ("describe", ["a.png"])),
        (None, ["a.png", "b.pgn"], (None, ["a.png", "b.pgn"])),
        (None, ["a.png"], (None, ["a.png"])),
        ("hi", ["a.png", "b c"], ("hi", ["a.png", "b c"])),
    ],
)
def test_a_prompt_after_the_images_is_found(prompt, images, expected):
    assert split_prompt(prompt, images) == expected


def test_clients_see_no_path_of_the_model(tmp_path):
    assert model_name(str(tmp_path / "..") + "/" + tmp_path.name) == tmp_path.name
    assert model_name("owner/model") == "owner/model"


def test_serve_checks_its_options(capsys):
    assert parse(["serve", "m", "--max-batch", "3"]).max_batch == 3
    for wrong in (["--max-batch", "0"], ["--engine", "abacus"], ["--port", "x"]):
        with pytest.raises(SystemExit) as caught:
            parse(["serve", "m", *wrong])
        assert caught.value.code == 2
    assert main(["serve", "m", "--api-key", " "]) == 1
    assert "key is empty" in capsys.readouterr().err


def test_the_help_needs_no_heavy_import():
    check = "import sys; from vlm.cli import parse\ntry: parse(['serve', '--help'])\nexcept SystemExit: pass\n"
    heavy = "print([name for name in ('torch', 'fastapi', 'transformers', 'uvicorn') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check + heavy], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
