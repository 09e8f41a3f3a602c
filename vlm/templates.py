"""Chat templates of other people's tokenizers, made to take the messages that are sent here: text and images in parts.

What is added is Jinja in front of the template, so that transformers, vLLM and everything here render the same prompt.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm.errors import UserError, first_line

# LLaVA's code tokenises the stretches between images alone, and some tokenizers put a space before the first word of
# each; `fit_template` sets it where a tokenizer doesn't put it there by itself.
GAP = "{%- set gap = '' -%}"
# Vicuna's turns, images first, each on a line of its own; for tokenizers that bring no template, too.
VICUNA = (
    GAP + "{%- for message in messages -%}"
    "{%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>' + gap + '\n' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- eos_token if message.role == 'assistant' else ' ' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
# LLaVA 1.5's conv_vicuna_v1 (llava/conversation.py); a system text of the conversation takes the fixed one's place.
VICUNA_V1 = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}"
    '{{- "The assistant gives helpful, detailed, and polite answers to the user\'s questions. " -}}'
    "{%- endif -%}" + VICUNA
)
# A template that says so may leave out what users and systems write; one that does it unsaid is refused.
LEAVES_OUT_PROMPTS = "{#- leaves out prompts -#}"
# A template that says so ends its answers by a newline, which is learned, and not by a control token.
ENDS_IN_NEWLINE = "{#- answers end in a newline -#}"
# LLaVA's pretraining (conv_llava_plain and preprocess_plain): the images, the caption, a line's end; no prompts.
LLAVA_PLAIN = (
    LEAVES_OUT_PROMPTS + ENDS_IN_NEWLINE + GAP + "{%- set shown = namespace(gap=gap) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' and message.content is not string -%}"
    "{%- for part in message.content if part.type == 'image' -%}"
    "{{- '<image>' -}}{%- set shown.gap = gap -%}{%- endfor -%}"
    "{%- elif message.role == 'assistant' -%}{{- shown.gap -}}{%- set shown.gap = '' -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- '\n' -}}{%- endif -%}{%- endfor -%}"
)
# OpenAI's ChatML as Qwen2.5 and others have it, without a system text of its own; images where they stand.
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{{- part.text if part.type == 'text' else '<image>\n' -}}{%- endfor -%}"
    "{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SUPPLIED: dict[str, str] = {"vicuna_v1": VICUNA_V1, "plain": LLAVA_PLAIN, "chatml": CHATML}
MARK = "\ue000"
OPEN = (
    "{%- set chat = namespace(messages=[], said=[]) -%}"
    "{%- for message in messages -%}{%- if message.content is string -%}"
)
CLOSE = "{%- endif -%}{%- endfor -%}{%- set messages = chat.messages -%}"
KEEP = "{%- set chat.messages = chat.messages + [message] -%}"
TEXT_TO_PARTS = (
    "{%- set chat.messages = chat.messages + "
    "[dict(message, content=[{'type': 'text', 'text': message.content}])] -%}{%- else -%}" + KEEP
)
# as vLLM flattens parts for templates that take text alone: images first, a line each
PARTS_TO_TEXT = (
    KEEP + "{%- else -%}{%- set chat.said = [] -%}"
    "{%- for part in message.content if part.type == 'image' -%}"
    "{%- set chat.said = chat.said + ['IMAGE'] -%}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- set chat.said = chat.said + [part.text] -%}{%- endfor -%}"
    "{%- set chat.messages = chat.messages + [dict(message, content=chat.said | join('\n'))] -%}"
)

# what a model is to say behind its answers; without it nothing teaches it to stop
WITH_ENDS = (
    "{%- set chat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.role != 'assistant' -%}" + KEEP + "{%- elif message.content is string -%}"
    "{%- set chat.messages = chat.messages + [dict(message, content=message.content + eos_token)] -%}"
    "{%- else -%}{%- set last = message.content[-1] -%}"
    "{%- set chat.messages = chat.messages + "
    "[dict(message, content=message.content[:-1] + [dict(last, text=last.text + eos_token)])] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = chat.messages -%}"
)


def find_template(wanted: str) -> str:
    """A chat template by the name of a supplied one, by a file of Jinja, or as Jinja itself."""
    if wanted in SUPPLIED:
        return SUPPLIED[wanted]
    if "{{" in wanted or "{%" in wanted:
        return wanted
    path = Path(wanted)
    if path.suffix != ".jinja" and not path.is_file():
        raise UserError(f"no chat template is called {wanted!r}; known: {', '.join(SUPPLIED)}, a .jinja file, or Jinja")
    return read_template(path)


def read_template(path: Path) -> str:
    """The text of a chat template's file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def leaves_out_prompts(template: str | None) -> bool:
    """Whether a template leaves out what users and systems write, and says so."""
    return template is not None and LEAVES_OUT_PROMPTS in template


