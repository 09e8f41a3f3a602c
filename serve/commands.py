"""`vlm serve` and `vlm chat`. Nothing heavy is imported before it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.arguments import positive
from vlm.errors import UserError
from vlm.threads import describe_threads

if TYPE_CHECKING:
    from serve.torch_engine import TorchEngine
    from vlm import VisionLanguageProcessor


def serve(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vlm serve`."""
    parser.epilog = """examples:
  vlm serve runs/demo/model
  vlm serve runs/demo/model --host 0.0.0.0 --port 8080 --api-key "$KEY"
  vlm serve runs/demo/model --engine vllm --adapter cats=runs/cats -- --tensor-parallel-size 2

The page to try it is at http://HOST:PORT/, the API of OpenAI at http://HOST:PORT/v1. The key can also be given by the
environment variable VLM_API_KEY. SIGTERM finishes what was accepted. With --engine vllm it is vLLM's own server with
our models in it; what stands behind -- is handed to it (vllm serve --help=all explains)."""
    _add_model(parser)
    parser.add_argument(
        "--engine", choices=["torch", "vllm"], default="torch", help="what makes the tokens (default: torch)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument("--api-key", metavar="KEY", help="ask clients for this key (default: $VLM_API_KEY, or none)")
    parser.add_argument("--name", help="what clients call the model (default: the last part of MODEL)")
    parser.add_argument("--max-batch", type=positive, metavar="N", help="answers made at once (default: 16, or vLLM's)")
    parser.add_argument(
        "--max-waiting",
        type=positive,
        metavar="N",
        help="requests that may wait; more get 429 (torch; default: 128)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=float,
        metavar="S",
        help="seconds to finish in after SIGTERM (default: 30)",
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="the interpreter that has vLLM (default: this one)")
    parser.add_argument(
        "--allow-domain",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="take https images from there (vllm)",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME=DIR",
        nargs="+",
        action="extend",
        default=[],
        help="serve a LoRA adapter of the language model under this name, too (vllm)",
    )
    parser.add_argument(
        "--skip-self-test",
        action="store_true",
        default=None,
        help="serve a model though it answers differently from when it was saved (vllm)",
    )
    parser.set_defaults(run=run_serve, rest=[])


def chat(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vlm chat`."""
    parser.epilog = """examples:
  vlm chat runs/demo/model --image photo.jpg "What is in the picture?"
  vlm chat runs/demo/model

Without a prompt it is a conversation: /image FILE shows a picture with the next question, /reset starts again,
/quit ends."""
    _add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="one question; without it, a conversation")
    parser.add_argument("--image", metavar="FILE", nargs="+", action="extend", default=[], help="pictures to ask about")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="longest answer (default: what the context holds)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 for the likeliest (default: 0)")
    parser.set_defaults(run=run_chat)


def run_serve(options: argparse.Namespace) -> int:
    _check_engine(options)
    api_key = options.api_key if options.api_key is not None else os.environ.get("VLM_API_KEY")
    if api_key is not None and not api_key.strip():
        raise UserError("the API key is empty; leave it out to serve without one")
    name = options.name or model_name(options.model)
    if options.engine == "vllm":
        from serve.vllm_launch import launch

        return launch(options, name, api_key)

    from serve.server import bind

    listener = bind(options.host, options.port)
    max_batch, max_waiting = options.max_batch or 16, options.max_waiting or 128
    engine, processor = load_engine(options, name, max_batch, max_waiting)
    print(describe_threads(), file=sys.stderr)

    import uvicorn

    from serve.app import create_app
    from serve.server import DrainingServer, listen

    app = create_app(engine, processor, name, api_key, max_requests=max_batch + max_waiting + 8)
    # connections that are still open when all answers are sent don't hold up the end for long
    config = uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    listen(listener)  # who connects as soon as the line below is read waits a moment, and is served
    engine.start()
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(
        f"{name} is served at http://{address}:{port} (API: /v1, context: {engine.info.context_length} tokens)",
        flush=True,
    )
    try:
        drain_timeout = 30.0 if options.drain_timeout is None else options.drain_timeout
        DrainingServer(config, app.state.traffic, drain_timeout).run(sockets=[listener])
    finally:
        engine.stop()
    return 0


# an option that the other engine would silently ignore is refused instead
ONLY_FOR = {
    "torch": ("device", "max_waiting"),
    "vllm": ("vllm_python", "allow_domain", "adapter", "skip_self_test", "rest"),
}


def _check_engine(options: argparse.Namespace) -> None:
    for engine, names in ONLY_FOR.items():
        for name in names:
            if engine != options.engine and getattr(options, name) not in (None, []):
                said = "flags behind --" if name == "rest" else f"--{name.replace('_', '-')}"
                raise UserError(f"{said}: only --engine {engine} takes this so far")


def run_chat(options: argparse.Namespace) -> int:
    prompt, files = split_prompt(options.prompt, options.image)
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such image")
    engine, processor = load_engine(options, model_name(options.model), max_batch=1, max_waiting=1)

    from serve.terminal import Conversation, ModelError

    conversation = Conversation(engine, processor, options.max_tokens, options.temperature)
    for file in files:
        conversation.show(Path(file))
    with _engine_log(shown=options.debug):
        engine.start()
        try:
            if prompt is not None:
                conversation.ask(prompt, sys.stdout)
                return 0
            return conversation.run(sys.stdin, sys.stdout)
        except ModelError as error:
            raise UserError(f"{options.model}: {error}") from error
        finally:
            engine.stop()


@contextmanager
def _engine_log(shown: bool) -> Iterator[None]:
    """The engine logs where in the code a model failed; who chats is told why in the one sentence at the end."""
    log = logging.getLogger("serve.engine")
    before, log.disabled = log.disabled, not shown
    try:
        yield
    finally:
        log.disabled = before


def load_engine(
    options: argparse.Namespace, name: str, max_batch: int, max_waiting: int
) -> "tuple[TorchEngine, VisionLanguageProcessor]":
    """The engine (not started) and processor of the model that a command line names."""
    from transformers.utils import logging as transformers_logging

    from serve.torch_engine import TorchEngine
    from vlm import load
    from vlm.device import pick_device, pick_dtype

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device = pick_device(options.device)
    model, processor = load(options.model, device, pick_dtype(options.dtype, device))
    return TorchEngine(model, processor, name, max_batch, max_waiting), processor


def model_name(model: str) -> str:
    """What clients call a model: a hub id as it is, a folder by its last part (they need not know where it lies)."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model


def split_prompt(prompt: str | None, images: list[str]) -> tuple[str | None, list[str]]:
    """`--image A B PROMPT` gives the prompt to --image, too: what is no file nor named like one is it."""
    if prompt is None and len(images) > 1 and not Path(images[-1]).exists():
        last = images[-1]
        if " " in last.strip() or not Path(last).suffix:
            return last, images[:-1]
    return prompt, images


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder or hub id")
    parser.add_argument("--device", help="cuda, mps, cpu ... (default: the best there is)")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="number format (default: auto)"
    )
