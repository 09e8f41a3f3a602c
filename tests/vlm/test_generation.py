"""Generation: caches, padding, beams and copies change the speed and never the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.vlm.chats import PAIRS, pad_left, picture, user
from tests.vlm.conftest import LoadedModels
from vlm import VisionLanguageConfig, VisionLanguageModel, Visual

STEPS = 8
PROMPTS = [
    (user("no picture at all, but quite a long question about nothing?"), []),
    (user(None, "what is this?"), [1]),
    (user("here is", None, "and there is", None, ": which is larger?"), [2, 3]),
    (user("short"), []),
    (user("what colour?", None), [4]),
]
TEXT_AND_TWO = [PROMPTS[3], PROMPTS[2]]


def batch(processor: Any, prompts: list[Any]) -> dict[str, torch.Tensor]:
    inputs = pad_left(processor, [prompt for prompt, _ in prompts])
    pictures = [picture(seed) for _, seeds in prompts for seed in seeds]
    return {**inputs, **processor.pixels(pictures)} if pictures else inputs


def generate(model: VisionLanguageModel, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """The new tokens of every row; no row stops early."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    out: torch.Tensor = model.generate(**inputs, **settings)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def encode_images(model: VisionLanguageModel, inputs: dict[str, torch.Tensor]) -> Visual:
    """Takes the pictures out of the inputs."""
    with torch.no_grad():
        return model.encode_images(inputs.pop("pixel_values"), inputs.pop("image_sizes"))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How many images each call of a module was given."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    yield calls
    handle.remove()


def argmax_loop(model: VisionLanguageModel, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Greedy decoding that runs the whole text anew for each token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            outputs = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                pixel_values=inputs.get("pixel_values"),
                use_cache=False,
            )
        logits = outputs.logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_cached_decoding_equals_running_everything_anew(
    loaded_models: LoadedModels, fusion: str, connector: str
) -> None:
    model, processor = loaded_models(fusion, connector)
    inputs = batch(processor, PROMPTS)
    expected = argmax_loop(model, inputs)
    assert generate(model, inputs) == expected
    assert generate(model, inputs, use_cache=False) == expected
    changed = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    told = generate(model, changed)
    assert [told[row] == expected[row] for row in (0, 3)] == [True, True]
    assert any(told[row] != expected[row] for row in (1, 2, 4))  # what is generated depends on the pictures


def test_cached_decoding_that_attends_to_all_images_equals_running_everything_anew(
    loaded_models: LoadedModels,
) -> None:
    shared, processor = loaded_models("deep", "perceiver")
    settings = {**shared.config.to_diff_dict()["cross_attention"], "attend": "all"}
    model = VisionLanguageModel(VisionLanguageConfig(**{**shared.config.to_diff_dict(), "cross_attention": settings}))
    model.load_state_dict(shared.state_dict())
    model.eval()
    inputs = batch(processor, PROMPTS)
    expected = argmax_loop(model, inputs)
    assert generate(model, inputs) == expected == generate(model, inputs, use_cache=False)
    assert expected[2] != argmax_loop(shared, inputs)[2]  # the row of two images


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_a_left_padded_batch_with_mixed_numbers_of_images_equals_one_by_one(
    loaded_models: LoadedModels, fusion: str, connector: str
) -> None:
    model, processor = loaded_models(fusion, connector)
    together = generate(model, batch(processor, PROMPTS))
    alone = [generate(model, batch(processor, [prompt]))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_logits_of_a_left_padded_batch_equal_those_of_each_row_alone(
    loaded_models: LoadedModels, fusion: str, connector: str
) -> None:
    model, processor = loaded_models(fusion, connector)
    inputs = batch(processor, PROMPTS)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**inputs, position_ids=positions).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(**batch(processor, [prompt])).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
@pytest.mark.parametrize("given", ["pixel_values", "visual"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "beams returned", "samples"],
)
def test_beams_and_copies_equal_the_same_call_on_repeated_inputs(
    loaded_models: LoadedModels, fusion: str, connector: str, given: str, options: dict[str, Any]
) -> None:
    model, processor = loaded_models(fusion, connector)
    inputs = batch(processor, PROMPTS)
    if given == "visual":
        with torch.no_grad():
            inputs["visual"] = encode_images(model, inputs)  # type: ignore[assignment]
    torch.manual_seed(7)
    expanded = generate(model, inputs, **options)
    copies = options.get("num_return_sequences", 1)
    if options.get("do_sample"):
        # the same prompts written out three times: one row each, drawn from the same stream of random numbers
        torch.manual_seed(7)
        repeated = generate(model, batch(processor, [p for p in PROMPTS for _ in range(copies)]), do_sample=True)
        assert expanded == repeated
        assert len({tuple(row) for row in expanded}) == len(expanded)
    else:
        alone = [row for prompt in PROMPTS for row in generate(model, batch(processor, [prompt]), **options)]
        manual = [row for prompt in PROMPTS for row in beam_search(model, batch(processor, [prompt]), **options)]
        assert expanded == alone == manual


