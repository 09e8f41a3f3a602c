"""How the official VQA script normalises an answer, quirks included: a score that differs from it is no score."""

import re
from functools import lru_cache

NUMBER_WORDS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
# the script means a look-behind, writes another thing, and so takes every period that no digit follows
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = 32  # it passes re.UNICODE, which is 32, where `count` stands
_DIGIT_COMMA = re.compile(r"\d,\d")

# word: contraction, as the script lists them; keys with capitals never match, since the words are lower case by then
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't
mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at
'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd
someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll
whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
youve:you've
""".split()
)


def clean(text: str) -> str:
    """What is done to every answer, normalised or not."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process(text: str) -> str:
    """Punctuation, lower case, number words, articles, contractions, in this order."""
    words = [NUMBER_WORDS.get(word, word) for word in _punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _punctuation(text: str) -> str:
    out = text
    for mark in PUNCTUATION.intersection(text):
        goes = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        out = out.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", out, count=_PERIODS_AT_MOST) if "." in out else out


@lru_cache(1 << 18)
def evalai(text: str) -> str:
    """An answer as the EvalAI server processes it, and LLaVA's converters: commas, question marks and ' before s go
    first."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return process(clean(words))
