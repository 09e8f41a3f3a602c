"""BLEU, ROUGE-L and CIDEr-D of the whole corpus at once against pycocoevalcap's Python, sentence by sentence."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from data.benchmarks.captions import measure
from data.benchmarks.rouge import rouge_l

CLOSE = 1e-9
Texts = Sequence[str]


def compare(hypotheses: Texts, references: Sequence[Texts]) -> dict[str, float]:
    """Ours, after a look that theirs are the same."""
    measures, ciders = measure(hypotheses, references)
    ours = {name: float(value) for name, value in measures.items()}
    truth = dict(enumerate(map(list, references)))
    said = {number: [text] for number, text in enumerate(hypotheses)}
    theirs, _ = Bleu(4).compute_score(truth, said, verbose=0)
    assert [ours[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(theirs, abs=CLOSE)
    mean, each = Cider().compute_score(truth, said)
    np.testing.assert_allclose(ciders, each, atol=CLOSE)
    assert ciders.mean() == pytest.approx(mean, abs=CLOSE)
    mean, each = Rouge().compute_score(truth, said)
    np.testing.assert_allclose(measures["rouge_l"].statistics[:, 0], each, atol=CLOSE)
    assert [ours["cider"], ours["rouge_l"]] == pytest.approx([ciders.mean(), mean], abs=CLOSE)
    return ours


def sentence(rng: random.Random, words: Texts, longest: int) -> str:
    return " ".join(rng.choices(words, k=rng.randint(1, longest)))


@pytest.mark.parametrize(
    ("images", "references", "longest", "vocabulary"),
    [(300, 5, 15, 60), (100, 1, 3, 5), (50, 3, 100, 20), (2, 2, 8, 4), (1, 5, 8, 6), (40, 5, 4, 2), (20, 2, 200, 3)],
)
def test_random_sentences_score_as_in_the_official_python(
    images: int, references: int, longest: int, vocabulary: int
) -> None:
    rng = random.Random(images)
    words = [f"w{n}" for n in range(vocabulary)]
    others = [[sentence(rng, words, longest) for _ in range(rng.randint(1, references))] for _ in range(images)]
    said = []
    for some in others:
        kept = [word for word in rng.choice(some).split() if rng.random() < 0.8]
        said.append(rng.choice([" ".join(kept), sentence(rng, words, longest), "", "never seen here", some[0]]))
    compare(said, others)


WORD = st.sampled_from("a b c dog dog's".split())
SENTENCE = st.lists(WORD, max_size=6).map(" ".join)


@given(rows=st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_short_and_empty_sentences_score_as_in_the_official_python(rows: list[tuple[str, list[str]]]) -> None:
    assume(any(map(str.split, [other for _, others in rows for other in others])))  # theirs fails without a word
    compare([said for said, _ in rows], [others for _, others in rows])


def test_one_image_alone_has_no_cider() -> None:
    found = compare(["a dog runs on grass"], [["a dog runs on grass", "the dog runs"]])
    assert found["cider"] == 0
    assert found["bleu4"] == pytest.approx(1)


def test_perfect_captions_have_perfect_scores() -> None:
    others = [["a dog runs on the grass"], ["two men sit on a bench"], ["red cars wait at a light"]]
    found = compare([one[0] for one in others], others)
    assert found["cider"] == pytest.approx(10)
    assert [found["bleu1"], found["bleu4"]] == pytest.approx([1, 1])
    assert found["rouge_l"] == pytest.approx(1)


def test_nothing_said_is_worth_nothing() -> None:
    found = compare(["", ""], [["a dog runs"], ["a man sits", "two men"]])
    assert max(found.values()) < 1e-6


def test_of_two_reference_lengths_as_close_the_shorter_counts() -> None:
    short, long = "a b c", "a b c d e f g"
    assert compare(["a b c d e"], [[long, short]])["bleu1"] == pytest.approx(1)
    assert compare(["a b c d e"], [[long]])["bleu1"] < 0.7


def test_precision_and_recall_may_be_of_two_references() -> None:
    assert rouge_l("a b".split(), ["a b c d".split(), "a".split()]) == pytest.approx(1)


def test_repeated_words_are_clipped() -> None:
    others = [["the cat sat on the mat"], ["a dog ran home"]]
    told = compare(["the the the the the the", "a dog ran home"], others)
    assert told["bleu1"] == pytest.approx((2 + 4) / 10)
    assert told["cider"] < 5.5  # 5 of the second; without clipping the first would add more
