"""What an evaluation leaves: predictions to submit, scores.json, and report.html with thumbnails."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

import vlm
from data.benchmarks import Benchmark, Item, Scores
from data.pictures import ImageRef, load_image
from train.evaluation.journal import REPORT, SCORES, write_aside
from train.evaluation.prompts import Reply
from vlm.errors import UserError

SHOWN = 1000  # items on the page: the worst and the best
THUMBNAIL = 256  # pixels
SAMPLES = 1000  # of the bootstrap
# metrics of many kinds, folded away
BREAKDOWNS = ("question_type", "structural", "semantic", "subject", "grade", "category", "l2-category")
_PACKAGES = ("torch", "transformers", "vllm", "pycocoevalcap", "numpy", "pillow")
_pages = jinja2.Environment(
    loader=jinja2.PackageLoader("train"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class Evaluation:
    """Items, the image that each was asked about, and what became of it."""

    benchmark: Benchmark
    items: list[Item]
    replies: dict[str, Reply]
    settings: Mapping[str, Any]
    images: Mapping[str, ImageRef | None]

    @property
    def control(self) -> str:
        return str(self.settings["control"])

    @cached_property
    def scores(self) -> Scores:
        """Of the items that have references; questions that failed are wrong."""
        items = [item for item in self.items if item.references]
        if not items:
            return Scores(self.benchmark.task, str(self.settings["mode"]), {}, {})
        answers = {name: reply.answer for name, reply in self.replies.items()}
        return self.benchmark.score(items, answers, str(self.settings["mode"]))

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return self.scores.intervals(SAMPLES)

    @property
    def failed(self) -> list[Reply]:
        return [reply for reply in self.replies.values() if reply.error is not None]

    @property
    def seconds(self) -> float:
        """That asking took, of all runs and processes together; loading the model not counted."""
        return sum(reply.seconds for reply in self.replies.values())

    @property
    def pictured(self) -> int:
        """Questions that have a picture, whatever the control shows of it."""
        return sum(bool(item.images) for item in self.items)

    @property
    def unscored(self) -> int:
        return len(self.items) - self.scores.n


def write_outputs(evaluation: Evaluation, folder: Path, controls: Sequence[Evaluation] = ()) -> None:
    """predictions in the benchmark's own format (a question that failed has a wrong answer), scores.json, the page."""
    replies, wrong = evaluation.replies, evaluation.benchmark.wrong
    answers = {item.id: wrong(item) if (said := replies[item.id].answer) is None else said for item in evaluation.items}
    submission = evaluation.benchmark.submission(evaluation.items, answers)
    write_aside(folder / evaluation.benchmark.submission_name, submission)
    write_page(evaluation, folder, controls)
    # at the end, since what has scores is whole
    write_aside(folder / SCORES, json.dumps(as_json(evaluation, controls), indent=1, ensure_ascii=False))


def as_json(evaluation: Evaluation, controls: Sequence[Evaluation] = ()) -> dict[str, Any]:
    failed = evaluation.failed
    return {
        **evaluation.scores.as_json(per_item=False),
        "intervals": evaluation.intervals,
        "failed": len(failed),
        "failures": [{"id": reply.id, "error": reply.error} for reply in failed],
        "unscored": evaluation.unscored,
        "prompt": evaluation.settings["prompt"],
        "control": evaluation.control,
        "questions_with_images": evaluation.pictured,
        "controls": {
            other.control: {"metrics": other.scores.metrics, "intervals": other.intervals, "failed": len(other.failed)}
            for other in controls
        },
        "settings": {**evaluation.settings, "decoding": "greedy"},
        "versions": versions(),
        "per_item": evaluation.scores.per_item,
        "seconds": round(evaluation.seconds, 3),
        "seconds_per_question": round(evaluation.seconds / len(evaluation.items), 6),
    }


def versions() -> dict[str, str]:
    found = {"vlm": vlm.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_page(evaluation: Evaluation, folder: Path, controls: Sequence[Evaluation]) -> None:
    """One file that works offline, and a folder of thumbnails beside it."""
    scores = evaluation.scores
    ranked = sorted(evaluation.items, key=lambda item: scores.per_item.get(item.id, 0.0))
    chosen = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN // 2], *ranked[-SHOWN // 2 :]]
    thumbnails = folder / "thumbnails"
    try:
        thumbnails.mkdir(exist_ok=True)
        cards = [_card(evaluation, item, number, thumbnails) for number, item in enumerate(chosen)]
    except OSError as error:
        raise UserError(f"{thumbnails}: can't be written ({error.strerror}); the answers are kept") from None
    page = _pages.get_template("evaluation.html").render(
        title=f"{scores.task}: {Path(str(evaluation.settings['model'])).name or evaluation.settings['model']}",
        evaluation=evaluation,
        scores=scores,
        controls=controls,
        notes={name: note for name, note in scores.notes.items() if note},
        versions=versions(),
        kinds=[name for name in scores.metrics if name.partition("/")[0] in BREAKDOWNS],
        cards=cards,
        groups=sorted({group for card in cards for group in card["groups"]}),
    )
    write_aside(folder / REPORT, page)


def _card(evaluation: Evaluation, item: Item, number: int, thumbnails: Path) -> dict[str, Any]:
    reply = evaluation.replies[item.id]
    score = evaluation.scores.per_item.get(item.id)
    return {
        "id": item.id,
        "question": item.question,
        "answer": reply.answer if reply.error is None else None,
        "error": reply.error,
        "references": _counted(item.references),
        "score": None if score is None else round(score, 4),
        "groups": list(item.groups),
        "image": _thumbnail(evaluation.images[item.id], thumbnails / f"{number}.jpg"),
    }


def _counted(references: Sequence[str]) -> list[str]:
    return [
        f"{text} \u00d7{count}" if (count := references.count(text)) > 1 else text for text in dict.fromkeys(references)
    ]


def _thumbnail(image: ImageRef | None, path: Path) -> str | None:
    """Its name beside the page; a picture that can't be read is told by its card's error."""
    if image is None:
        return None
    try:
        picture = load_image(image)
    except UserError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(path, quality=80)
    return f"thumbnails/{path.name}"