def beam_search(
    model: VisionLanguageModel, inputs: dict[str, torch.Tensor], num_beams: int, num_return_sequences: int = 1
) -> list[list[int]]:
    """Beam search for one prompt over prompts that are written out once per beam, without a cache."""
    eos = model.generation_config.eos_token_id
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    prompt, pixels = inputs["input_ids"], inputs.get("pixel_values")
    for _ in range(STEPS):
        ids = torch.stack([torch.cat([prompt[0], torch.tensor(said, dtype=torch.long)]) for _, said in beams])
        repeated = None if pixels is None else pixels.repeat(len(beams), 1, 1, 1)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=repeated, use_cache=False).logits[:, -1]
        logits = logits.log_softmax(-1)
        logits[:, eos] = -torch.inf
        best = [(score + logits[i], said) for i, (score, said) in enumerate(beams)]
        flat = torch.cat([scores for scores, _ in best])
        top = flat.topk(num_beams)
        size = logits.shape[1]
        beams = [
            (score, [*best[index // size][1], index % size])
            for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
    return [said for _, said in beams[:num_return_sequences]]


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_each_image_is_encoded_once_per_generate(
    loaded_models: LoadedModels, fusion: str, connector: str, options: dict[str, Any]
) -> None:
    model, processor = loaded_models(fusion, connector)
    with counted(model.vision_tower) as tower, counted(model.multi_modal_projector) as projector:
        generate(model, batch(processor, PROMPTS), **options)
    assert (tower, projector) == ([4], [4])


@pytest.mark.parametrize("fusion", ["early", "deep"])
def test_a_forward_calls_the_tower_once_for_all_images_and_never_with_ready_ones(
    loaded_models: LoadedModels, fusion: str
) -> None:
    model, processor = loaded_models(fusion, "mlp")
    inputs = batch(processor, PROMPTS)
    with counted(model.vision_tower) as calls, torch.no_grad():
        logits = model(**inputs).logits
        assert calls == [4]
        visual = encode_images(model, inputs)
        assert calls == [4, 4]
        assert torch.equal(model(**inputs, visual=visual).logits, logits)
        assert calls == [4, 4]


def test_keys_and_values_of_images_are_made_once_per_generate(loaded_models: LoadedModels) -> None:
    model, processor = loaded_models("deep", "perceiver")
    with counted(model.cross_attention["0"].to_kv) as calls:
        generate(model, batch(processor, TEXT_AND_TWO))
    assert calls == [8]  # two images of four latents, once
    with counted(model.cross_attention["0"].to_kv) as calls:
        inputs = batch(processor, TEXT_AND_TWO)
        with torch.no_grad():
            ready = model.project_layers(encode_images(model, inputs))
        expected = generate(model, batch(processor, TEXT_AND_TWO))
        del calls[:]
        assert generate(model, {**inputs, "visual": ready}) == expected
    assert calls == []


def test_decoding_deep_fusion_from_a_cache_without_knowing_who_sees_what_is_refused(
    loaded_models: LoadedModels,
) -> None:
    model, processor = loaded_models("deep", "mlp")
    inputs = batch(processor, [PROMPTS[1]])
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        with pytest.raises(ValueError, match="media_index and document_start"):
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=first.past_key_values, visual=first.visual)


@pytest.mark.parametrize("attend", ["last", "all"])
def test_a_packed_row_of_deep_fusion_equals_its_documents_alone(loaded_models: LoadedModels, attend: str) -> None:
    model, processor = loaded_models("deep", "perceiver")
    settings = dict(model.config.cross_attention)
    rows = [processor.chat.encode(prompt, [1] * len(seeds)).input_ids for prompt, seeds in PROMPTS]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    pixels = batch(processor, PROMPTS)["pixel_values"]
    model.config.cross_attention = {**settings, "attend": attend}
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, pixel_values=pixels, use_cache=False).logits[0]
            start = 0
            for row, (_, seeds) in zip(rows, PROMPTS, strict=True):
                shown = processor.pixels([picture(seed) for seed in seeds]) if seeds else {}
                alone = model(input_ids=torch.tensor([row]), **shown).logits[0]
                torch.testing.assert_close(packed[start : start + len(row)], alone, rtol=1e-4, atol=1e-4)
                start += len(row)
    finally:
        model.config.cross_attention = settings


def test_visuals_are_picked_and_joined_image_by_image() -> None:
    tokens = torch.arange(12.0).view(6, 2)
    layers = [(tokens[:, None] * n, tokens[:, None] * -n) for n in (1, 2)]
    visual = Visual(tokens, (1, 3, 2), tiles=(1, 2, 1), keys=("a", "b", "c")).with_layers(layers)
    picked = visual.select([3, 1, 3])
    rows = [4, 5, 0, 4, 5]
    assert torch.equal(picked.tokens, tokens[rows])
    assert (picked.lengths, picked.tiles, picked.keys) == ((2, 1, 2), (1, 1, 1), ("c", "a", "c"))
    for (key, value), (whole_key, whole_value) in zip(picked.layers, layers, strict=True):
        assert torch.equal(key, whole_key[rows])
        assert torch.equal(value, whole_value[rows])
    again = Visual.concat([visual.select([1]), visual.select([2, 3])])
    assert torch.equal(again.tokens, visual.tokens)
    assert (again.lengths, again.tiles, again.keys) == (visual.lengths, visual.tiles, visual.keys)
    assert torch.equal(again.layers[1][1], visual.layers[1][1])
    assert Visual.concat([visual, Visual(tokens, (6,))]).keys == ()
    with pytest.raises(ValueError, match="6 visual tokens"):
        Visual(tokens, (1, 3))
