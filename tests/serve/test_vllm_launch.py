"""`vlm serve --engine vllm` without a vLLM: what is refused before the start, what the server is told, how it ends."""

import asyncio
import json
import os
import stat
import sys
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve import vllm_launch
from serve.vllm_plugin.guard import ServerGuard
from tests.serve.helpers import refused
from vlm import VisionLanguageConfig
from vlm.checkpoint import ADAPTER_CONFIG
from vlm.cli import main, parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """An interpreter with vLLM 0.32.1 that writes down how the server is started, and ends with 7."""
    return make_fake(tmp_path / "python", "0.32.1")


def make_fake(path: Path, version: str) -> Path:
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, sys\n"
        f"if sys.argv[1:3] == ['-P', '-c']:\n    print('{version}') if '{version}' else sys.exit(1)\n    sys.exit()\n"
        "paths = sorted(str(p.relative_to(os.environ['PYTHONPATH'])) "
        "for p in pathlib.Path(os.environ['PYTHONPATH']).glob('*/*'))\n"
        "told = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'paths': paths}\n"
        f"open('{path.with_name('told.json')}', 'w').write(json.dumps(told))\n"
        "sys.exit(7)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def told(fake: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(fake.with_name("told.json").read_text())
    return content


def serve(model: Path, fake: Path, *options: str) -> int:
    return main(["serve", str(model), "--engine", "vllm", "--vllm-python", str(fake), "--port", "0", *options])


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """(name, the module it changes, settings) -> a LoRA folder."""

    def make(name: str, module: str = "language_model.model.layers.0.mlp.up_proj", **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": "some/base", **settings}))
        weights = {f"base_model.model.{module}.lora_A.weight": torch.zeros(1, 1)}
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter("cats", r=20)


def test_the_server_gets_safe_defaults_and_our_guard(
    tiny_models: Any, fake: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models("early", "mlp")
    monkeypatch.setenv("VLLM_API_KEY", "another")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--name", "n", "--api-key", "sesame", "--dtype", "fp32", "--adapter", f"cats={adapter}"]
    assert serve(model, fake, *options, "--", "--max-model-len", "512", "--seed", "3") == 7
    said = told(fake)
    arguments = said["arguments"]
    assert arguments[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    text = " ".join(arguments)
    assert "sesame" not in text
    for part in (
        "--served-model-name n",
        "--dtype float32",
        "--allowed-media-domains none.invalid",
        '--mm-processor-kwargs {"backend": "pil"}',
        f"--enable-lora --max-lora-rank 32 --max-loras 2 --lora-modules cats={adapter} "
        "--max-model-len 512 --seed 3 --middleware serve.vllm_plugin.guard.ServerGuard",
    ):
        assert part in text
    environment = said["environment"]
    assert environment["VLLM_API_KEY"] == "sesame"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert "VLLM_PLUGINS" not in environment
    assert str(tmp_path) not in environment["PYTHONPATH"].split(os.pathsep)
    assert not Path(environment["PYTHONPATH"]).exists(), "the folder of links is left behind"
    assert {"vlm/cli.py", "serve/vllm_launch.py"} <= set(said["paths"])


def test_deep_fusion_gets_its_own_class_and_room_for_its_images(tiny_models: Any, fake: Path) -> None:
    assert serve(tiny_models("deep", "perceiver"), fake, "--", "--max-num-seqs", "7") == 7
    text = " ".join(told(fake)["arguments"])
    assert '--hf-overrides {"architectures": ["DeepVisionLanguageModel"]} --no-enable-prefix-caching' in text
    assert serve(tiny_models("early", "mlp"), fake) == 7
    assert "--hf-overrides" not in told(fake)["arguments"]


@pytest.mark.parametrize(
    ("connector", "heads", "images"),
    [
        ({"type": "perceiver", "num_latents": 64}, 8, 32),  # 32 text tokens of room each, 1024 for all
        ({"type": "perceiver", "num_latents": 256}, 8, 8),
        (
            {"type": "perceiver", "num_latents": 256},
            32,
            32,
        ),  # no grouped queries: a text token takes four times more
        ({"type": "mlp"}, 8, 4),
    ],
)
def test_images_of_a_request_take_an_eighth_of_a_context(connector: dict[str, Any], heads: int, images: int) -> None:
    vision = {"image_size": 336, "patch_size": 14}
    text = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": heads}
    text |= {"max_position_embeddings": 8192, "num_hidden_layers": 2}
    config = VisionLanguageConfig(fusion="deep", connector=connector, vision_config=vision, text_config=text)
    assert vllm_launch.image_limit(config) == images


def test_domains_are_handed_on(tiny_models: Any, fake: Path) -> None:
    domains = ["--allow-domain", "a.example", "b.example", "--allow-domain", "c.example"]
    assert serve(tiny_models("early", "mlp"), fake, *domains) == 7
    arguments = told(fake)["arguments"]
    at = arguments.index("--allowed-media-domains")
    assert arguments[at + 1 : at + 4] == ["a.example", "b.example", "c.example"]
    assert "none.invalid" not in arguments
    assert "VLLM_API_KEY" not in told(fake)["environment"]


def test_the_plugin_is_an_entry_point_and_the_links_hold_nothing_else() -> None:
    with vllm_launch.sources() as folder:
        (metadata,) = folder.glob("*.dist-info")
        (point,) = PathDistribution(metadata).entry_points
        assert (point.group, point.name, point.value) == (
            "vllm.general_plugins",
            "vlm",
            "serve.vllm_plugin:register",
        )
        assert {path.name for path in folder.iterdir()} == {"vlm", "serve", metadata.name}
    assert f'vlm = "{point.value}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "said"), [("", "vLLM is not installed"), ("0.31.4", "has vLLM 0.31.4"), ("0.320.0", "has vLLM 0.320.0")]
)
def test_another_vllm_is_refused(
    version: str, said: str, tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_fake(tmp_path / "python", version)
    assert serve(tiny_models("early", "mlp"), other) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "told.json").exists()
    assert serve(tiny_models("early", "mlp"), tmp_path / "nobody") == 1
    assert "no such interpreter" in capsys.readouterr().err


def test_what_vllm_cannot_serve_is_said_before_the_start(
    tiny_models: Any, fake: Path, make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models("early", "mlp")
    whole = make_adapter("whole", r=4, modules_to_save=["multi_modal_projector"])
    huge, dora = make_adapter("huge", r=1000), make_adapter("dora", use_dora=True)
    tower = make_adapter("tower", "vision_tower.encoder.layers.0.q_proj")
    gated = make_adapter("gated", "cross_attention.1.to_q")
    connector = make_adapter("connector", "multi_modal_projector.layers.0.to_q")
    opt = VisionLanguageConfig(fusion="deep", text_config={"model_type": "opt"})
    opt.save_pretrained(tmp_path / "opt")
    save_file({"x": torch.zeros(1)}, tmp_path / "opt" / "model.safetensors")
    empty = make_adapter("empty")
    (empty / "adapter_model.safetensors").unlink()
    odd = json.loads((tiny_models("deep", "mlp") / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**odd, "cross_attention": {"every": "two"}}))
    save_file({"x": torch.zeros(1)}, tmp_path / "odd" / "model.safetensors")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**odd, "quantization_config": {"load_in_4bit": True}}))
    save_file({"x": torch.zeros(1)}, tmp_path / "packed" / "model.safetensors")
    for folder, options, said in (
        (tmp_path / "packed", [], "its weights are quantised"),
        (tmp_path / "odd", [], "cross_attention: every"),
        (tmp_path / "nothing", [], "no such model folder"),
        (empty, [], "vlm serve some/base --engine vllm --adapter"),
        (model, ["--adapter", "cats"], "must be NAME=DIR"),
        (model, ["--adapter", f"cats={tmp_path}"], "no LoRA adapter there"),
        (model, ["--adapter", f"cats={whole}"], "replaces whole modules"),
        (model, ["--adapter", f"cats={huge}"], "rank 1000"),
        (model, ["--adapter", f"cats={dora}"], "DoRA"),
        (model, ["--adapter", f"cats={tower}"], "changes the vision encoder"),
        (model, ["--adapter", f"cats={empty}"], "no adapter_model.safetensors"),
        (tiny_models("deep", "mlp"), ["--adapter", f"cats={gated}"], "changes the gated blocks"),
        (tmp_path / "opt", [], "deep fusion before layers of a opt model"),
        (tiny_models("early", "perceiver"), ["--adapter", f"cats={connector}"], "reaches early fusion's mlp only"),
        (tiny_models("deep", "mlp"), ["--adapter", f"cats={connector}"], "mlp of deep fusion"),
        (model, ["--max-waiting", "3"], "--max-waiting: only --engine torch"),
    ):
        assert serve(folder, fake, *options) == 1
        assert said in capsys.readouterr().err
    for options in (["--adapter", "a=b"], ["--allow-domain", "a.example"], ["--", "--seed", "1"]):
        assert main(["serve", str(model), *options]) == 1
        assert "only --engine vllm" in capsys.readouterr().err
    assert not (tmp_path / "told.json").exists()


