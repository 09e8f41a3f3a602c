"""Asks a deep-fusion model in vLLM's second model runner, which GPUs use; here Triton's interpreter runs its kernels.

python second_runner.py MODEL QUESTIONS SETTINGS TOKENS: a pickle of (input ids, images); JSON for vLLM; of each answer.
Prints a line "told: ..." for each answer, and the kind of the runner.
"""

import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

if __name__ == "__main__":
    from triton import backends

    backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # vLLM asks for one
    from vllm import LLM, SamplingParams

    from serve.vllm_plugin import register

    register()
    settings = {
        "tokenizer_mode": "vlm",
        "dtype": "float32",
        "hf_overrides": {"architectures": ["DeepVisionLanguageModel"]},
        "enable_prefix_caching": False,
        "mm_processor_kwargs": {"backend": "pil"},
        "mm_processor_cache_gb": 0,
        **json.loads(sys.argv[3]),
    }
    llm = LLM(sys.argv[1], **settings)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # as kernels are tuned at the start (no requests), and as ranks that have nothing to do keep step with others
    runner._dummy_run(num_tokens=16, skip_eplb=True, is_profile=True, randomize_inputs=True)
    runner._dummy_run(1, uniform_decode=True)
    asked = [
        {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}
        for ids, images in pickle.loads(Path(sys.argv[2]).read_bytes())
    ]
    for answer in llm.generate(asked, SamplingParams(temperature=0, max_tokens=int(sys.argv[4])), use_tqdm=False):
        print("told:", *answer.outputs[0].token_ids)
    print("told:", type(runner).__module__)
