"""Deep fusion in a real vLLM: the same tokens as our own generate, whatever the scheduler does meanwhile."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.serve.helpers import CHAT, picture, refused
from tests.serve.test_vllm import assert_images_matter
from tests.serve.vllm_models import Case, Oracle, assert_same_tokens, build, cases
from tests.serve.vllm_server import Server, chat, serving
from vlm import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
IMAGES = 4
LIMIT = ("--max-model-len", "512", "--limit-mm-per-prompt", f'{{"image": {IMAGES}}}')
# room for three requests of full length; prompts in pieces that are shorter than most of them
CROWDED = ("--num-gpu-blocks-override", "28", "--max-num-batched-tokens", "48", "--max-num-seqs", "16")
EAGER = ("--enforce-eager",)


def ask_all(folder: Path, kind: str, flags: Sequence[str], count: int, max_tokens: int) -> Server:
    """Asks a model of this kind questions with up to four images, many at once. Returns the server, which has ended."""
    build(folder / "model", kind)
    oracle, asked = Oracle(*load(folder / "model"), max_tokens), cases(count, IMAGES)
    assert_images_matter(oracle)
    with serving(folder / "model", folder, flags=(*LIMIT, *flags)) as server:
        got = server.ask(asked, max_tokens=max_tokens, at_once=16)
        preempted = server.metric("vllm:num_preemptions_total")
        assert (preempted > 0) == ("--num-gpu-blocks-override" in flags), f"{preempted} requests were thrown out"
        assert_same_tokens(oracle, asked, got)
        with server.client() as client:
            crowd = Case("what?", tuple(picture(seed) for seed in range(IMAGES + 1)))
            assert str(IMAGES) in refused(client.post(CHAT, json=chat(crowd, max_tokens=3)))["message"]
    return server


def test_requests_that_are_thrown_out_and_read_in_pieces_say_the_same(tmp_path: Path) -> None:
    ask_all(tmp_path, "deep, mlp", (*EAGER, *CROWDED), count=60, max_tokens=120)


def test_a_compiled_model_says_the_same(tmp_path: Path) -> None:
    server = ask_all(tmp_path, "deep, perceiver, all images", (), count=60, max_tokens=48)
    assert "Warming up model for the compilation" in server.log.read_text()