def test_lora_on_the_connector_is_asked_for(tiny_models: Any, fake: Path, make_adapter: Any) -> None:
    language, connector = make_adapter("one", r=1), make_adapter("two", "multi_modal_projector.layers.2", r=9)
    assert serve(tiny_models("early", "mlp"), fake, "--adapter", f"a={language}") == 7
    assert "--enable-tower-connector-lora" not in told(fake)["arguments"]
    assert serve(tiny_models("early", "mlp"), fake, "--adapter", f"a={language}", f"b={connector}") == 7
    flags = f"--max-lora-rank 16 --max-loras 3 --enable-tower-connector-lora --lora-modules a={language} b={connector}"
    assert flags in " ".join(told(fake)["arguments"])


def test_flags_of_vllm_are_left_as_they_are() -> None:
    options = parse(["serve", "m", "--engine", "vllm", "--", "--port", "3", "m2", "--", "-x"])
    assert options.rest == ["--port", "3", "m2", "--", "-x"]
    assert (options.model, options.port) == ("m", 8000)
    assert parse(["serve", "m"]).rest == []


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A server with errors of all shapes behind the guard that vLLM gets."""

    async def answer(request: Any) -> Any:
        match request.path_params["kind"]:
            case "vllm":
                error = {"message": "no (parameter=top_k, value=3)", "type": "BadRequestError", "param": "top_k"}
                return JSONResponse({"error": {**error, "code": 400}}, 400, {"x-kept": "1"})
            case "fastapi":
                return JSONResponse({"detail": [{"loc": ["body"], "msg": "bad"}]}, 422)
            case "text":
                return PlainTextResponse("it broke", 500)
            case "parts":

                async def parts() -> Any:
                    for part in (b'{"error": "Unauth', b'orized"}'):
                        yield part
                        await asyncio.sleep(0)

                return StreamingResponse(parts(), 401)
        return JSONResponse({"kind": "good"})

    async def models(_: Any) -> Any:
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "root": "/home/me/secret", "parent": None}]})

    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    routes = [Route("/health", lambda _: PlainTextResponse("sick", 503))]
    routes += [Route("/v1/models", models), Route("/{kind}", answer)]
    return TestClient(ServerGuard(Starlette(routes=routes)), headers={"Authorization": "Bearer sesame"})


def test_errors_of_the_server_get_our_shape(guarded: TestClient) -> None:
    response = guarded.get("/vllm")
    assert refused(response, 400) == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "top_k",
        "code": "invalid_value",
    }
    assert response.headers["x-kept"] == "1"
    assert "bad" in refused(guarded.get("/fastapi"), 400)["message"]
    assert refused(guarded.get("/text"), 500)["message"] == "it broke"
    assert refused(guarded.get("/parts"), 401)["message"] == "Unauthorized"
    assert refused(guarded.get("/a/b"), 404)["code"] == "not_found"
    assert guarded.get("/good").json() == {"kind": "good"}
    assert guarded.get("/v1/models").json()["data"] == [{"id": "tiny", "root": "tiny", "parent": None}]


def test_only_health_is_open(guarded: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded.headers.pop("Authorization")
    assert guarded.get("/health").text == "sick"
    for path in ("/good", "/", "/ready", "/health/", "/nowhere", "//health"):
        assert refused(guarded.get(path), 401)["code"] == "invalid_api_key"
    monkeypatch.delenv("VLLM_API_KEY")
    free = TestClient(ServerGuard(Starlette(routes=[Route("/good", lambda _: PlainTextResponse("x"))])))
    assert free.get("/good").text == "x"
    refused(free.get("/bad"), 404)


def test_what_nobody_expected_is_told_in_our_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    errors = [AssertionError("at /home/me/secret"), RuntimeError("cannot schedule new futures after shutdown")]

    async def fails(*_: Any) -> None:
        raise errors.pop(0)

    client = TestClient(ServerGuard(fails))
    assert refused(client.get("/v1/models"), 500)["message"] == "the server failed on this request"
    assert refused(client.get("/v1/models"), 503)["code"] == "draining"
