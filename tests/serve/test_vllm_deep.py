"""Deep fusion in a real vLLM: the same tokens as our own generate, whatever the scheduler does meanwhile."""

import json
import os
import pickle
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
    "served": {"tensor_parallel_size": 2, "enforce_eager": True},
    "served compiled": {"compilation_config": {"splitting_ops": ["vllm::unified_attention_with_output"]}},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
    "context parallelism": {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "prefix caching": {"enable_prefix_caching": True},
    "prefix caching of states": {"mamba_cache_mode": "align"},
    "offloading of the cache": {"kv_offloading_size": 1},
    "transfer of images": {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
    "embeddings as prompts": {"enable_prompt_embeds": True},
    "dual batch overlap": {"enable_dbo": True},
    "fused quantised attention": {"compilation_config": {"pass_config": {"fuse_attn_quant": True}}},
    "graphs of all operations": {"compilation_config": {"splitting_ops": []}},
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
        config = EngineArgs(sys.argv[1], tokenizer_mode="vlm", **{**deep, **settings}).create_engine_config()
        told = "served" if "vllm::attend_to_media" in config.compilation_config.splitting_ops else "in graphs"
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


LEFT_BEHIND = """
import torch
from serve.vllm_plugin.looks import Requests, enter
from serve.vllm_plugin.media_state import MediaState

state = MediaState(((8, 2, 16), (8, 2, 16), (8,)), torch.float32, "gated")
keys, values = torch.full((2, 6, 8, 2, 16), float("nan"))
owners = torch.ones(6, 8, dtype=torch.int32)
state.kv_cache = (keys, values, owners)
first = Requests(torch.tensor([1, 2]), [0, 1, 2], torch.tensor([True, True]))
own = Requests(torch.tensor([4, 3]), first.starts, first.begins)  # this layer's states lie elsewhere
place, own.looks = enter(owners, first, torch.tensor([True, True]), [3, 5], "last")
state.clear(own)
state.write(own, place, (torch.zeros(8, 2, 16), torch.arange(8.0)[:, None, None].expand(8, 2, 16)))
found, sees = state.attend(torch.randn(2, 2, 16), own)
print("told:", *found[:, 0, 0].tolist(), *sees[:, 0].tolist())
"""


def test_nothing_of_an_earlier_request_is_seen_in_its_place(tmp_path: Path) -> None:
    assert run_in_vllm(LEFT_BEHIND, tmp_path) == ["1.0 5.0 True True"]


def test_an_image_is_found_again_by_what_it_is(tmp_path: Path) -> None:
    (line,) = run_in_vllm(NAME_IMAGES, tmp_path, "cat", "dog", "cat")
    cat, dog, again = line.split()
    assert cat == again != dog


def test_settings_that_deep_fusion_is_not_served_with_are_refused_by_name(tmp_path: Path) -> None:
    build(tmp_path / "model", "deep, mlp")
    told = run_in_vllm(ASK_FOR_SETTINGS, tmp_path, str(tmp_path / "model"), json.dumps([*SETTINGS.values()]))
    for (name, settings), line in zip(SETTINGS.items(), told, strict=True):
        assert (f"not served with {name}" in line) if "served" not in name else line == "served", (settings, line)


def test_requests_that_are_thrown_out_and_read_in_pieces_say_the_same(tmp_path: Path) -> None:
    ask_all(tmp_path, "deep, mlp", (*EAGER, *CROWDED), count=60, max_tokens=120)


@pytest.mark.soak
def test_a_compiled_model_says_the_same(tmp_path: Path) -> None:
    server = ask_all(tmp_path, "deep, perceiver, all images", (), count=60, max_tokens=48)
    assert "Warming up model for the compilation" in server.log.read_text()


def test_the_second_model_runner_says_the_same(tmp_path: Path) -> None:
    build(tmp_path / "model", "deep, mlp")
    oracle, asked = Oracle(*load(tmp_path / "model")), cases(20, IMAGES)
    prompts = [oracle.inputs(case)["input_ids"][0].tolist() for case in asked]
    questions = tmp_path / "questions.pickle"
    questions.write_bytes(pickle.dumps([(ids, case.images) for ids, case in zip(prompts, asked, strict=True)]))
    settings = {"max_model_len": 512, "enforce_eager": True, "limit_mm_per_prompt": {"image": IMAGES}}
    settings |= {"max_num_batched_tokens": 48, "max_num_seqs": 16}  # prompts in pieces
    script = (ROOT / "tests" / "serve" / "second_runner.py").read_text()
    *told, runner = run_in_vllm(
        script, tmp_path, str(tmp_path / "model"), str(questions), json.dumps(settings), str(oracle.max_tokens)
    )
    assert runner == "vllm.v1.worker.cpu.model_runner"  # the first is vllm.v1.worker.cpu_model_runner
    got = [(len(ids), [int(token) for token in line.split()]) for ids, line in zip(prompts, told, strict=True)]
    assert_same_tokens(oracle, asked, got)
