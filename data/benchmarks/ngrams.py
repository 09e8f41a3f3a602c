"""BLEU and CIDEr-D over a whole corpus at once: n-grams are numbers, and what is counted is counted by sorting."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data.benchmarks.measures import Array, Measure

Integers = NDArray[np.int64]
ORDERS = 4  # n-grams of up to so many words
SIGMA = 6.0  # of CIDEr-D's Gaussian over the difference of lengths
TINY, SMALL = 1e-15, 1e-9  # what the official script adds lest it divides by nothing


@dataclass(frozen=True)
class Counts:
    """How often which n-gram is in which sentence, one entry a pair, sorted by both; `grams`: how many there are."""

    sentence: Integers
    gram: Integers
    count: Array
    grams: int


class Corpus:
    """One hypothesis and some references for each of n images, as lists of words.

    Sentence i < n is the hypothesis of image i, the others are references; image[s]: the image of sentence s.
    """

    def __init__(self, hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
        self.n = len(hypotheses)
        sentences = [*hypotheses, *chain.from_iterable(references)]
        self.references = np.fromiter(map(len, references), np.int64, self.n)  # [n], how many
        self.image = np.concatenate([np.arange(self.n), np.repeat(np.arange(self.n), self.references)])
        self.lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        self.orders = list(_orders(sentences, self.lengths))


def _orders(sentences: Sequence[Sequence[str]], lengths: Integers) -> Iterator[Counts]:
    tokens = list(chain.from_iterable(sentences))
    numbers = {word: number for number, word in enumerate(dict.fromkeys(tokens))}
    words = np.fromiter(map(numbers.__getitem__, tokens), np.int64, len(tokens))
    sentence = np.repeat(np.arange(len(sentences)), lengths)
    first, gram = np.arange(len(words)), words  # where each n-gram begins, and its number
    for n in range(1, ORDERS + 1):
        if n > 1:  # an n-gram is an (n-1)-gram and the word behind it, in the same sentence
            last = first + n - 1
            inside = last < len(words)
            inside[inside] = sentence[first[inside]] == sentence[last[inside]]
            first, last = first[inside], last[inside]
            gram = np.unique(gram[inside] * len(numbers) + words[last], return_inverse=True)[1]
        grams = int(gram.max(initial=-1)) + 1
        pair, count = np.unique(sentence[first] * grams + gram, return_counts=True)
        yield Counts(pair // max(grams, 1), pair % max(grams, 1), count.astype(np.float64), grams)


def bleu(corpus: Corpus) -> dict[str, Measure]:
    """BLEU-1 to 4 of the corpus (Papineni et al. 2002); the closest reference length, of two as close the shorter."""
    statistics = np.zeros((corpus.n, 2 * ORDERS + 2))  # matches, guesses, lengths of hypotheses and references
    lengths = corpus.lengths[: corpus.n]
    for n, counts in enumerate(corpus.orders):
        of_hypothesis = counts.sentence < corpus.n
        image = corpus.image[counts.sentence]
        key = image * counts.grams + counts.gram
        keys, place = np.unique(key[~of_hypothesis], return_inverse=True)
        most = np.zeros(len(keys) + 1)  # an n-gram's count in the reference that has it most often; at the end a 0
        np.maximum.at(most, place, counts.count[~of_hypothesis])
        allowed = most[_find(keys, key[of_hypothesis])]
        matches = np.minimum(counts.count[of_hypothesis], allowed)
        statistics[:, n] = np.bincount(image[of_hypothesis], matches, corpus.n)
        statistics[:, ORDERS + n] = np.maximum(0, lengths - n)
    apart = np.abs(corpus.lengths[corpus.n :] - lengths[corpus.image[corpus.n :]])
    order = np.lexsort((corpus.lengths[corpus.n :], apart, corpus.image[corpus.n :]))
    closest = order[np.cumsum(corpus.references) - corpus.references]
    statistics[:, -2], statistics[:, -1] = lengths, corpus.lengths[corpus.n :][closest]

    return {f"bleu{order}": Measure(statistics, partial(_bleu, order)) for order in range(1, ORDERS + 1)}


def _bleu(order: int, sums: Array) -> Array:
    precisions = (sums[..., :order] + TINY) / (sums[..., ORDERS : ORDERS + order] + SMALL)
    ratio = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    result: Array = precisions.prod(-1) ** (1 / order) * brevity
    return result


def cider(corpus: Corpus) -> Array:
    """CIDEr-D of each image (Vedantam et al. 2015), x10 as the official script has it. [n]

    Document frequencies are counted over the references that are given, each image being one document.
    """
    total = np.zeros(corpus.n)
    n_references = len(corpus.image) - corpus.n
    lengths = corpus.lengths.astype(np.float64)
    image = corpus.image[corpus.n :]
    gauss = np.exp(-((lengths[: corpus.n][image] - lengths[corpus.n :]) ** 2) / (2 * SIGMA**2))
    for counts in corpus.orders:
        of_hypothesis = counts.sentence < corpus.n
        key = corpus.image[counts.sentence] * counts.grams + counts.gram
        documents = np.bincount(_distinct(key[~of_hypothesis]) % max(counts.grams, 1), minlength=counts.grams)
        idf = np.log(float(corpus.n)) - np.log(np.maximum(1.0, documents))
        weight = counts.count * idf[counts.gram]
        norm = np.sqrt(np.bincount(counts.sentence, weight**2, len(corpus.image)))
        ours = np.append(weight[of_hypothesis], 0.0)
        theirs = weight[~of_hypothesis]
        shared = ours[_find(key[of_hypothesis], key[~of_hypothesis])]
        dot = np.bincount(counts.sentence[~of_hypothesis] - corpus.n, np.minimum(shared, theirs) * theirs, n_references)
        norms = norm[: corpus.n][image] * norm[corpus.n :]
        total += np.bincount(image, gauss * dot / np.where(norms > 0, norms, 1.0), corpus.n)
    return 10 * total / ORDERS / corpus.references


def _distinct(keys: Integers) -> Integers:
    """By sorting: np.unique hashes where it has no more to tell, which is slow for keys that are far apart."""
    ordered = np.sort(keys)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def _find(keys: Integers, wanted: Integers) -> Integers:
    """The place of each wanted key among sorted keys; len(keys) where it isn't there."""
    place = np.searchsorted(keys, wanted)
    there = place < len(keys)
    there[there] = keys[place[there]] == wanted[there]
    return np.where(there, place, len(keys))
