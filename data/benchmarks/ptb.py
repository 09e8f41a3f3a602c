"""Penn Treebank tokenisation of captions without Java, after Stanford's PTBTokenizer (CoreNLP 3.4.1, -lowerCase).

Its output is that of the Java program on captions as people write them. Known differences: smileys, fractions and
telephone numbers of rarer forms, several slashes or marks between words without a space, and abbreviations that are
not in the list below.
"""

import re
from functools import lru_cache

# The tokens that the COCO script drops. It names brackets in capitals, so that -lrb- in small letters stays.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

# a full stop behind these is a part of them: always; where they begin with a capital; before a number
_ABBREVIATIONS = """mr mrs ms dr prof rev gen sen rep gov sgt capt col lt cmdr maj adm hon pres messrs st ste mt ft jr
    sr bros co corp inc ltd dept univ ave blvd rd vs v etc al est ph.d jan feb mar apr jun jul aug sept sep oct nov dec
    mon tue tues wed thu thurs fri ala ariz calif colo conn dak fla ga ind kan ky md mich minn mont neb nev okla penn
    tenn va vt wis wyo cf sq bldg assn ext""".split()
_CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash".split()
_BEFORE_NUMBERS = "no nos ca fig pp art op".split()
_REWRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"} | {
    "\u00a3": "#",
    "\u20ac": "$",
    "\u00a4": "$",
    "\u00a2": "cents",
}
_TWO_WORDS = re.compile(r"(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(lem)(me)|(gim)(me)|('t)(is|was)|(more)('n)", re.I)
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": " ... ",
        "\u00bd": " 1/2 ",
        "\u00bc": " 1/4 ",
        "\u00be": " 3/4 ",
        "\u00a0": " ",
    }
)
_ENTITIES = re.compile("&(amp|lt|gt|quot|apos|nbsp);", re.I)
_MEANT = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " "}
_RARE = re.compile("[\U00010000-\U0010ffff]")  # the program can't read these, and drops them

_TOKEN = re.compile(
    "|".join(
        (
            r"</?[a-z!][^<>]*>",
            r"(?:https?://|www\.)[^\s\"<>()]+[^\s\"<>().,!?;:']",
            r"[\w.-]+@[\w.-]*\w",
            r"[:;=]-?[()](?![\w])",
            r"[#@][a-z_]\w*",
            rf"(?<!\w)(?:{'|'.join(map(re.escape, _ABBREVIATIONS))})\.(?!\w)",
            rf"(?<!\w)(?-i:{'|'.join(_CAPITALISED)})\.(?!\w)",
            rf"(?<!\w)(?:{'|'.join(_BEFORE_NUMBERS)})\.(?=\s*\d)",
            r"(?<!\w)(?:[a-z]\.)+(?:[a-z](?!\w))?",  # u.s., p.m, a.
            r"[^\W\d]+\.(?=,)",
            r"'n'(?!\w)|'(?:tis|twas|em|cause|til)(?!\w)|'\d\ds?(?!\w)",
            r"n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)",
            r"(?:(?<!\w)[-+]?|\+|[-+]?[.,:])\d+(?:[,.:/-]\d+)*(?![\w]|-\w)",
            r"(?<!\w)(?:o'[a-z]{2,}|d'(?:oh|ye)|ma'am|more'n)(?!\w)|y'(?=all\b)",
            r"(?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)",
            r"[^\W_]+(?:\.[^\W_]+)+(?![-\w])",  # sentence.the, the program takes for an address
            r"[^\W\d_]+(?:[!?]|[.,]-)[^\W\d_]+",  # and these, too
            r"\w+(?:[-/]\w+)*?(?=n't(?!\w))|[^\W_](?:\w*[^\W_])?(?:-\w+|/[^\W\d]\w*)*",
            r"\.{2,}|-{2,}|[!?]{2,}|''|``|\*+|#+|<<|>>|_+|\S",
        )
    ),
    re.I,
)


@lru_cache(1 << 16)
def tokenize(caption: str) -> str:
    """The caption's words in small letters, separated by one space, without punctuation."""
    text = _RARE.sub("", _ENTITIES.sub(lambda found: _MEANT[found[1].lower()], caption)).translate(_CHARACTERS)
    return " ".join(token for token in _tokens(text) if token and token not in PUNCTUATION)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    for token in _TOKEN.findall(text):
        two = _TWO_WORDS.fullmatch(token)
        if two:
            tokens += [part.lower() for part in two.groups() if part]
        elif token[0] in ":;=" and len(token) > 1:
            tokens.append("".join(_REWRITTEN.get(character, character) for character in token.lower()))
        elif token == '"' or (token[0] in ".-" and len(set(token)) == 1):
            continue  # these are made quotes, an ellipsis or a dash, and dropped as such
        else:
            tokens.append(_REWRITTEN.get(token, token.lower()))
    return tokens
