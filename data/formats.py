"""Rows of the formats that people have -> Records. The format of a row is read off its keys."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.records import IMAGE_PART, ROLES, Message, Record, make_record, text_part
from vlm.errors import UserError

CAPTION_PROMPT = "describe the picture."
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
_LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def row_format(row: Any) -> str | None:
    """The name of a row's format."""
    if isinstance(row, dict):
        for key, (name, beside) in _KEYS.items():
            if key in row and (not beside or beside in row):
                return name
    return None


def read_row(row: Any, where: str, root: Path, format: str | None = None) -> Record:
    """One parsed row -> Record; UserError with `where` for anything that isn't sound. format: what it has to be."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object, not {type(row).__name__}")
    name = row_format(row)
    if name is None:
        keys = ", ".join(map(str, row))[:200] or "none"
        raise UserError(f"{where}: unknown kind of row (keys: {keys}); known: {', '.join(_KEYS)}")
    if format is not None and name != format:
        raise UserError(f"{where}: a row of {name}, where {format} is read")
    return ROW_FORMATS[name](row, where, root)


def _messages(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"messages": [{"role", "content": text or [{"type": "text", "text"}, {"type": "image", "image"}]}]}

    Image parts without a name take the next of the row's "images"; "captions" are answers as right as the last one.
    """
    if not isinstance(row["messages"], list):
        raise UserError(f"{where}: messages must be a list")
    given = row.get("images") or []
    if not isinstance(given, list):
        raise UserError(f"{where}: images must be a list, not {type(given).__name__}")
    rest = iter(given)
    images: list[Any] = []
    messages: list[Message] = []
    for number, message in enumerate(row["messages"], start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} needs a role of {', '.join(ROLES)}")
        content = _parts(message.get("content"), f"{where}: message {number}", images, rest)
        messages.append({"role": message["role"], "content": content})
    images += rest  # to be missed by a placeholder
    captions = row.get("captions") or []
    if not isinstance(captions, list) or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{where}: captions must be a list of texts, none empty")
    return make_record(where, messages, images, root, captions)


