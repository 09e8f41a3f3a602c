"""Exported folders in other versions of transformers, each in an environment of its own: the same tokens and logits."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.transformers_environment import UnavailableError, environment
from tests.vlm.chats import picture
from tests.vlm.llavas import make_llava
from tests.vlm.test_convert_llava import CHAT, VARIANTS, give, ours, take
from vlm import load

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

# What a user of the folder does, without anything of this project: told are tokens, pixels and logits.
USER = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, chat, *files = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder)
text = processor.apply_chat_template(json.loads(chat), add_generation_prompt=True)
images = [Image.open(file) for file in files]
inputs = processor(images=images, text=text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    logits = model.eval()(**inputs).logits[0]
lost = [str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[name]]
print(json.dumps([lost, inputs["input_ids"][0].tolist(), logits.tolist()]))
"""
# Writes the weights and configuration of a folder again, in the layout of the version that runs.
WRITER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
AutoProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
# and what their version begins with
RELEASES = {"transformers<5": "4.57.", "transformers==5.16.1": "5.16.1", "transformers>=5.16.1,<5.20": "5.19."}


@pytest.fixture(scope="module", params=RELEASES)
def python(request: pytest.FixtureRequest) -> str:
    try:
        found = str(environment(request.param))
    except UnavailableError as error:
        pytest.skip(f"no environment with {request.param}: {error}")
    version = run(found, "import transformers; print(transformers.__version__)")
    assert version.startswith(RELEASES[request.param])
    return found


def run(python: str, code: str, *arguments: str) -> str:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_exported_folder_answers_the_same_there(python: str, kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    imported = take(make_llava(tmp_path / "llava", tiny_tokenizer, **VARIANTS[kind]), tmp_path / "imported")
    exported = give(imported, tmp_path / "exported")
    sizes = [(50, 40), (20, 90)]
    for number, (width, height) in enumerate(sizes, 1):
        picture(number, width, height).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    lost, ids, logits = json.loads(run(python, USER, str(exported), json.dumps(CHAT), *files).splitlines()[-1])
    assert lost == []
    _, processor = load(imported)
    expected = processor.chat.encode(
        CHAT,
        [processor.image_tokens.placeholders(height, width) for width, height in sizes],
        add_generation_prompt=True,
    )
    assert ids == expected.input_ids
    torch.testing.assert_close(torch.tensor([logits]), ours(imported), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_written_there_is_read_here(python: str, kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "llava", tiny_tokenizer, **VARIANTS[kind])
    imported = take(source, tmp_path / "imported")
    exported = give(imported, tmp_path / "exported")
    run(python, WRITER, str(exported), str(tmp_path / "theirs"))
    torch.testing.assert_close(ours(take(tmp_path / "theirs", tmp_path / "again")), ours(imported), rtol=0, atol=1e-6)
