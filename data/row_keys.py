"""What the keys of a row mean: the format that they tell, which of them hold pictures, and what becomes of the others.

A key is read, or harmless (left out and counted), or it carries media or meaning that isn't understood: then its row is
an error. What keys come to is worked out once for rows with the same keys.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# What is read, and the spellings of it, the best one first, without case and separators.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "question": ("question", "query", "problem", "user", "human"),
    "instruction": ("instruction",),
    "prompt": ("prompt",),
    "input": ("input",),
    "answer": (
        *("answer", "multiplechoiceanswer", "answers", "response", "output", "completion", "groundtruth"),
        *("gtanswer", "target", "solution", "assistant", "gpt"),
    ),
    "label": ("label",),
    "captions": ("captions", "caption"),
    "text": ("text", "description", "alttext"),
    "texts": ("texts",),
    "text_list": ("textlist",),
    "image_info": ("imageinfo",),
    "system": ("system", "systemprompt", "systemmessage"),
    "history": ("history",),
    "choices": ("choices", "options"),
    "context": ("context", "hint", "passage"),
}
KNOWN = (
    "messages, conversations, captions, caption, question (or query, instruction, prompt) with answer (or answers, "
    "response, output, completion), texts with images, text_list with image_info, file_name or image with text"
)
OTHERS = "columns: {question: KEY, answer: KEY, image: KEY} names other keys"
LETTERS = tuple("ABCDEFGHIJ")
_MEANINGS = {spelling: meaning for meaning, spellings in SPELLINGS.items() for spelling in spellings}
_PICTURE = re.compile(
    r"(?P<stem>images?|imgs?|pictures?|photos?|pics?|jpe?g|png|webp)(?P<first>\d*)"
    r"(?P<suffix>|paths?|files?|filenames?|filepaths?|names?|urls?|uris?|bytes|base64|b64|list)(?P<last>\d*)"
    r"|(?P<file>filenames?|filepaths?)(?P<number>\d*)"
)
_MEDIA_KEY = re.compile(
    r"(videos?|audios?|sounds?|speech|pointclouds?)(paths?|files?|filenames?|names?|urls?|bytes|frames)?\d*"
)
_PREFERENCE = "this is a preference row, of which one answer is better than another; such rows aren't answers to learn"
_TOOLS = "calls of tools aren't learned; remove it, or the row"
_THOUGHT = "thoughts are learned as part of an answer's text: write <think>...</think> before it, or remove the key"
REFUSED = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "toolcalls": _TOOLS,
    "functioncall": _TOOLS,
    "toolcallid": _TOOLS,
    "reasoningcontent": _THOUGHT,
    "reasoning": _THOUGHT,
    "thinking": _THOUGHT,
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "rejectedresponse": _PREFERENCE,
    "rejectedmessages": _PREFERENCE,
    "rejectedimages": _PREFERENCE,
    "history": "earlier turns belong to a question and its answer; rows of this kind have none",
    "system": "a system text belongs to a chat; rows of this kind have none",
}
WEIGHTS = ("weight", "sampleweight", "lossweight", "lossscale")
# read beside a row's leading keys
_READ = {
    "messages": {"messages", "system", "captions", "answer"},
    "llava": {"conversations", "system"},
    "captions": {"captions", "text", "prompt", "system"},
    "qa": {"question", "instruction", "prompt", "input", "answer", "system", "history", "choices", "context"},
    "documents": {"texts", "text_list", "image_info"},
    "turns": {"texts", "system"},
}


def plain_key(key: Any) -> str:
    """A key without case, spaces, hyphens and underscores: `Image Path` is `image_path`."""
    return re.sub(r"[\s_-]+", "", str(key)).lower()


@dataclass(frozen=True)
class Layout:
    """What rows with the same keys are. format: None where `problem` says why; images: groups of keys that name
    pictures, the best group first, keys of a group in the order of their numbers; keys: of each meaning the row's keys,
    the best first; unread: keys that nothing is read from: the values of `unknown` ones have to be looked at, and those
    of `skipped` ones in rows without a picture."""

    format: str | None
    images: tuple[tuple[str, ...], ...] = ()
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    letters: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    problem: str = ""


@lru_cache(maxsize=4096)
def meaning_of(key: str) -> str | None:
    """What a key is read as: a name of SPELLINGS, or "image"."""
    return _MEANINGS.get(plain_key(key)) or ("image" if _picture_key(key) else None)


def is_picture_key(key: str) -> bool:
    return meaning_of(key) == "image"


@lru_cache(maxsize=4096)
def layout(keys: tuple[str, ...], wanted: str | None = None) -> Layout:
    """What rows with these keys are; wanted: the format that they have to be, where they may be several."""
    by_meaning: dict[str, list[str]] = {}
    for key in keys:
        if (meaning := _MEANINGS.get(plain_key(key))) is not None:
            by_meaning.setdefault(meaning, []).append(key)
    for meaning, some in by_meaning.items():
        some.sort(key=lambda key: SPELLINGS[meaning].index(plain_key(key)))
    images = _picture_groups(keys)
    found = _kinds(by_meaning, bool(images) or wanted == "turns", {plain_key(key) for key in keys})
    chosen = wanted if wanted in found else next(iter(found), None)
    if chosen is None:
        return Layout(None, problem=_problem(keys))
    read = _READ[chosen]
    if chosen == "qa" and not by_meaning.get("answer"):
        read = read | {"label"}
    if chosen == "qa" and not by_meaning.keys() & {"question", "instruction", "prompt", "input"}:
        read = read | {"text"}
    if chosen == "messages" and "captions" in by_meaning:
        by_meaning["captions"] = [key for key in by_meaning["captions"] if key == "captions"]
    if chosen == "messages":
        by_meaning["answer"] = [key for key in by_meaning.get("answer", []) if key == "answers"]
    used = {key for meaning in read for key in by_meaning.get(meaning, ())}
    letters = tuple(letter for letter in LETTERS if letter in keys) if chosen == "qa" else ()
    letters = letters if letters[:2] == LETTERS[:2] else ()
    used |= {*letters, *(key for group in images for key in group)}
    skipped: list[str] = []
    unknown: list[str] = []
    refused: list[tuple[str, str]] = []
    for key in keys:
        if key in used:
            continue
        name = plain_key(key)
        if name in WEIGHTS:
            refused.append((key, "rows can't weigh more or less than others; `weight` of a recipe's data is of all"))
        elif _MEANINGS.get(name, name) in REFUSED:
            refused.append((key, REFUSED[_MEANINGS.get(name, name)]))
        elif _MEDIA_KEY.fullmatch(name):
            refused.append((key, "it holds video or sound, of which nothing is read; leave it or the row out"))
        else:
            (skipped if _is_id(name) else unknown).append(key)
    kept = {meaning: tuple(by_meaning[meaning]) for meaning in by_meaning if meaning in read}
    return Layout(
        chosen, images, kept, letters, tuple(skipped), frozenset([*skipped, *unknown]), tuple(unknown), tuple(refused)
    )


def _is_labelled(meanings: dict[str, list[str]]) -> bool:
    """{"image", "text", "label"}, as POPE's questions are written."""
    return {"text", "label"} <= meanings.keys() and not meanings.keys() & {"question", "instruction", "prompt"}


