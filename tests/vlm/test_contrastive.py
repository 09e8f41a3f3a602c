"""The contrastive loss against a loop over pairs, and CLIP's own."""

import math

import pytest
import torch

from vlm.contrastive import contrastive_loss, make_clip, recall_at_1

SCALE = torch.tensor(1.3)


def embeddings(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.nn.functional.normalize(torch.randn(pairs, 6), dim=1) for _ in range(2))  # type: ignore[return-value]


def naive(images: torch.Tensor, texts: torch.Tensor, captions: list[int]) -> float:
    """Pair by pair: each image picks among the texts and each text among the images; equal captions share the truth."""
    total = 0.0
    pairs = range(len(captions))
    for queries, keys in ((images, texts), (texts, images)):
        for i in pairs:
            scores = [math.exp(math.exp(SCALE.item()) * float(queries[i] @ keys[j])) for j in pairs]
            right = [j for j in pairs if captions[j] == captions[i]]
            total -= sum(math.log(scores[j] / sum(scores)) for j in right) / len(right)
    return total / 2


@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 1], [7, 7, 7, 7, 7], [3]], ids=str)
def test_the_loss_equals_a_loop_over_all_pairs(captions: list[int]) -> None:
    images, texts = embeddings(len(captions))
    loss = contrastive_loss(images, texts, SCALE, torch.tensor(captions))
    assert loss.item() == pytest.approx(naive(images, texts, captions), rel=1e-5)
    if len(set(captions)) < len(captions):
        blind = contrastive_loss(images, texts, SCALE, torch.arange(len(captions)))
        assert loss.item() != pytest.approx(blind.item(), rel=1e-3)  # repeats count


def test_recall_counts_images_whose_nearest_caption_says_the_same() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0.9, 0.1]])
    assert recall_at_1(images, texts, torch.tensor([0, 1, 2])).item() == 1
    assert recall_at_1(images, texts, torch.tensor([0, 1, 1])).item() == 3


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT = {**VISION, "vocab_size": 20, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 16}
VISION |= {"image_size": 16, "patch_size": 8}


def test_without_repeats_it_is_clips_own_loss_summed() -> None:
    torch.manual_seed(0)
    clip = make_clip(VISION, TEXT, projection_dim=8).eval()
    ids = torch.tensor([[9, 5, 1], [8, 5, 1], [9, 7, 1], [4, 4, 1]])
    with torch.no_grad():
        out = clip(input_ids=ids, pixel_values=torch.randn(4, 3, 16, 16), return_loss=True)
    loss = contrastive_loss(out.image_embeds, out.text_embeds, clip.logit_scale, torch.arange(4))
    torch.testing.assert_close(loss, out.loss * 4)


def test_the_text_tower_pools_at_the_end_token() -> None:
    torch.manual_seed(0)
    clip = make_clip(VISION, TEXT, projection_dim=8).eval()
    with torch.no_grad():
        short = clip.get_text_features(input_ids=torch.tensor([[9, 5, 1]])).pooler_output
        padded = clip.get_text_features(
            input_ids=torch.tensor([[9, 5, 1, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
        ).pooler_output
    assert short.shape == (1, 8)
    torch.testing.assert_close(short, padded)
    with pytest.raises(ValueError, match="eos_token_id 2"):
        make_clip(VISION, {**TEXT, "eos_token_id": 2}, projection_dim=8)


def test_places_weigh_as_much_as_pixels_in_a_new_encoder() -> None:
    """From transformers' own deviation of .02 the patch features never learn where they are."""
    torch.manual_seed(0)
    embeddings = make_clip(VISION, TEXT, 8).vision_model.embeddings
    patches = embeddings.patch_embedding(torch.randn(8, 3, VISION["image_size"], VISION["image_size"]))
    ratio = embeddings.position_embedding.weight.std() / patches.std()
    assert ratio > 0.5
