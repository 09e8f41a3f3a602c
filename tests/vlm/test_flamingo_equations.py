"""Gated cross-attention and the Perceiver resampler against the Flamingo paper's equations, written out here."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from tests.vlm.conftest import LoadedModels
from vlm import VisionLanguageConfig, VisionLanguageModel, Visual
from vlm.configuration import Connector, CrossAttention
from vlm.cross_attention import GatedCrossAttention
from vlm.fusion import index_media, lay_out_media
from vlm.resampler import PerceiverResampler

Weights = dict[str, torch.Tensor]
IMAGE = 9
HEADS, HEAD_DIM = 2, 8


def layer_norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def feed_forward(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    wide = torch.einsum("...d,ed->...e", layer_norm(x, weights, f"{name}.0"), weights[f"{name}.1.weight"])
    wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
    return torch.einsum("...e,de->...d", wide, weights[f"{name}.3.weight"])


def attention(query: torch.Tensor, media: torch.Tensor, weights: Weights, name: str, heads: int) -> torch.Tensor:
    """query: [T, D], normalised; media: [M, Dm]."""
    w_q = weights[f"{name}to_q.weight"].unflatten(0, (heads, -1))  # [H, Dh, D]
    w_k, w_v = weights[f"{name}to_kv.weight"].unflatten(0, (2, heads, -1))
    w_o = weights[f"{name}to_out.weight"].unflatten(1, (heads, -1))  # [D, H, Dh]
    q = torch.einsum("td,hed->the", query, w_q) / w_q.shape[1] ** 0.5
    k, v = (torch.einsum("md,hed->mhe", media, w) for w in (w_k, w_v))
    scores = torch.einsum("the,mhe->htm", q, k)
    weighted = torch.exp(scores - scores.amax(-1, keepdim=True))
    weighted = weighted / weighted.sum(-1, keepdim=True)
    return torch.einsum("htm,mhe,dhe->td", weighted, v, w_o)


def seen_images(ids: list[int], attend: str, first: int) -> list[list[int]]:
    """Which images each token of a row sees, counted over the batch from `first`."""
    seen: list[list[int]] = []
    so_far: list[int] = []
    for token in ids:
        if token == IMAGE:
            so_far = [*so_far, first + len(so_far)]
        seen.append(so_far[-1:] if attend == "last" else so_far)
    return seen


def gated_block(
    x: torch.Tensor, ids: list[list[int]], images: list[torch.Tensor], weights: Weights, settings: CrossAttention
) -> torch.Tensor:
    """x: [B, T, D]; images: [L, Dm] each, those of all rows. Figure 4 of the paper, token by token."""
    rows, first = [], 0
    for row, tokens in zip(x, ids, strict=True):
        out = []
        for position, images_seen in enumerate(seen_images(tokens, settings.attend, first)):
            y = row[position : position + 1]  # [1, D]
            if images_seen:
                media = torch.cat([images[i] for i in images_seen])
                normed = layer_norm(y, weights, "norm")
                y = y + torch.tanh(weights["attn_gate"]) * attention(normed, media, weights, "", settings.heads)
            if images_seen or settings.ffn_without_media == "apply":
                y = y + torch.tanh(weights["ff_gate"]) * feed_forward(y, weights, "feed_forward")
            out.append(y)
        rows.append(torch.cat(out))
        first += sum(token == IMAGE for token in tokens)
    return torch.stack(rows)


def open_block(settings: CrossAttention, width: int, media_width: int) -> GatedCrossAttention:
    torch.manual_seed(1)
    block = GatedCrossAttention(settings, width, media_width)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(block.attn_gate, 0.5)
    torch.nn.init.constant_(block.ff_gate, 0.5)
    return block


# text before an image, two images, none, an image at the very start and one at the very end
ROWS = [[1, 2, IMAGE, 3, 4, IMAGE, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [IMAGE, 1, 2, 3, 4, 5, 6, IMAGE]]
LENGTHS = (3, 5, 1, 4)


@pytest.mark.parametrize("ready", [False, True], ids=["projected in the block", "keys and values made ready"])
@pytest.mark.parametrize("ffn_without_media", ["apply", "zero"])
@pytest.mark.parametrize("attend", ["last", "all"])
def test_a_gated_block_equals_the_papers_equations(attend: Any, ffn_without_media: Any, ready: bool) -> None:
    settings = CrossAttention(
        heads=HEADS, head_dim=HEAD_DIM, ff_mult=2, attend=attend, ffn_without_media=ffn_without_media
    )
    block = open_block(settings, width=16, media_width=12)
    x = torch.randn(len(ROWS), 8, 16)
    images = [torch.randn(length, 12) for length in LENGTHS]
    ids = torch.tensor(ROWS)
    layout = lay_out_media(*index_media(ids, IMAGE, (1,) * 4), LENGTHS, attend)
    tokens = torch.cat(images)
    with torch.no_grad():
        ours = block(x, tokens, block.project(tokens) if ready else None, layout)
        theirs = gated_block(x, ROWS, images, block.state_dict(), settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (ours - x).abs().max() > 0.1  # the gates are open, so there is something to compare


@pytest.mark.parametrize("ffn_without_media", ["apply", "zero"])
def test_text_before_the_first_image_gets_exactly_nothing_from_attention(ffn_without_media: Any) -> None:
    settings = CrossAttention(heads=HEADS, head_dim=HEAD_DIM, ffn_without_media=ffn_without_media)
    block = open_block(settings, width=16, media_width=12)
    x = torch.randn(3, 8, 16)
    layout = lay_out_media(*index_media(torch.tensor(ROWS), IMAGE, (1,) * 4), LENGTHS, "last")
    blind = ~layout.any_visible[..., 0]  # [B, T]
    assert blind.tolist() == [[True] * 2 + [False] * 6, [True] * 8, [False] * 8]
    with torch.no_grad():
        once, other = (block(x, torch.randn(13, 12), None, layout) for _ in range(2))
    assert torch.equal(once[blind], other[blind])
    assert not torch.isclose(once[~blind], other[~blind]).all(-1).any()
    fed = block.feed_forward(x) * block.ff_gate.tanh() if ffn_without_media == "apply" else torch.zeros_like(x)
    assert torch.equal(once[blind], (x + fed)[blind])


def squares_of(patches: torch.Tensor, pooling: str, weights: Weights) -> torch.Tensor:
    """[16, D], a grid of 4 x 4 -> [4, D]: the four squares of 2 x 2."""
    squares = []
    for top in (0, 2):
        for left in (0, 2):
            square = [patches[4 * y + x] for y in (top, top + 1) for x in (left, left + 1)]
            if pooling == "average":
                squares.append(sum(square, torch.zeros(())) / 4)
            else:  # channel by channel, the four patches beside each other
                squares.append(weights["merge.weight"] @ torch.stack(square, 1).flatten() + weights["merge.bias"])
    return torch.stack(squares)


@pytest.mark.parametrize("position_std", [0.0, 0.5])
@pytest.mark.parametrize("out_size", [None, 20])
@pytest.mark.parametrize(("pool", "pooling"), [(1, "average"), (2, "average"), (2, "concat")])
def test_the_perceiver_equals_the_papers_equations(
    out_size: int | None, position_std: float, pool: int, pooling: Any
) -> None:
    torch.manual_seed(2)
    settings = Connector(
        type="perceiver",
        num_latents=5,
        depth=2,
        heads=HEADS,
        head_dim=HEAD_DIM,
        ff_mult=2,
        position_std=position_std,
        pool=pool,
        pooling=pooling,
    )
    resampler = PerceiverResampler(settings, in_size=12, out_size=out_size, squares=16 // pool**2)
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(3, 16, 12)
    weights = resampler.state_dict()
    expected = []
    for patches in features:
        patches = squares_of(patches, pooling, weights) if pool > 1 else patches
        patches = patches + weights["positions"] if position_std else patches
        x = weights["latents"]
        for layer in range(2):
            name = f"layers.{layer}.attention."
            latents = layer_norm(x, weights, f"{name}norm_latents")
            media = torch.cat([layer_norm(patches, weights, f"{name}norm_media"), latents])
            x = x + attention(latents, media, weights, name, HEADS)
            x = x + feed_forward(x, weights, f"layers.{layer}.feed_forward")
        x = layer_norm(x, weights, "norm")
        if out_size:
            x = torch.einsum("nd,od->no", x, weights["out.weight"]) + weights["out.bias"]
        expected.append(x)
    with torch.no_grad():
        torch.testing.assert_close(resampler(features), torch.stack(expected), rtol=1e-5, atol=2e-5)


def plain_lm(model: VisionLanguageModel) -> LlamaForCausalLM:
    lm = AutoModelForCausalLM.from_config(model.config.text_config)
    lm.load_state_dict(model.language_model.state_dict())
    return lm.eval()


def decode_with_a_cache(model: VisionLanguageModel, ids: torch.Tensor, visual: Visual) -> torch.Tensor:
    """Logits [B, T, V] of three tokens at once and then one after another, of all rows."""
    media_index, document_start = model.index_media(ids, visual)
    cache, logits = DynamicCache(), []
    for begin, end in [(0, 3), *((at, at + 1) for at in range(3, ids.shape[1]))]:
        part = slice(begin, end)
        seen = {"media_index": media_index[:, part], "document_start": document_start[:, part]}
        logits.append(
            model(input_ids=ids[:, part], visual=visual, past_key_values=cache, use_cache=True, **seen).logits
        )
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("every", "attend", "ffn_without_media"),
    [(1, "last", "apply"), (1, "all", "zero"), (2, "last", "zero"), (2, "all", "apply")],
)
def test_a_deep_model_is_the_plain_lm_with_gated_blocks_before_its_layers(
    loaded_models: LoadedModels, every: int, attend: Any, ffn_without_media: Any
) -> None:
    base, _ = loaded_models("deep", "perceiver")
    settings = {"heads": 2, "head_dim": 16, "every": every, "attend": attend, "ffn_without_media": ffn_without_media}
    config = VisionLanguageConfig(**{**base.config.to_diff_dict(), "cross_attention": settings})
    torch.manual_seed(3)
    model = VisionLanguageModel(config).eval()
    for block in model.cross_attention.values():
        torch.nn.init.constant_(block.attn_gate, 0.5)
        torch.nn.init.constant_(block.ff_gate, 0.5)
    image = config.image_token_id
    ids = torch.tensor([[image if token == IMAGE else 20 + token for token in row] for row in ROWS])
    images = [torch.randn(length, 32) for length in LENGTHS]
    lm = plain_lm(model)
    with torch.no_grad():
        hidden = lm.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
        rope = lm.model.rotary_emb(hidden, positions)
        gated = []
        for index, layer in enumerate(lm.model.layers):
            if (index + 1) % every == 0:  # as OpenFlamingo counts: the last of each run of `every`
                weights = model.cross_attention[str(index)].state_dict()
                hidden = gated_block(hidden, ROWS, images, weights, config.cross_attention_settings)
                gated.append(str(index))
            hidden = layer(hidden, position_embeddings=rope, position_ids=positions)
        expected = lm.lm_head(lm.model.norm(hidden))
        visual = Visual(torch.cat(images), LENGTHS)
        ours = model(input_ids=ids, visual=visual).logits
        cached = decode_with_a_cache(model, ids, visual)
    assert list(model.cross_attention) == gated == {1: ["0", "1", "2"], 2: ["1"]}[every]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=2e-4)
    assert (ours - lm(input_ids=ids).logits).abs().max() > 0.1