def _kinds(has: dict[str, list[str]], pictured: bool, names: set[str]) -> list[str]:
    """The formats that these meanings may be, the likeliest first."""
    found = []
    answered = bool(has.get("answer"))
    if "messages" in has:
        found.append("messages")
    if "conversations" in has:
        found.append("llava")
    if ("texts" in has and pictured) or ("text_list" in has and "image_info" in has):
        found += ["documents", "turns"] if "texts" in has else ["documents"]
    asked = bool(has.keys() & {"question", "instruction"})
    if has.get("question") and plain_key(has["question"][0]) in ("user", "human") and not answered:
        asked = "instruction" in has  # a column of names
    answered = answered or (asked and "label" in has)
    preferred = has.keys() & {"prompt", "input"} and names & {"chosen", "rejected"}
    asked = asked or bool(preferred) or (answered and bool(has.keys() & {"prompt", "input", "text"}))
    if asked or (_is_labelled(has) and pictured):
        found.append("qa")
    spoken = "text" in has and pictured and not asked and not names & {"questionid", "answerid", "label"}
    if "captions" in has or spoken:
        found.append("captions")
    return found


def _problem(keys: tuple[str, ...]) -> str:
    names = {plain_key(key) for key in keys}
    shown = ", ".join(map(str, keys))[:200] or "none"
    if "text" in names and names & {"questionid", "answerid"}:
        return (
            f"text beside question_id is a question without an answer (keys: {shown}), of which nothing can be "
            f"learned; {OTHERS}"
        )
    return f"unknown kind of row (keys: {shown}); known: {KNOWN}; {OTHERS}"


def _picture_key(key: str) -> tuple[int, str, int] | None:
    """How good a name of pictures a key is (0: the best), its name without numbers, and its number."""
    name = plain_key(key)
    found = _PICTURE.fullmatch(name)
    if found is None:
        return (1, "_file_name", 0) if re.search(r"_file_?names?$", key.lower()) else None
    if found["file"]:
        return 1, found["file"], int(found["number"] or 0)
    number = int(found["first"] or found["last"] or 0)
    kind = found["suffix"]
    return 2 if kind.startswith("ur") else 1 if kind not in ("", "list") else 0, found["stem"] + kind, number


def _picture_groups(keys: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[int, str], list[tuple[int, int, str]]] = {}
    for place, key in enumerate(keys):
        if key in LETTERS or _MEANINGS.get(plain_key(key)):
            continue
        if (told := _picture_key(key)) is not None:
            rank, stem, number = told
            # `file_name` and `left_file_name` are columns of one image folder
            name = "_file_name" if stem == "filename" and any(_is_folder_key(other) for other in keys) else stem
            groups.setdefault((rank, name), []).append((number, place, key))
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return tuple(tuple(key for _, _, key in sorted(group)) for _, group in ordered)


def _is_folder_key(key: str) -> bool:
    return re.search(r"._file_?names?$", key.lower()) is not None


def _is_id(name: str) -> bool:
    """Whatever such a key holds, it isn't shown or said."""
    return name.endswith("id") or name in ("key", "index", "idx", "hash", "sha256", "md5", "phash")