def ends_in_newline(template: str | None) -> bool:
    """Whether a template says that its answers end in a newline, not in a control token."""
    return template is not None and ENDS_IN_NEWLINE in template


def fit_template(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """The template, able to take messages of text alone and of parts, with the tokenizer's beginning and with ends.

    A template that knows one kind of message gets the other kind turned into it; one that leaves out the token that the
    tokenizer puts at the beginning gets it, and so does one without a control token behind answers (llava-hf's).
    LLaVA's own templates set images apart as LLaVA's code does. UserError when it renders neither kind.
    """
    template = template.replace(GAP, GAP.replace("''", f"'{_gap(tokenizer, image_token)}'"))
    text, parts = (_rendered(template, tokenizer, content) for content in (MARK, [{"type": "text", "text": MARK}]))
    if text is None and parts is None:
        raise UserError("the chat template can't render a message of a user; give another one")
    if text is None:
        template = OPEN + TEXT_TO_PARTS + CLOSE + template
    elif parts is None or not _shows_images(template, tokenizer, image_token):
        template = OPEN + PARTS_TO_TEXT.replace("IMAGE", image_token) + CLOSE + template
    if not _shows_images(template, tokenizer, image_token):
        raise UserError(f"the chat template shows no images (it writes no {image_token}); give another one")
    if tokenizer.eos_token is not None and not ends_in_newline(template) and not _ends(template, tokenizer):
        template = WITH_ENDS + template
    begin = tokenizer.bos_token
    said = str(parts or text)
    adds = begin is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if not adds or said.startswith(begin):
        return template
    # some tokenizers put a space before the first word, but not behind a token that stands in the text
    wanted = tokenizer(said).input_ids
    for space in ("", " "):
        made = tokenizer(begin + space + said, add_special_tokens=False).input_ids
        if made == wanted[: len(made)]:  # an end may be added, too
            return f"{{{{- bos_token + '{space}' -}}}}" + template
    raise UserError(
        f"the tokenizer begins a chat in a way that {begin} before the chat template doesn't; give another one"
    )


def _gap(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """What makes the text behind an image a text of its own, as it is where it stands alone."""
    image = tokenizer.convert_tokens_to_ids(image_token)
    texts = ("\na", "a")
    alone = [[image, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    for gap in ("", " "):
        made = [tokenizer(image_token + gap + text, add_special_tokens=False).input_ids for text in texts]
        if made == alone:
            return gap
    return ""


def _shows_images(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    said = _rendered(template, tokenizer, [{"type": "image"}, {"type": "text", "text": MARK}])
    return said is not None and said.count(image_token) == 1


def _ends(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a control token follows an answer."""
    question, answer = ([{"type": "text", "text": words}] for words in ("a", MARK))
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        said = str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))
    except Exception as error:  # templates raise whatever they like
        raise UserError(f"the chat template can't render an answer ({first_line(error)}); give another one") from error
    behind = said.partition(MARK)[2]
    return any(token.content in behind for token in tokenizer.added_tokens_decoder.values())


def _rendered(template: str, tokenizer: PreTrainedTokenizerBase, content: Any) -> str | None:
    """None where the text doesn't come out, or comes out as Python would print the parts."""
    chat = [{"role": "user", "content": content}]
    if leaves_out_prompts(template):
        chat.append({"role": "assistant", "content": content})
    try:
        said = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception:  # templates raise whatever they like: this kind of message isn't theirs
        return None
    assert isinstance(said, str)
    return said if MARK in said and "'type'" not in said else None
