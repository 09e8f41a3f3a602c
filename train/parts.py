"""What learns, at which rate, and what is frozen: decided from the recipe, printed, and asserted."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from train.recipe import Stage
from vlm.errors import UserError


@dataclass(frozen=True)
class Part:
    """Parameters that share a learning rate; rate 0 = frozen."""

    name: str
    rate: float
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def size(self) -> int:
        return sum(parameter.numel() for _, parameter in self.parameters)


# where a child of the model has another name than its part
PART_OF_CHILD = {
    "multi_modal_projector": "connector",
    "image_newline": "connector",
    "second_vision_tower": "vision_tower",
}


def split_into_parts(model: nn.Module, stage: Stage) -> list[Part]:
    """Every parameter of the model in exactly one part; requires_grad is set to match the stage's learning rates."""
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(part_of(name, stage.objective), []).append((name, parameter))
    missing = {part for part, rate in stage.learning_rates.items() if rate} - set(members)
    if missing:
        raise UserError(
            f"stages.{stage.name}.learning_rates.{min(missing)}: this model has no such part; "
            f"it has {', '.join(sorted(members))}"
        )
    parts = [Part(name, stage.learning_rates.get(name, 0.0), tuple(held)) for name, held in members.items()]
    for part in parts:
        for _, parameter in part.parameters:
            parameter.requires_grad_(part.rate > 0)
    return parts


def part_of(name: str, objective: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if "lora_" in name:
        return "lora"
    if objective == "language":
        return "language_model"
    if objective == "contrastive":
        prefix = name.split(".")[0]
        return {"vision_model": "vision_tower", "text_model": "text_tower"}.get(prefix, "projections")
    prefix = name.split(".")[0]
    if prefix == "cross_attention" and name.endswith("_gate"):
        return "gates"
    return PART_OF_CHILD.get(prefix, prefix)


def make_optimizer(parts: Iterable[Part], stage: Stage) -> torch.optim.AdamW:
    """AdamW with a group per part and kind; matrices decay, vectors (biases, norms, gates) don't."""
    groups = []
    for part in parts:
        if part.rate == 0:
            continue
        for decays in (True, False):
            held = [parameter for _, parameter in part.parameters if (parameter.ndim >= 2) == decays]
            if held:
                decay = stage.weight_decay if decays else 0.0
                groups.append(
                    {
                        "params": held,
                        "lr": part.rate,
                        "peak": part.rate,
                        "weight_decay": decay,
                        "part": part.name,
                    }
                )
    return torch.optim.AdamW(groups, betas=stage.betas, fused=True)


def manifest(parts: Iterable[Part]) -> list[tuple[str, int, float]]:
    """(part, parameters, learning rate) for people to read before the run starts."""
    return [(part.name, part.size, part.rate) for part in parts]


def assert_only_these_learn(model: nn.Module, parts: Iterable[Part], optimizer: torch.optim.Optimizer) -> None:
    """What requires a gradient, what the optimizer holds and what the recipe named are the same parameters."""
    named = {id(parameter) for part in parts if part.rate > 0 for _, parameter in part.parameters}
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert named == learning == held, "the optimizer and the recipe disagree about what learns"
    astray = [
        name for name, _ in model.named_parameters() if "lora_" in name and not name.startswith("language_model.")
    ]
    assert not astray, f"adapters outside the language model: {astray[:3]}"
