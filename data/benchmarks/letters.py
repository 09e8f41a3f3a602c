"""Letters of choices, read from what a model says: as LLaVA does for ScienceQA, as VLMEvalKit does for MMBench."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase

# what LLaVA's script reads a letter from, then what people take for an answer, too
_LETTER = re.compile(r"([A-Z])(?:\. .*)?", re.DOTALL)
_SENTENCE = re.compile(r"The answer is:? ([A-Z])\b")
_BARE = re.compile(
    r"\W*(?P<named>(?:the |my )?(?:final |correct |right |best )*(?:answer|option|choice)(?: is)?:? *"
    r"(?:option |choice )?)?"
    r"[(\[*\"'`]*(?P<letter>[a-z])[)\]*\"'`\u201d\u2019.:,;!]*(?P<rest>[\s.].*)?",
    re.IGNORECASE | re.DOTALL,
)
# "A dog" begins with an article, "A is a dog" doesn't: these words follow none
_VERBS = "is|was|are|does|did|has|have|had|would|could|should|must|cannot|seems|looks|appears"
_ARTICLE = re.compile(
    rf"a +(?!(?:(?:best|better|most|also|clearly|closely|correctly|accurately|definitely|probably|likely|obviously) +)*"
    rf"(?:{_VERBS}|can be|can not|will be|will not|may be|might be|matches|fits|shows|describes|depicts|represents|"
    r"indicates|identifies|explains|answers|states|says|contains|includes|refers|corresponds|belongs|makes|gives|"
    r"because|since|as|for|from|in|of|on|with|by|and|or|but|not|if|when|where|which|who|the|this|that|these|those|it)"
    r"\b(?!-))\w",
    re.IGNORECASE,
)
# behind a letter: another one, or that it isn't the answer
_TAKEN_BACK = (
    rf"(?i:(?:(?:{_VERBS})\b\W*)?(?:not|wrong|incorrect|cannot)\b|"
    r"(?:is|was|does|did|has|would|could|should|ca)n['\u2019]t\b)"
)
_DOUBT = re.compile(rf"\W*(?:(?:or|and)\W+\(?[A-Za-z]\b|[B-Z]\b|A\W*$|{_TAKEN_BACK})")
_OTHER_LETTER = re.compile(r"[ ,/&*)\]]*(?:(?:(?:or|and|maybe) +)+[(\[*]*[A-Za-z]|[(\[*]*[A-Z])\b(?! +[a-z])")
# in the clause of a letter or of the words of a choice: that it isn't the answer, or that there is none
_DENIED_AFTER = re.compile(rf"[^\w.,;:!?\n]*{_TAKEN_BACK}")
_DENIED_BEFORE = re.compile(
    r"\b(?:no|not|never|neither|nor|cannot|unable|without|sorry|unsure|unclear|except|rather than)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
_A_WORD = re.compile(r"\bA +\w", re.IGNORECASE)
_CLAUSE = re.compile(r"[.,;:!?\n]|\bbut\b")
_PRONOUN = re.compile(r"\bI +[a-z]")  # the word I
# VLMEvalKit's: what parts words, how far from the end a letter may be, what it takes for a refusal
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_REFUSALS = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"answer\s+is\s*:?\s*[(\[*]*([A-Z])\b", re.IGNORECASE)


def read_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names, or that of the choice whose words it is; None where it names none of them."""
    letters = ascii_uppercase[: len(choices)]
    if (found := _leading(answer)) and found in letters:
        return found
    if named := set(_SENTENCE.findall(answer)):
        return named.pop() if len(named) == 1 and named <= set(letters) else None
    return _read_plainly(answer.strip(), dict(zip(letters, choices, strict=True)))


def read_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, read as VLMEvalKit does (can_infer) before it asks a model.

    A letter alone among the last four words, or behind "answer is"; else the one option whose text is in the answer.
    Otherwise than there an article, a letter or a text that is denied, and two letters in "the answer is A or B" name
    nothing, and "(b)" or "Answer: b" are read as for ScienceQA.
    """
    if any(phrase in answer for phrase in _REFUSALS):
        return None
    if (found := _leading(answer)) and found in options:
        return found
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words and (letter != "I" or not _PRONOUN.search(answer))]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS and _is_meant(answer, named[0]):
        return named[0]
    told = [match for match in _ANSWER_IS.finditer(answer) if _is_letter(answer, match.start(1), match.end())]
    letters = {match[1].upper() for match in told}
    if len(letters) == 1 and letters <= set(options) and not any(_OTHER_LETTER.match(answer, m.end()) for m in told):
        return letters.pop()
    plain, text = _read_plainly(answer.strip(), options), _read_text(answer, options)
    if plain == "A" and (found_a := _A_WORD.search(answer)):
        # the A of "Answer: A blue car" is an article where another option is "a blue car", or "blue car"
        behind = answer[found_a.start() :].lower()
        begun = [letter for letter, choice in options.items() if _begins(behind, choice) or _begins(behind[2:], choice)]
        return begun[0] if len(begun) == 1 else text or plain
    return plain or text


def _leading(answer: str) -> str | None:
    """LLaVA's "B" or "B. anything"."""
    found = _LETTER.fullmatch(answer.strip())
    return found[1] if found else None


def _read_plainly(text: str, options: Mapping[str, str]) -> str | None:
    """A letter with or without marks and words before it, or an option's own words."""
    found = _BARE.fullmatch(text)
    letter = found["letter"].upper() if found else None
    if letter in options and found and not (found["rest"] or "").strip(" ."):
        return letter
    same = [name for name, choice in options.items() if _plain(choice) == _plain(text)]
    if len(same) == 1:
        return same[0]
    if found is None or letter not in options or _DOUBT.match(found["rest"] or ""):
        return None
    if _PRONOUN.match(text, found.start("letter")):
        return None
    # "Answer: A dog" is A, "Answer: a dog" isn't
    if _ARTICLE.match(text, found.start("letter")) and not (found["named"] and found["letter"] == "A"):
        return None
    return letter


def _read_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text is in an answer that is at most twice as long as all of them together."""
    text = answer.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    held = [(letter, found) for letter, choice in options.items() if (found := _words(choice).search(text))]
    if len(held) != 1:
        return None
    letter, found = held[0]
    return None if _is_denied(text, *found.span()) else letter


def _begins(text: str, choice: str) -> bool:
    return bool(_words(choice).match(text.lstrip()))


@lru_cache(1 << 16)
def _words(choice: str) -> re.Pattern[str]:
    """The text of a choice as words and numbers of their own, perhaps in the plural: "no" isn't in "cannot"."""
    return re.compile(rf"(?<![a-z0-9])(?<!\d[.,]){re.escape(choice.lower())}(?:e?s)?(?![a-z0-9]|[.,]\d)")


def _is_meant(answer: str, letter: str) -> bool:
    """Whether a letter that is a word of an answer is the option's, wherever it stands there."""
    places = re.finditer(rf"(?<![^\s.()\[\],:;!*#{{}}]){letter}(?![^\s.()\[\],:;!*#{{}}])", answer)
    return all(_is_letter(answer, place.start(), place.end()) for place in places)


def _is_letter(answer: str, start: int, end: int) -> bool:
    """Not an article, nor the word I, nor denied."""
    word = _ARTICLE if answer[start] in "Aa" else _PRONOUN
    return not word.match(answer, start) and not _is_denied(answer, start, end)


def _is_denied(answer: str, start: int, end: int) -> bool:
    before = _CLAUSE.split(answer[:start])[-1]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_AFTER.match(answer, end))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
