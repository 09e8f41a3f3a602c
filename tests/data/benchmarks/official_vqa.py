"""The official VQA evaluation written out plainly, one annotator against the others at a time: the oracle of the tests,
and what the benchmark of the scoring is measured beside. Its rules and its slips are those of the published script."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
# some of its hundred and odd; `Im` and `Id've` can't match lower case, `somebody'd` loses its apostrophe
CONTRACTIONS = {
    "aint": "ain't", "cant": "can't", "dont": "don't", "isnt": "isn't", "hes": "he's", "Im": "I'm", "Id've": "I'd've",
    "let's": "let's", "oclock": "o'clock", "ow's'at": "'ow's'at", "somebody'd": "somebodyd", "thats": "that's",
    "thered": "there'd", "twas": "'twas", "wont": "won't", "yall": "y'all", "couldn'tve": "couldn't've",
}  # fmt: skip


class Script:
    """evaluate() leaves .accuracy (overall, by answer type, by question type) and .questions (id -> 0 to 100).

    As the script does, it overwrites the answers that it is given.
    """

    def __init__(self, annotations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
        self.truth = {row["question_id"]: row for row in annotations}
        self.results = {row["question_id"]: row for row in results}
        self.period = re.compile(r"(?!<=\d)(\.)(?!\d)")
        self.comma = re.compile(r"(\d)(\,)(\d)")
        self.questions: dict[Any, float] = {}
        self.accuracy: dict[str, Any] = {}

    def evaluate(self) -> None:
        values: list[float] = []
        by_type: dict[str, dict[str, list[float]]] = {"answer_type": {}, "question_type": {}}
        for question, row in self.truth.items():
            answers = row["answers"]
            for answer in answers:
                answer["answer"] = self.trim(answer["answer"])
            said = self.trim(self.results[question]["answer"])
            if len({answer["answer"] for answer in answers}) > 1:
                for answer in answers:
                    answer["answer"] = self.words(self.punctuation(answer["answer"]))
                said = self.words(self.punctuation(said))
            accuracies = []
            for answer in answers:
                others = [other for other in answers if other != answer]
                matching = [other for other in others if other["answer"] == said]
                accuracies.append(min(1, float(len(matching)) / 3))
            value = float(sum(accuracies)) / len(accuracies)
            values.append(value)
            self.questions[question] = 100 * value
            for kind, found in by_type.items():
                found.setdefault(row[kind], []).append(value)
        self.accuracy = {"overall": self.percent(values)}
        for kind, found in by_type.items():
            self.accuracy[kind] = {name: self.percent(some) for name, some in found.items()}

    def trim(self, text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    def punctuation(self, text: str) -> str:
        out = text
        for mark in MARKS:
            if (mark + " " in text or " " + mark in text) or (re.search(self.comma, text) is not None):
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        return self.period.sub("", out, count=int(re.UNICODE))  # the script gives the flag where the count stands

    def words(self, text: str) -> str:
        kept = [NUMBERS.get(word, word) for word in text.lower().split()]
        kept = [word for word in kept if word not in ("a", "an", "the")]
        return " ".join(CONTRACTIONS.get(word, word) for word in kept)

    def percent(self, values: Sequence[float]) -> float:
        return round(100 * float(sum(values)) / len(values), 2)
