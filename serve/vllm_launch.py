"""`vlm serve --engine vllm`: starts vLLM's own OpenAI server with our plugin, our guard and safe defaults.

The server runs in whatever environment has vLLM; it finds this project by a folder of links on its PYTHONPATH.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serve as serve_package
import vlm
from serve.child import run
from serve.media import Limits
from serve.server import bind
from serve.vllm_adapters import adapter_flags
from serve.vllm_plugin.names import DEEP, DEEP_LANGUAGE_MODELS, MODE, NO_DOMAIN, SELF_TEST, VERDICT
from serve.vllm_plugin.startup import has_self_test
from vlm.checkpoint import ADAPTER_CONFIG, check_source, read_object
from vlm.configuration import VisionLanguageConfig, context_length
from vlm.errors import UserError, first_line
from vlm.hub import fetch

VLLM_MINOR = "0.32"
FEWEST_IMAGES = 4  # of a request of deep fusion, whatever they take
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
# another key, a list of plugins without ours, a front end that knows no middleware
UNWANTED = ("VLLM_API_KEY", "VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", SELF_TEST)
GUARD = "serve.vllm_plugin.guard.ServerGuard"


def launch(options: argparse.Namespace, name: str, api_key: str | None) -> int:
    """Checks everything that can be checked here, then runs the server until it ends. Its exit code."""
    folder, config = find_model(str(options.model))
    adapters = adapter_flags(options.adapter, config)
    python = str(Path(options.vllm_python or sys.executable).expanduser())
    check_vllm(python)
    with bind(options.host, options.port) as listener:  # says now if the port is taken; vLLM finds out after a minute
        port = listener.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder.resolve())]
    command += ["--host", options.host, "--port", str(port), "--served-model-name", name]
    command += ["--dtype", DTYPES[options.dtype], "--tokenizer-mode", MODE]
    command += ["--shutdown-timeout", str(round(30 if options.drain_timeout is None else options.drain_timeout))]
    if options.max_batch is not None:
        command += ["--max-num-seqs", str(options.max_batch)]
    command += ["--allowed-media-domains", *(options.allow_domain or [NO_DOMAIN])]
    # for vLLM's own classes: with torchvision, which it brings, transformers scales pictures differently
    command += ["--mm-processor-kwargs", json.dumps({"backend": "pil"})]
    # once a request with a new image is refused, this cache fails the next one that has the image
    command += ["--mm-processor-cache-gb", "0"]
    command += fusion_flags(folder, config)
    # argparse takes the last of what is said twice, so flags of one's own win; of middleware the last comes first
    command += [*adapters, *options.rest, "--middleware", GUARD]
    tested = has_self_test(folder, name, bool(options.skip_self_test))
    address = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{name} is loaded by vLLM now, and will be served at http://{address}:{port} (API: /v1)", flush=True)
    with sources() as links:
        verdict = links / "self-test.txt"
        changes = {SELF_TEST: str(folder.resolve()), VERDICT: str(verdict)} if tested else {}
        code = run(command, {**environment(links, api_key), **changes})
        if verdict.is_file():
            print(file=sys.stderr)  # what ends beside it may leave its last line open
            raise UserError(f"{options.model}: {verdict.read_text(encoding='utf-8')}")
    return code


def fusion_flags(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What the fusion of the model with this config.json asks of vLLM. UserError for what it can't serve."""
    if config.get("model_type") != "vlm" or config.get("fusion") != "deep":
        return ["--limit-mm-per-prompt", json.dumps({"image": Limits.images})]
    try:
        ours = VisionLanguageConfig.from_pretrained(folder)
    except Exception as error:  # transformers fails in many ways on odd settings
        raise UserError(f"{folder / 'config.json'}: {first_line(error)}") from error
    kind = ours.get_text_config().model_type
    if kind not in DEEP_LANGUAGE_MODELS:
        raise UserError(
            f"{folder}: deep fusion before layers of a {kind} model, which vLLM is not served with (only "
            f"{', '.join(DEEP_LANGUAGE_MODELS)}); serve it with --engine torch"
        )
    images = json.dumps({"image": image_limit(ours)})
    overrides = json.dumps({"architectures": [DEEP]})
    return ["--hf-overrides", overrides, "--no-enable-prefix-caching", "--limit-mm-per-prompt", images]


def image_limit(config: VisionLanguageConfig) -> int:
    """Images of a request of deep fusion: as many as take no more room in a layer than an eighth of a full context.

    vLLM makes its blocks of text as large as what a request keeps of its images, and begins one for each request.
    """
    text, settings = config.get_text_config(), config.cross_attention_settings
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    image = config.image_tokens.visual(*config.image_tokens.largest) * settings.heads * settings.head_dim
    fitting = (context_length(text) or 0) * heads * head_dim // (8 * image)
    return min(max(fitting, FEWEST_IMAGES), Limits.images)


def environment(links: Path, api_key: str | None) -> dict[str, str]:
    """The server's environment: our code on the path, the current folder off it, the key where `ps` shows none.

    Usage statistics, which vLLM sends to its makers, are off unless one's own environment says otherwise.
    """
    changes = {
        "PYTHONPATH": str(links),
        "PYTHONSAFEPATH": "1",
        "VLLM_MEDIA_CONNECTOR": MODE,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    inherited = {key: value for key, value in os.environ.items() if key not in UNWANTED}
    if api_key is not None:
        changes["VLLM_API_KEY"] = api_key
    return {"VLLM_NO_USAGE_STATS": "1", **inherited, **changes}


@contextmanager
def sources() -> Iterator[Path]:
    """A folder that holds this project and nothing else of its environment, with the plugin's entry point."""
    with tempfile.TemporaryDirectory(prefix="vlm-vllm-") as name:
        folder = Path(name)
        for package in (vlm, serve_package):
            home = Path(str(package.__file__)).parent
            (folder / home.name).symlink_to(home, target_is_directory=True)
        metadata = folder / f"vlm-{vlm.__version__}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vlm\nVersion: {vlm.__version__}\n")
        (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nvlm = serve.vllm_plugin:register\n")
        yield folder


def find_model(model: str) -> tuple[Path, dict[str, Any]]:
    """Its folder and config.json. UserError for what vLLM would find out after a minute, or not at all."""
    folder = fetch(model)
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        raise UserError(
            f"{model}: an adapter, which vLLM serves beside its base: vlm serve {base} --engine vllm --adapter "
            f"NAME={model}; or merge it first: vlm export {model} --to vlm --out DIR"
        )
    config = check_source(folder)
    if config.get("model_type") == "vlm" and config.get("quantization_config"):
        raise UserError(
            f"{model}: its weights are quantised, which vLLM can't read; make it whole: vlm export {model} --to vlm "
            "--out DIR, and let vLLM quantise it (-- --quantization METHOD)"
        )
    return folder, config


def check_vllm(python: str) -> None:
    """UserError unless the interpreter has the vLLM that the plugin is written for."""
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    if shutil.which(python) is None:
        raise UserError(f"--vllm-python {python}: no such interpreter")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(
            f"vLLM is not installed for {python}: pip install 'vlm[vllm]' there, or name an interpreter that has it "
            "by --vllm-python"
        )
    version = done.stdout.strip()
    if not f"{version}.".startswith(f"{VLLM_MINOR}."):
        raise UserError(f"{python} has vLLM {version}, and this release of vlm works with vLLM {VLLM_MINOR}.*")
