"""ROUGE-L as the COCO script computes it (Lin 2004): longest common subsequences, bit-parallel."""

from collections.abc import Sequence

BETA = 1.2


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F with beta 1.2 of the best precision and the best recall, which may be of two references."""
    masks: dict[str, int] = {}
    for place, word in enumerate(hypothesis):
        masks[word] = masks.get(word, 0) | 1 << place
    common = [(_common(masks, len(hypothesis), reference), len(reference)) for reference in references]
    if not hypothesis or not max(shared for shared, _ in common):
        return 0.0
    precision = max(shared for shared, _ in common) / len(hypothesis)
    recall = max(shared / length for shared, length in common if length)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(masks: dict[str, int], length: int, words: Sequence[str]) -> int:
    """The length of the longest common subsequence (Hyyro 2004): a 0 in `row` is a place where it grows."""
    row = everything = (1 << length) - 1
    for word in words:
        matches = row & masks.get(word, 0)
        if matches:
            row = (row + matches) | (row - matches)
    return length - (row & everything).bit_count()