def _parts(content: Any, where: str, images: list[Any], rest: Iterator[Any]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be text or a list of parts, not {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            named = part.get("image")
            images.append(next(rest, None) if named is None else named)
            parts.append(IMAGE_PART)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(text_part(part["text"]))
        else:
            raise UserError(f"{where}: a part is of type text (with a text) or image, got {str(part)[:80]}")
    return parts


def _llava(row: dict[str, Any], where: str, root: Path) -> Record:
    """LLaVA: {"image": path or list, "conversations": [{"from": human|gpt, "value": "<image>\\n..."}]}

    An image stays where its mark stands; LLaVA's own loader moves it to the front of its turn.
    """
    images = _images(row)
    messages: list[Message] = []
    if not isinstance(row["conversations"], list):
        raise UserError(f"{where}: conversations must be a list")
    for number, turn in enumerate(row["conversations"], start=1):
        try:
            role, text = _LLAVA_ROLES[turn["from"]], turn["value"]
        except (KeyError, TypeError):
            role, text = "", None
        if not isinstance(text, str):
            raise UserError(f"{where}: turn {number} needs a 'from' of human or gpt and a text 'value'")
        content = _split_marks(text) if role == "user" else [text_part(text)]
        messages.append({"role": role, "content": content})
    return make_record(where, messages, images, root)


def _split_marks(text: str) -> list[dict[str, str]]:
    if "<image>" not in text:
        return [text_part(text)]
    parts: list[dict[str, str]] = []
    first, *pieces = text.split("<image>")
    pieces = [first, *(piece.removeprefix("\n") for piece in pieces)]
    for position, piece in enumerate(pieces):
        if position:
            parts.append(IMAGE_PART)
        if piece := piece if position == len(pieces) - 1 else piece.removesuffix("\n"):
            parts.append(text_part(piece))
    return parts


def _captions(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"image", "caption": text} or {"image", "captions": [text, ...]}; "text" is a caption in image folders."""
    captions = row.get("captions", row.get("caption", row.get("text")))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise UserError(f"{where}: captions must be one text or a list of them, none empty")
    prompt = CAPTION_PROMPT if row.get("prompt") is None else row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt must be a text, not {type(prompt).__name__}")
    messages = [
        {"role": "user", "content": [IMAGE_PART, text_part(prompt)]},
        {"role": "assistant", "content": [text_part(captions[0])]},
    ]
    return make_record(where, messages, [row.get("image", row.get("file_name"))], root, captions)


def _question(row: dict[str, Any], where: str, root: Path) -> Record:
    """{"image" (optional, or "images"), "question", "answer" or "answers"}

    Of several people's answers the most frequent one is learned, the first of these where there are several.
    """
    question, answer = row["question"], row.get("answer", row.get("answers"))
    if isinstance(answer, list):
        answer = most_frequent(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: question and answer must be texts")
    images = _images(row)
    messages = [
        {"role": "user", "content": [*([IMAGE_PART] * len(images)), text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]
    return make_record(where, messages, images, root)


def most_frequent(answers: list[Any]) -> str | None:
    """The answer that most people gave, of texts or {"answer": text}; None where they're something else, or none."""
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    given = [text for text in texts if isinstance(text, str)]
    if not given or len(given) < len(texts):
        return None
    return Counter([text for text in given if text.strip()] or [""]).most_common(1)[0][0]


def _images(row: dict[str, Any]) -> list[Any]:
    named = (row[key] for key in ("image", "images", "file_name") if row.get(key) is not None)
    images: Any = next(named, [])
    return images if isinstance(images, list) else [images]


def _document(row: dict[str, Any], where: str, root: Path) -> Record:
    """OBELICS: {"images": [path or null, ...], "texts": [text or null, ...]}, of each position one is there."""
    images, texts = row["images"], row["texts"]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise UserError(f"{where}: images and texts must be lists of the same length")
    parts: list[dict[str, str]] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None) or not isinstance(text, str | None):
            raise UserError(f"{where}: position {number} needs an image or a text, and null for the other")
        parts.append(IMAGE_PART if text is None else text_part(text))
    return _make_document(where, parts, [image for image in images if image is not None], root)


def _matched_document(row: dict[str, Any], where: str, root: Path) -> Record:
    """MMC4: {"text_list": [text, ...], "image_info": [{"image_name", "matched_text_index"}]}, images before texts."""
    texts, infos = row["text_list"], row["image_info"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not isinstance(infos, list):
        raise UserError(f"{where}: text_list must be a list of texts, and image_info a list")
    before: list[list[Any]] = [[] for _ in texts]
    for number, info in enumerate(infos):
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(place) is not int or not 0 <= place < len(texts):
            raise UserError(f"{where}: image {number} needs a matched_text_index from 0 to {len(texts) - 1}")
        before[place].append(info.get("image_name"))
    parts = [
        part
        for text, names in zip(texts, before, strict=True)
        for part in (*[IMAGE_PART] * len(names), text_part(text))
    ]
    return _make_document(where, parts, [name for names in before for name in names], root)


def _make_document(where: str, parts: list[dict[str, str]], images: list[Any], root: Path) -> Record:
    return make_record(where, [{"role": "document", "content": parts}], images, root, kind="document")


def _documents(row: dict[str, Any], where: str, root: Path) -> Record:
    return _document(row, where, root) if "texts" in row and "images" in row else _matched_document(row, where, root)


ROW_FORMATS: dict[str, Callable[[dict[str, Any], str, Path], Record]] = {
    "messages": _messages,
    "llava": _llava,
    "captions": _captions,
    "qa": _question,
    "documents": _documents,
}
# The key that tells a format, and what must stand beside it.
_KEYS = {
    "messages": ("messages", ""),
    "conversations": ("llava", ""),
    "captions": ("captions", ""),
    "caption": ("captions", ""),
    "question": ("qa", ""),
    "texts": ("documents", "images"),
    "text_list": ("documents", "image_info"),
    "file_name": ("captions", "text"),
    "text": ("captions", "image"),
}
