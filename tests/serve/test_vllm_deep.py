"""Deep fusion in a real vLLM: the same tokens as our own generate, whatever the scheduler does meanwhile."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.serve.helpers import CHAT, picture, refused
from tests.serve.test_vllm import assert_images_matter
from tests.serve.vllm_models import Case, Oracle, assert_same_tokens, build, cases
from tests.serve.vllm_server import ROOT, Server, chat, serving, vllm_python
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
        preempted = server.metrics()["num_preemptions_total"]
        assert (preempted > 0) == ("--num-gpu-blocks-override" in flags), f"{preempted} requests were thrown out"
        assert_same_tokens(oracle, asked, got)
        with server.client() as client:
            crowd = Case("what?", tuple(picture(seed) for seed in range(IMAGES + 1)))
            assert str(IMAGES) in refused(client.post(CHAT, json=chat(crowd, max_tokens=3)))["message"]
    return server


SETTINGS: dict[str, dict[str, Any]] = {
    "served": {"tensor_parallel_size": 2},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "context parallelism": {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "prefix caching": {"enable_prefix_caching": True},
    "transfer of the cache": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "a limit of no images": {"limit_mm_per_prompt": {"image": 0}},
}
ASK_FOR_SETTINGS = """
import json, sys
from serve.vllm_plugin import register
from vllm.engine.arg_utils import EngineArgs

register()
deep = {"hf_overrides": {"architectures": ["DeepVisionLanguageModel"]}, "enable_prefix_caching": False}
for settings in json.loads(sys.argv[2]):
    try:
        EngineArgs(sys.argv[1], tokenizer_mode="vlm", **{**deep, **settings}).create_engine_config()
        told = "served"
    except ValueError as error:
        told = str(error)
    print("told:", " ".join(told.split()))
"""


NAME_IMAGES = """
import sys
from serve.vllm_plugin.renderer import _prompt
from vllm.multimodal.media.base import MediaWithBytes

shown = [MediaWithBytes(None, data.encode()) for data in sys.argv[1:]]
print("told:", *_prompt([1], {"image": shown})["multi_modal_uuids"]["image"])
"""


def run_in_vllm(script: str, folder: Path, *arguments: str) -> list[str]:
    """What the script tells, a line each, run by the interpreter that has vLLM."""
    done = subprocess.run(
        [vllm_python(), "-P", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    told = [line.removeprefix("told: ") for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert told, done.stderr[-2000:]
    return told


def test_an_image_is_found_again_by_what_it_is(tmp_path: Path) -> None:
    (line,) = run_in_vllm(NAME_IMAGES, tmp_path, "cat", "dog", "cat")
    cat, dog, again = line.split()
    assert cat == again != dog


def test_settings_that_deep_fusion_is_not_served_with_are_refused_by_name(tmp_path: Path) -> None:
    build(tmp_path / "model", "deep, mlp")
    told = run_in_vllm(ASK_FOR_SETTINGS, tmp_path, str(tmp_path / "model"), json.dumps([*SETTINGS.values()]))
    for (name, settings), line in zip(SETTINGS.items(), told, strict=True):
        assert (f"not served with {name}" in line) if name != "served" else line == "served", (settings, line)


def test_requests_that_are_thrown_out_and_read_in_pieces_say_the_same(tmp_path: Path) -> None:
    ask_all(tmp_path, "deep, mlp", (*EAGER, *CROWDED), count=60, max_tokens=120)


def test_a_compiled_model_says_the_same(tmp_path: Path) -> None:
    server = ask_all(tmp_path, "deep, perceiver, all images", (), count=60, max_tokens=48)
    assert "Warming up model for the compilation" in server.log.read_text()
