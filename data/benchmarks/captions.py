"""Captions of COCO and Flickr, scored as the COCO caption evaluation does (Chen et al. 2015)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from data.benchmarks import java, ptb
from data.benchmarks.base import Answers, Benchmark, Item, as_number
from data.benchmarks.files import Files, Pictures, array_name, image_sets, read_array
from data.benchmarks.measures import Array, Measure, mean
from data.benchmarks.ngrams import Corpus, bleu, cider
from data.benchmarks.predictions import Predictions, listed, number_in_name, rename
from data.benchmarks.rouge import rouge_l
from data.benchmarks.scores import Scores
from data.pictures import MissingImage
from vlm.errors import UserError

if TYPE_CHECKING:
    from data.benchmarks.clipscore import Clip

Tokenizer = Literal["ptb", "ptb-python", "none"]


class Captions(Benchmark):
    """Official annotations ("images" and "annotations"); predictions [{"image_id", "caption"}].

    tokenizer: ptb is Stanford's program where there is Java, else our own rendition of it, as ptb-python always is;
    none takes captions for tokenised.
    """

    task = "coco-caption"
    prompt = "Provide a one-sentence caption for the provided image."
    max_tokens = 64
    running = ""
    id_keys = ("image_id", "question_id", "image", "id")
    text_keys = ("caption", "text", "answer")

    def __init__(self, tokenizer: Tokenizer = "ptb") -> None:
        self.tokenizer = tokenizer
        self.clip: str | None = None  # a CLIP by which captions are compared with their pictures, too
        self.images: Path | None = None
        self._loaded: Clip | None = None

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://cocodataset.org/#download (annotations) and COCO's image sets")
        path = files.find("*captions*.json", f"captions_{split or 'val2014'}.json")
        files.check()
        pictures = files.pictures(images, image_sets(path))
        captions = _captions(path)

        def ask(_: int, row: Image) -> Item:
            found = captions.get(str(row.id), ())
            return Item(str(row.id), "", tuple(found), pictures.by_name(row.file_name))

        return read_array(path, "images", Image, ask)

    def references(self, path: Path) -> list[Item]:
        captions = _captions(path)
        if self.clip is None:
            return [Item(image, "", tuple(texts)) for image, texts in captions.items()]
        names = dict(read_array(path, "images", Image, lambda _, row: (str(row.id), row.file_name)))
        pictures = Pictures(path.parent if self.images is None else self.images)
        return [
            Item(image, "", tuple(texts), pictures.by_name(names[image]) if image in names else None)
            for image, texts in captions.items()
        ]

    def renamed(self, given: Predictions, items: Sequence[Item], references: Path) -> Predictions:
        """Pictures may be called by their files, as the annotations name these, or by the number in their names."""
        ids = {item.id for item in items}
        if all(name in ids for name in given.answers):
            return given
        files: dict[str, str] = {}
        if array_name(references, "images", "annotations") == "images":
            files = dict(read_array(references, "images", Image, lambda _, row: (row.file_name, str(row.id))))
        return rename(given, ids, lambda name: files.get(name) or number_in_name(name))

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        return json.dumps([{"image_id": as_number(i), "caption": text} for i, text in answers.items()])

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        """A question that failed has an empty caption, which shares nothing with any reference."""
        said = [answers[item.id] or "" for item in items]
        hypotheses, references, tokenizer = self._tokenized(said, [item.references for item in items])
        measures, ciders = measure(hypotheses, references)
        skipped = {name: why for name, why in (("meteor", java.missing()), ("spice", java.spice_missing())) if why}
        if "meteor" not in skipped:
            measures["meteor"] = java.meteor(hypotheses, references)
        if "spice" not in skipped:
            measures["spice"] = mean(java.spice(hypotheses, references))
        if self.clip is not None:
            measures |= self._clipscores(self.clip, items, answers)
        per_item = {item.id: float(value) for item, value in zip(items, ciders, strict=True)}
        return Scores(self.task, mode, measures, per_item, {"tokenizer": tokenizer, "skipped": skipped})

    def _clipscores(self, clip: str, items: Sequence[Item], answers: Answers) -> dict[str, Measure]:
        pictures = [item.image for item in items if item.image and not isinstance(item.image, MissingImage)]
        if len(pictures) < len(items):
            names = [item.id for item in items if item.image is None or isinstance(item.image, MissingImage)]
            raise UserError(
                f"CLIPScore needs the pictures, and those of {len(names)} images aren't there ({listed(names)})"
            )
        from data.benchmarks.clipscore import Clip, clipscores

        if self._loaded is None:
            self._loaded = Clip(clip)
        return clipscores(self._loaded, [answers[item.id] for item in items], pictures, [i.references for i in items])

    def _tokenized(
        self, said: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[list[str]], str]:
        texts = [*said, *(text for one in references for text in one)]
        tokenizer: str = self.tokenizer
        if tokenizer == "ptb" and not java.missing():
            texts = java.tokenize(texts)
        elif tokenizer != "none":
            tokenizer = "ptb-python"
            texts = [ptb.tokenize(text) for text in texts]
        rest = iter(texts[len(said) :])
        return texts[: len(said)], [[next(rest) for _ in one] for one in references], tokenizer


def measure(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, Measure], Array]:
    """What needs no Java, of tokenised texts; CIDEr-D of each image besides. [n]"""
    corpus = Corpus([text.split() for text in hypotheses], [[text.split() for text in one] for one in references])
    ciders = cider(corpus)
    rouges = [
        rouge_l(text.split(" "), [other.split(" ") for other in others])
        for text, others in zip(hypotheses, references, strict=True)
    ]
    return {**bleu(corpus), "rouge_l": mean(rouges), "cider": mean(ciders)}, ciders


class Image(msgspec.Struct):
    id: int | str
    file_name: str


class Caption(msgspec.Struct):
    image_id: int | str
    caption: str


def _captions(path: Path) -> dict[str, list[str]]:
    """Image id -> its captions, of the images that have any."""
    found: dict[str, list[str]] = {}
    for row in read_array(path, "annotations", Caption, lambda _, row: row):
        found.setdefault(str(row.image_id), []).append(row.caption)
    return found
