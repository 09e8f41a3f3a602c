"""GQA: compositional questions about real images (Hudson and Manning 2019)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from data.benchmarks.base import Answers, Benchmark, Item, averaged
from data.benchmarks.files import Files, read_object
from data.benchmarks.scores import Scores
from data.formats import SHORT_ANSWER


class Types(msgspec.Struct):
    structural: str | None = None
    semantic: str | None = None


class Question(msgspec.Struct):
    question: str
    image: str = msgspec.field(name="imageId")
    answer: str | None = None
    types: Types | None = None
    balanced: bool = msgspec.field(default=True, name="isBalanced")


class Reference(msgspec.Struct):
    answer: str
    types: Types | None = None
    balanced: bool = msgspec.field(default=True, name="isBalanced")


class GQA(Benchmark):
    """{id: {"question", "imageId", "answer", "types"}}; predictions [{"questionId", "prediction"}].

    Accuracy of exact matches, case and final punctuation ignored; as the official script breaks it down: binary and
    open questions, structural and semantic types. It counts balanced questions alone: others have no references here.
    """

    task = "gqa"
    prompt = SHORT_ANSWER
    max_tokens = 16
    id_keys = ("questionId", "question_id", "id")
    text_keys = ("prediction", "answer", "text")

    def items(self, data: Path, images: Path | None, split: str | None = None) -> list[Item]:
        files = Files(data, split, "https://cs.stanford.edu/people/dorarad/gqa/download.html")
        path = files.find("*questions*.json", f"{split or 'testdev_balanced'}_questions.json")
        files.check()
        pictures = files.pictures(images, ["images"])

        def ask(key: str, row: Question) -> Item:
            references = () if row.answer is None or not row.balanced else (row.answer,)
            image = pictures.by_name(f"{row.image}.jpg", ["images"])
            return Item(key, row.question, references, image, groups(row.types))

        return read_object(path, Question, ask)

    def references(self, path: Path) -> list[Item]:
        def told(key: str, row: Reference) -> Item:
            return Item(key, "", (row.answer,) if row.balanced else (), None, groups(row.types))

        return read_object(path, Reference, told)

    def submission(self, items: Sequence[Item], answers: Mapping[str, str]) -> str:
        return json.dumps([{"questionId": i, "prediction": self.submitted(text)} for i, text in answers.items()])

    def submitted(self, answer: str) -> str:
        """The official script compares strictly; LLaVA's converter takes final full stops and capitals away."""
        return normalise(answer)

    def score(self, items: Sequence[Item], answers: Answers, mode: str = "official") -> Scores:
        said = [answers[item.id] for item in items]
        right = [
            float(text is not None and normalise(text) == normalise(item.references[0]))
            for text, item in zip(said, items, strict=True)
        ]
        return averaged(self.task, mode, items, right)


def normalise(text: str) -> str:
    return text.strip().rstrip(".,;:!? ").lower()


def groups(types: Types | None) -> tuple[str, ...]:
    found: list[str] = []
    if types is not None and types.structural:
        found += ["accuracy/open" if types.structural == "query" else "accuracy/binary"]
        found += [f"structural/{types.structural}"]
    if types is not None and types.semantic:
        found += [f"semantic/{types.semantic}"]
    return tuple(found)
