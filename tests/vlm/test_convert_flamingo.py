"""OpenFlamingo checkpoints on our deep fusion, against its equations written out here."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from tests.vlm.chats import picture
from tests.vlm.llavas import SIZE, VISION
from tests.vlm.test_convert_llava import give, held, ours, take
from vlm import UserError, load
from vlm.convert.importing import import_model

WIDTH, SEEN, HEADS, HEAD = 48, 32, 2, 64
LAYERS, EVERY, LATENTS = 4, 2, 5
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """lm/, clip/ and checkpoint.pt, to be left as they are."""
    folder = tmp_path_factory.mktemp("flamingo")
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            initializer_range=0.15,
            tie_word_embeddings=True,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    lm.save_pretrained(folder / "lm")
    tiny_tokenizer.save_pretrained(folder / "lm")
    CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "model_type"})).save_pretrained(
        folder / "clip"
    )
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square).save_pretrained(folder / "clip")
    torch.save(checkpoint(lm.get_input_embeddings().weight.detach()), folder / "checkpoint.pt")
    return folder


def checkpoint(embeddings: torch.Tensor) -> Weights:
    """Random weights under the names that OpenFlamingo saves; one token, <|endofchunk|>, is new: <image> was there."""
    made: Weights = {"perceiver.latents": torch.randn(LATENTS, SEEN)}

    def linear(name: str, rows: int, columns: int) -> None:
        made[f"{name}.weight"] = torch.randn(rows, columns) * columns**-0.5

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    def feed_forward(name: str, width: int) -> None:
        norm(f"{name}.0", width)
        linear(f"{name}.1", 4 * width, width)
        linear(f"{name}.3", width, 4 * width)

    for layer in range(2):
        name = f"perceiver.layers.{layer}"
        norm(f"{name}.0.norm_media", SEEN)
        norm(f"{name}.0.norm_latents", SEEN)
        linear(f"{name}.0.to_q", HEADS * HEAD, SEEN)
        linear(f"{name}.0.to_kv", 2 * HEADS * HEAD, SEEN)
        linear(f"{name}.0.to_out", SEEN, HEADS * HEAD)
        feed_forward(f"{name}.1", SEEN)
    norm("perceiver.norm", SEEN)
    for layer in range(EVERY - 1, LAYERS, EVERY):
        name = f"lang_encoder.gated_cross_attn_layers.{layer}"
        norm(f"{name}.attn.norm", WIDTH)
        linear(f"{name}.attn.to_q", HEADS * HEAD, WIDTH)
        linear(f"{name}.attn.to_kv", 2 * HEADS * HEAD, SEEN)
        linear(f"{name}.attn.to_out", WIDTH, HEADS * HEAD)
        feed_forward(f"{name}.ff", WIDTH)
        made[f"{name}.attn_gate"], made[f"{name}.ff_gate"] = torch.tensor([0.5]), torch.tensor([-0.7])
    made["lang_encoder.model.embed_tokens.weight"] = torch.cat([embeddings, torch.randn(1, WIDTH)])
    return made


def layer_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def feed(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    widened = torch.einsum("...d,hd->...h", layer_norm(w, f"{name}.0", x), w[f"{name}.1.weight"])
    gelu = widened * 0.5 * (1 + torch.erf(widened / 2**0.5))
    return torch.einsum("...h,dh->...d", gelu, w[f"{name}.3.weight"])


def attend(
    w: Weights, name: str, asking: torch.Tensor, seen: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """asking [n, d], seen [m, e], allowed [n, m] -> [n, d]; a row that may see nothing gets zeros."""
    q = torch.einsum("nd,id->ni", asking, w[f"{name}.to_q.weight"]).unflatten(-1, (HEADS, HEAD))
    kv = torch.einsum("me,ie->mi", seen, w[f"{name}.to_kv.weight"])
    k, v = (half.unflatten(-1, (HEADS, HEAD)) for half in (kv[:, : HEADS * HEAD], kv[:, HEADS * HEAD :]))
    scores = torch.einsum("nhd,mhd->hnm", q, k).mul(HEAD**-0.5).exp()
    if allowed is not None:
        scores = scores * allowed
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("hnm,mhd->nhd", shares, v).flatten(1) @ w[f"{name}.to_out.weight"].T


def resample(w: Weights, patches: torch.Tensor) -> torch.Tensor:
    if "perceiver.frame_embs" in w:
        patches = patches + w["perceiver.frame_embs"][0]
    latents = w["perceiver.latents"]
    for layer in range(2):
        name = f"perceiver.layers.{layer}"
        asking = layer_norm(w, f"{name}.0.norm_latents", latents)
        media = layer_norm(w, f"{name}.0.norm_media", patches)
        latents = latents + attend(w, f"{name}.0", asking, torch.cat([media, asking]))
        latents = latents + feed(w, f"{name}.1", latents)
    return layer_norm(w, "perceiver.norm", latents)


@torch.no_grad()
def reference(folder: Path, ids: torch.Tensor, image_token: int, pixels: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the parts in a folder, put together as OpenFlamingo does."""
    w = torch.load(folder / "checkpoint.pt")
    clip = CLIPVisionModel.from_pretrained(folder / "clip").eval()
    patches = clip(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    seen = torch.cat([resample(w, image) for image in patches])
    owner = torch.arange(1, len(pixels) + 1).repeat_interleave(LATENTS)
    allowed = (ids == image_token).cumsum(0)[:, None] == owner
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm").eval()
    embeddings = w["lang_encoder.model.embed_tokens.weight"]
    hidden = embeddings[ids][None]
    positions = torch.arange(len(ids))[None]
    rotary = lm.model.rotary_emb(hidden, positions)
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
    for index, layer in enumerate(lm.model.layers):
        if (index + 1) % EVERY == 0:
            name = f"lang_encoder.gated_cross_attn_layers.{index}"
            attended = attend(w, f"{name}.attn", layer_norm(w, f"{name}.attn.norm", hidden[0]), seen, allowed)
            hidden = hidden + w[f"{name}.attn_gate"].tanh() * attended
            hidden = hidden + w[f"{name}.ff_gate"].tanh() * feed(w, f"{name}.ff", hidden)
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return (lm.model.norm(hidden) @ embeddings.T)[0]


def taken(folder: Path, out: Path) -> Path:
    return take(folder / "checkpoint.pt", out, base=str(folder / "lm"), vision_tower=str(folder / "clip"))


def assert_equals_the_equations(folder: Path, imported: Path) -> None:
    model, processor = load(imported)
    words = processor.chat.encode_text("0123456789abc")  # each a token
    image = processor.image_token_id
    ids = torch.tensor([*words[:5], image, *words[5:9], image, *words[9:]])  # text before the first image, too
    pixels = processor.pixels([picture(1), picture(2)])
    with torch.no_grad():
        got = model(input_ids=ids[None], **pixels).logits[0]
    expected = reference(folder, ids, image, pixels["pixel_values"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # 7.6e-6 was seen
    with torch.no_grad():
        others = model(input_ids=ids[None], **processor.pixels([picture(1), picture(3)])).logits[0]
    assert torch.equal(others[:10], got[:10])
    assert (others[11:] - got[11:]).abs().max() > 1e-2


def test_logits_equal_the_equations(parts: Path, tmp_path: Path) -> None:
    imported = taken(parts, tmp_path / "imported")
    config = load(imported)[0].config
    assert config.cross_attention_settings.every == EVERY
    assert config.fusion == "deep"
    assert_equals_the_equations(parts, imported)
    exported = give(imported, tmp_path / "exported", to="vlm")
    assert held(exported).keys() == held(imported).keys()
    torch.testing.assert_close(ours(exported), ours(imported), rtol=0, atol=0)


@pytest.fixture
def copied(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts, tmp_path / "copied"))


def respell(change: Callable[[Weights], Weights | None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = torch.load(folder / "checkpoint.pt")
        torch.save(change(weights) or weights, folder / "checkpoint.pt")

    return spoil


def as_trained(w: Weights) -> Any:
    """As the training script saves: in a dictionary, wrapped, the blocks in the LM's layers a second time."""
    wrapped = {f"module.{name}": tensor for name, tensor in w.items()}
    mark = "lang_encoder.gated_cross_attn_layers."
    for name, tensor in w.items():
        if name.startswith(mark):
            layer, _, rest = name.removeprefix(mark).partition(".")
            wrapped[f"module.lang_encoder.model.layers.{layer}.gated_cross_attn_layer.{rest}"] = tensor
    return {"epoch": 3, "model_state_dict": wrapped}


def with_frames(w: Weights) -> Weights:
    return {**w, "perceiver.frame_embs": torch.randn(3, SEEN)}


@pytest.mark.parametrize("change", [as_trained, with_frames])
def test_other_spellings_mean_the_same(copied: Path, tmp_path: Path, change: Callable[[Weights], Any]) -> None:
    plain = torch.load(copied / "checkpoint.pt")
    torch.save(change(plain), copied / "checkpoint.pt")
    imported = taken(copied, tmp_path / "imported")
    if change is as_trained:
        torch.save(plain, copied / "checkpoint.pt")
    assert_equals_the_equations(copied, imported)


def test_answers_end_with_a_chunk(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    shutil.copytree(parts / "lm", tmp_path / "lm", dirs_exist_ok=True)
    (tmp_path / "lm" / "chat_template.jinja").unlink()
    source = str(parts / "checkpoint.pt")
    notes = import_model(source, tmp_path / "out", lambda *_: None, str(tmp_path / "lm"), str(parts / "clip"))
    assert any("answers end with <|endofchunk|>" in note for note in notes)
    model, processor = load(tmp_path / "out")
    end = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    assert end in model.generation_config.eos_token_id
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question: what? Answer:"}]},
        {"role": "assistant", "content": "a cat"},
    ]
    said = "".join(segment.text for segment in processor.chat.renderer.render(chat))
    assert said == "<image>Question: what? Answer:a cat<|endofchunk|>"


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda w: {key: tensor for key, tensor in w.items() if name not in key}


def two_minds(w: Weights) -> Weights:
    name = "lang_encoder.{}.attn_gate"
    inside = name.format("model.layers.1.gated_cross_attn_layer")
    return {**w, inside: w[name.format("gated_cross_attn_layers.1")] + 1}


BROKEN: dict[str, tuple[Callable[[Weights], Weights | None], str]] = {
    "no new embeddings": (without("embed_tokens"), "make 306 tokens, and of their embeddings the checkpoint has none"),
    "too few embeddings": (
        lambda w: {**w, "lang_encoder.model.embed_tokens.weight": torch.randn(305, WIDTH)},
        "the checkpoint has only 305 rows",
    ),
    "a block less": (without("gated_cross_attn_layers.3"), "gated blocks before the layers .1. of 4: not every 2th"),
    "a tensor less": (
        without("layers.1.1.3.weight"),
        "1 missing .multi_modal_projector.layers.1.feed_forward.3.weight",
    ),
    "a tensor more": (
        lambda w: {**w, "perceiver.media_time_embs": torch.zeros(1)},
        "1 unexpected .perceiver.media_time",
    ),
    "another width": (
        lambda w: {**w, "perceiver.norm.bias": torch.zeros(7)},
        "of another shape .* is 7 and must be 32",
    ),
    "two minds": (two_minds, "are the same tensor, and differ"),
    "something else": (lambda _: {"a": torch.zeros(1)}, "not an OpenFlamingo checkpoint .no perceiver.latents in it"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused(copied: Path, tmp_path: Path, what: str) -> None:
    change, complaint = BROKEN[what]
    respell(change)(copied)
    with pytest.raises(UserError, match=complaint):
        taken(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_nothing_but_a_checkpoint_is_one(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    shutil.copy(parts / "checkpoint.pt", tmp_path / "repository")
    named = {"base": str(parts / "lm"), "vision_tower": str(parts / "clip")}
    out = take(tmp_path / "repository", tmp_path / "out", **named)
    assert held(out).keys() == held(taken(parts, tmp_path / "other")).keys()


def test_the_rest_must_be_named(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the rest with --base LM --vision-tower TOWER"):
        take(parts / "checkpoint.pt", tmp_path / "out", base=str(parts / "lm"))
