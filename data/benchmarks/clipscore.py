"""CLIPScore and RefCLIPScore (Hessel et al. 2021): captions compared with pictures, and with references, by a CLIP."""

import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import CLIPModel

from data.benchmarks.measures import Array, Measure, mean
from data.pictures import ImageRef, load_image
from vlm.checkpoint import check_complete, check_source, quietly
from vlm.convert.images import image_processor, read_image_settings
from vlm.convert.sources import read_tokenizer
from vlm.device import pick_device
from vlm.errors import UserError, first_line
from vlm.hub import fetch

WEIGHT = 2.5
PROMPT = "A photo depicts "
BATCH = 64


class Clip:
    """A CLIP of a folder or hub id; what it makes of pictures and captions has unit length."""

    def __init__(self, source: str) -> None:
        folder = fetch(source)
        check_source(folder, model_type="clip")
        self.tokenizer = read_tokenizer(folder)
        self.pixels = image_processor(read_image_settings(folder), str(folder))
        try:
            with quietly():
                model, report = CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
                )
        except Exception as error:  # transformers fails in many ways on broken folders
            raise UserError(f"{source}: cannot be loaded ({first_line(error)})") from error
        check_complete(source, report)
        self.device = pick_device()
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def of_pictures(self, pictures: Sequence[ImageRef]) -> Array:
        """[n, D]"""
        found = []
        for begin in _shown(range(0, len(pictures), BATCH), "pictures"):
            images = [load_image(picture) for picture in pictures[begin : begin + BATCH]]
            pixels = self.pixels(images, return_tensors="pt")["pixel_values"].to(self.device)
            found.append(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return _unit(torch.cat(found))

    @torch.inference_mode()
    def of_captions(self, captions: Sequence[str]) -> Array:
        """Of captions behind the prompt, cut to what the model takes. [n, D]"""
        found = []
        for begin in _shown(range(0, len(captions), BATCH), "captions"):
            rows = [self._tokens(PROMPT + caption) for caption in captions[begin : begin + BATCH]]
            ids = torch.full((len(rows), max(map(len, rows))), self._end)
            mask = torch.zeros_like(ids)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            out = self.model.get_text_features(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            found.append(out.pooler_output)
        return _unit(torch.cat(found))

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _tokens(self, text: str) -> list[int]:
        """Up to the end token, at which the text tower is read; not every tokenizer writes it."""
        most = self.model.config.text_config.max_position_embeddings
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return [*tokens[: most - 1], self._end] if tokens[-1] != self._end or len(tokens) > most else tokens


def clipscores(
    clip: Clip, captions: Sequence[str | None], pictures: Sequence[ImageRef], references: Sequence[Sequence[str]]
) -> dict[str, Measure]:
    """clipscore: 2.5 max(cos(caption, picture), 0); refclipscore: the harmonic mean of that and of the cosine with the
    nearest reference. A caption that is None, of a question that failed, has 0."""
    failed = np.array([caption is None for caption in captions])
    ours = clip.of_captions([caption or "" for caption in captions])
    near = np.where(failed, 0.0, WEIGHT * np.maximum(0.0, (clip.of_pictures(pictures) * ours).sum(1)))
    rows = np.repeat(np.arange(len(ours)), [len(one) for one in references])
    alike = (clip.of_captions([text for one in references for text in one]) * ours[rows]).sum(1)
    nearest = np.zeros(len(ours))
    np.maximum.at(nearest, rows, alike)
    both = near + nearest
    return {"clipscore": mean(near), "refclipscore": mean(2 * near * nearest / np.where(both > 0, both, 1.0))}


def _unit(features: torch.Tensor) -> Array:
    return torch.nn.functional.normalize(features.double(), dim=1).cpu().numpy()


def _shown(steps: range, what: str) -> Iterable[int]:
    """With a bar on a terminal; stdout is for the scores."""
    return track(steps, what, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
