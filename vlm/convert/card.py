"""The model card of an exported model: what is known about it from its files, and nothing else."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm import __version__
from vlm.checkpoint import read_object
from vlm.configuration import VisionLanguageConfig
from vlm.settings import read_yaml

SCORES = "scores.json"


def model_card(
    config: VisionLanguageConfig, name: str, origin: Path, adapter: Path | None, parameters: int, layout: str
) -> str:
    """README.md. `origin`: the folder of the model; a run that it or its adapter lies in is described, too."""
    tiling = config.image_tokens
    text: Any = config.text_config
    connector = config.connector_settings
    library = "transformers" if layout == "llava-hf" else "vlm"
    rows = {
        "layout": "transformers' LLaVA" if layout == "llava-hf" else "vlm",
        "fusion": config.fusion,
        "vision encoder": _encoder(config.vision_config),
        **({"second vision encoder": _encoder(second)} if (second := config.second_vision_config) is not None else {}),
        "images": "whole" if tiling.mode == "none" else f"{tiling.mode}, sizes {_sizes(tiling.pinpoints)}",
        "connector": f"{connector.type}, depth {connector.depth}",
        "language model": f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
        "parameters": f"{parameters:,}",
        "numbers": str(config.dtype).removeprefix("torch."),
        "written by": f"vlm {__version__}" + (", an adapter merged in" if adapter is not None else ""),
    }
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text", "---", "", f"# {name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    run = find_run(adapter or origin)
    told = [*(_training(run) if run is not None else ()), *_scores(adapter or origin, run)]
    if run is None:
        lines += ["Nothing is recorded here about how this model was trained.", ""]
    return "\n".join([*lines, *told])


def _encoder(vision: Any) -> str:
    return f"{vision.model_type}, {vision.num_hidden_layers} layers of width {vision.hidden_size}"


def _sizes(pinpoints: Iterable[Sequence[int]]) -> str:
    return ", ".join(f"{width} x {height}" for height, width in pinpoints)


def find_run(folder: Path) -> Path | None:
    """The run folder whose result a model or adapter is."""
    here = folder.resolve()
    belongs = here.name in ("model", "adapter") and (here.parent / "recipe.yaml").is_file()
    return here.parent if belongs else None


def _training(run: Path) -> Iterator[str]:
    recipe = read_yaml(run / "recipe.yaml")
    stages = _without_places(recipe.get("stages", []))
    yield from ("## Training", "", "| stage | steps | batch | learns (rate) | data |", "|---|---|---|---|---|")
    for stage in stages:
        rates = {part: rate for part, rate in stage.get("learning_rates", {}).items() if rate}
        learns = ", ".join(f"{part} ({rate:g})" for part, rate in rates.items())
        data = ", ".join(str(item.get("path")) for item in stage.get("data", []))
        yield f"| {stage.get('name')} | {stage.get('steps')} | {stage.get('batch_size')} | {learns} | {data} |"
    yield ""
    if last := _last_step(run / "metrics.jsonl"):
        yield from (f"Step {last['step']}, the last: loss {last['loss']:.4g}.", "")
    shown = {name: value for name, value in recipe.items() if name != "data_root"}
    model = shown.get("model")
    if isinstance(model, dict) and model.get("pretrained"):  # it brings all else, what stands beside it are defaults
        shown["model"] = {"pretrained": model["pretrained"]}
    text = yaml.safe_dump(_without_places(shown), sort_keys=False, allow_unicode=True)
    yield from ("<details><summary>Recipe</summary>", "", "```yaml", text.rstrip(), "```", "", "</details>", "")


def _without_places(value: Any) -> Any:
    """Settings without where files lay on the machine of the training, which is nobody's business: of paths that lead
    there, the last part."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")):
        return Path(value).name or value
    return value


def _last_step(metrics: Path) -> dict[str, Any] | None:
    if not metrics.is_file():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines()
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return last if isinstance(last, dict) and "step" in last and isinstance(last.get("loss"), float) else None


def _scores(model: Path, run: Path | None) -> Iterator[str]:
    """Evaluations of this model, by what they say themselves, in the folder of its run and beside it."""
    near = [model.resolve().parent] if run is None else [run, run.parent]
    found = [
        (path, content)
        for path in sorted({path for folder in near for path in folder.glob(f"*/{SCORES}")})
        if _asked(content := read_object(path)) == model.resolve()
    ]
    if not found:
        return
    yield from ("## Scores", "", "| evaluation | task | images | n | metrics |", "|---|---|---|---|---|")
    for path, content in found:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in content.get("metrics", {}).items())
        control = content["settings"].get("control", "none")
        images = {"none": "shown", "blind": "withheld", "shuffled": "exchanged"}.get(control, control)
        images = "none" if content.get("questions_with_images") == 0 else images
        yield f"| {path.parent.name} | {content.get('task')} | {images} | {content.get('n')} | {metrics} |"
    yield ""


def _asked(scores: dict[str, Any]) -> Path | None:
    settings = scores.get("settings")
    return Path(str(settings["model"])).resolve() if isinstance(settings, dict) and "model" in settings else None
