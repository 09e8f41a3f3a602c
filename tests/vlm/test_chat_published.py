"""Random conversations (five hundred in the slow tier) under every supplied and published template: transformers' ids,
and an oracle's mask that looks for the assistants' words in the rendered text.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.vlm.published import FAMILIES, Family, make_tokenizer
from vlm.chat import ChatEncoder
from vlm.errors import UserError
from vlm.templates import SUPPLIED, find_template, fit_template

Chat = list[dict[str, Any]]
CONVERSATIONS = [40, pytest.param(500, marks=pytest.mark.slow)]
PER_IMAGE = 3
WORDS = [
    "hello",
    "what",
    "a",
    "<b>",
    "user",
    "assistant:",
    "[INST]",
    "\n",
    "\n\n",
    "  ",
    "1 + 1 = 2",
    "(x)",
    "Qwen",
    "ab",
]
SUPPLIED_WITH = {"vicuna_v1": "vicuna", "plain": "vicuna", "chatml": "qwen2.5"}


@cache
def tokenizer_of(name: str) -> Any:
    return make_tokenizer(FAMILIES[name])


def conversation(rng: random.Random, family: Family) -> tuple[Chat, list[str]]:
    """Messages, and what the assistants say: a word of its own in each answer, at its beginning and end."""

    def words() -> str:
        words = [rng.choice(harmless) for _ in range(rng.randint(1, 6))]
        return " ".join(["so", *words, "then"])

    harmless = [word for word in WORDS if word not in family.control]
    chat: Chat = []
    answers = []
    if family.system and rng.random() < 0.3:
        chat.append({"role": "system", "content": [{"type": "text", "text": words()}]})
    for number in range(rng.randint(1, 4)):
        shown = [{"type": "image"}] * rng.choice([0, 0, 1, 2])
        asked = [*shown, {"type": "text", "text": words()}]
        answers.append(f"zq{number}qz {words()} qz{number}zq")
        chat.append({"role": "user", "content": asked})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return chat, answers


def flat(chat: Chat) -> Chat:
    """As for templates of text: images first, a line each."""
    return [
        {
            "role": message["role"],
            "content": "\n".join(
                ["<image>"] * sum(part["type"] == "image" for part in message["content"])
                + [part["text"] for part in message["content"] if part["type"] == "text"]
            ),
        }
        for message in chat
    ]


def oracle(
    tokenizer: Any, rendered: str, answers: list[str], prompts: list[str], ends: str
) -> tuple[list[int], list[bool]]:
    """The tokenizer's own ids of the rendered text; True for tokens that end behind a generation prompt and within the
    answer to it, and for the end of its turn, the control token right behind it, or the text `ends`.

    prompts: what is rendered of the chat before each answer, with the generation prompt; ends: text that ends answers.
    """
    closing = set(tokenizer.added_tokens_decoder) - {tokenizer.convert_tokens_to_ids("<image>")}
    spans = []
    for answer, prompt in zip(answers, prompts, strict=True):
        assert rendered.startswith(prompt)
        assert rendered.count(answer) == 1
        stop = rendered.index(answer) + len(answer)
        assert rendered.startswith(ends, stop)
        spans.append((len(prompt), stop + len(ends)))
    control = set(tokenizer.added_tokens_decoder)
    read = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    mask: list[bool] = []
    ended = False
    for token, (start, stop) in zip(read.input_ids, read.offset_mapping, strict=True):
        said = any(begin < stop <= end for begin, end in spans)
        if token in closing:  # only the first one behind an answer ends it
            said = said or (not ended and any(end <= start and not rendered[end:start].strip() for _, end in spans))
        ended = token in control
        mask.append(said)
    return read.input_ids, mask


def compare(encoder: ChatEncoder, chat: Chat, written: Chat, template: str, answers: list[str], ends: str = "") -> None:
    """written: the chat as the template takes it."""

    def render(messages: Chat, add_generation_prompt: bool = False) -> str:
        words: str = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return words.replace("<image>", "<image>" * PER_IMAGE)

    tokenizer = encoder.tokenizer
    images = sum(part["type"] == "image" for message in chat for part in message["content"])
    tokens = encoder.encode(chat, [PER_IMAGE] * images)
    asked = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    prompts = [render(written[:number], add_generation_prompt=True) for number in asked]
    ids, mask = oracle(tokenizer, render(written), answers, prompts, ends)
    assert tokens.input_ids == ids
    assert tokens.supervised == mask
    for number in asked:
        check_what_must_be_generated(encoder, chat[: number + 1])
    with pytest.MonkeyPatch.context() as patch:  # as where people have written control tokens
        patch.setattr(ChatEncoder, "_read_at_once", lambda *_: None)
        assert encoder.encode(chat, [PER_IMAGE] * images) == tokens


def check_what_must_be_generated(encoder: ChatEncoder, chat: Chat) -> None:
    """The prompt for an answer and what is learned of the answer are the whole, up to what the template puts behind its
    end: else a model would have to say something that it was never taught."""
    parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
    counts = [PER_IMAGE] * sum(part["type"] == "image" for part in parts)
    prompt = encoder.encode(chat[:-1], counts, add_generation_prompt=True).input_ids
    whole = encoder.encode(chat, counts)
    learned = [
        token
        for token, taught, whose in zip(whole.input_ids, whole.supervised, whole.messages, strict=True)
        if taught and whose == len(chat) - 1
    ]
    rest = whole.input_ids[len(prompt) + len(learned) :]
    assert prompt + learned + rest == whole.input_ids
    assert all(whole.supervised[len(prompt) : len(prompt) + len(learned)])
    behind = encoder.tokenizer.decode(rest)
    assert not behind.strip() or rest == [encoder.tokenizer.eos_token_id]  # Phi-3's, once, behind a whole chat


@pytest.mark.parametrize("count", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_published_templates(name: str, count: int) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    template = fit_template(family.template, tokenizer, "<image>")
    encoder, rng = ChatEncoder(tokenizer, template, "<image>"), random.Random(name)
    for _ in range(count):
        chat, answers = conversation(rng, family)
        compare(encoder, chat, flat(chat), family.template, answers)


@pytest.mark.parametrize("count", CONVERSATIONS)
@pytest.mark.parametrize("name", SUPPLIED)
def test_supplied_templates(name: str, count: int) -> None:
    family, tokenizer = FAMILIES[SUPPLIED_WITH[name]], tokenizer_of(SUPPLIED_WITH[name])
    template = fit_template(find_template(name), tokenizer, "<image>")
    encoder, rng = ChatEncoder(tokenizer, template, "<image>"), random.Random(name)
    for _ in range(count):
        chat, answers = conversation(rng, family)
        compare(encoder, chat, chat, template, answers, "\n" if name == "plain" else "")


def learned(tokenizer: Any, tokens: Any) -> str:
    words: str = tokenizer.decode([token for token, on in zip(tokens.input_ids, tokens.supervised, strict=True) if on])
    return words


THOUGHT = "<think>\nfour legs\n</think>\n\n"


@pytest.mark.parametrize(
    ("said", "rendered", "taught"),
    [
        ("a cat", "<think>\n\n</think>\n\na cat", "<think>\n\n</think>\n\na cat<|im_end|>"),
        ("\n a cat", "<think>\n\n</think>\n\n a cat", "<think>\n\n</think>\n\n a cat<|im_end|>"),
        (THOUGHT + "a cat", THOUGHT + "a cat", THOUGHT + "a cat<|im_end|>"),
        ("<think>four legs</think>a cat", THOUGHT + "a cat", THOUGHT + "a cat<|im_end|>"),
        ("<think></think>\n\na cat", "<think>\n\n</think>\n\na cat", "<think>\n\n</think>\n\na cat<|im_end|>"),
        ("four legs</think>a cat", THOUGHT + "a cat", THOUGHT + "a cat<|im_end|>"),
    ],
)
def test_qwen3s_last_answer_gets_a_thought_and_what_the_row_thinks_is_learned(
    said: str, rendered: str, taught: str
) -> None:
    tokenizer = tokenizer_of("qwen3")
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": said}]
    tokens = ChatEncoder(tokenizer, FAMILIES["qwen3"].template, "<image>").encode(chat)
    assert tokens.input_ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert tokenizer.decode(tokens.input_ids).endswith(f"<|im_start|>assistant\n{rendered}<|im_end|>\n")
    assert learned(tokenizer, tokens) == taught


def test_qwen3s_history_loses_its_thoughts_and_they_are_not_learned() -> None:
    tokenizer = tokenizer_of("qwen3")
    chat = [
        {"role": "user", "content": "what</think>?"},
        {"role": "assistant", "content": THOUGHT + "a cat"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "<think>five\n</think>no, a dog"},
    ]
    encoder = ChatEncoder(tokenizer, FAMILIES["qwen3"].template, "<image>")
    tokens = encoder.encode(chat)
    assert tokens.input_ids == tokenizer.apply_chat_template(chat, return_dict=False)
    assert learned(tokenizer, tokens) == "a cat<|im_end|><think>\nfive\n</think>\n\nno, a dog<|im_end|>"
    chat[3]["content"] = "a dog"
    assert learned(tokenizer, encoder.encode(chat)) == "a cat<|im_end|><think>\n\n</think>\n\na dog<|im_end|>"
    chat[3]["content"] = "<think>one</think>two<think>three</think>four"  # of which Qwen3 loses the middle
    tokens = encoder.encode(chat)
    assert tokens.input_ids == tokenizer.apply_chat_template(chat, return_dict=False)


def test_thoughts_are_plain_text_to_a_template_that_knows_none() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": THOUGHT + "a cat"}]
    tokens = ChatEncoder(tokenizer, FAMILIES["qwen2.5"].template, "<image>").encode(chat)
    assert learned(tokenizer, tokens) == THOUGHT + "a cat<|im_end|>"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("gemma", "refuses these messages: System role not supported"), ("mistral-nemo", "drops message 1 of 3")],
)
def test_a_system_text_that_the_template_has_no_place_for_is_reported(name: str, complaint: str) -> None:
    encoder = ChatEncoder(tokenizer_of(name), FAMILIES[name].template, "<image>")
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    with pytest.raises(UserError, match=complaint):
        encoder.encode([*chat, {"role": "assistant", "content": "a cat"}])


@pytest.mark.parametrize("end", [" ", "\n", " \n "])
def test_what_a_template_writes_before_the_end_of_a_turn_is_learned(end: str) -> None:
    """Llama 2's puts a space there: the end is never said but behind it."""
    tokenizer = tokenizer_of("vicuna")
    template = (
        "{%- for m in messages -%}{{- (bos_token + '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
        f"else ' ' + m.content + {end!r} + eos_token) -}}}}{{%- endfor -%}}"
    )
    encoder = ChatEncoder(tokenizer, template, "<image>")
    chat = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "7"}]
    for messages in (chat, [*chat, *chat]):
        tokens = encoder.encode(messages)
        assert tokens.input_ids == tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        check_what_must_be_generated(encoder, messages)


def test_spaces_that_control_tokens_eat_are_eaten_whoever_wrote_them() -> None:
    tokenizer = tokenizer_of("phi-3")
    encoder = ChatEncoder(tokenizer, FAMILIES["phi-3"].template, "<image>")
    for said in (" \n a cat ", "\u3000cat", "\x1fcat", " ", "\n"):
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        assert encoder.encode(chat).input_ids == tokenizer.apply_chat_template(chat, return_dict=False), said


def test_llavas_own_prompts() -> None:
    tokenizer = tokenizer_of("vicuna")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]

    def rendered(template: str, messages: Chat) -> str:
        words: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        return words

    # llava/conversation.py: conv_vicuna_v1 and conv_llava_plain, as preprocess_v1 and preprocess_plain fill them
    system = "A chat between a curious user and an artificial intelligence assistant. "
    system += "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    turns = "USER: <image>\nDescribe it. ASSISTANT: a cat</s>"
    assert rendered(find_template("vicuna_v1"), chat) == system + turns
    own = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *chat]
    assert rendered(find_template("vicuna_v1"), own) == "Be brief. " + turns
    assert rendered(find_template("plain"), chat) == rendered(find_template("plain"), own) == "<image>a cat\n"
    fitted = fit_template(find_template("plain"), tokenizer, "<image>")
    assert rendered(fitted, chat).replace(" ", "") == "<s><image>acat\n"  # nothing but a line's end behind it
    assert fit_template(fitted, tokenizer, "<image>") == fitted
    tokens = ChatEncoder(tokenizer, fitted, "<image>").encode(own, [1])
    assert learned(tokenizer, tokens).strip(" ") == "a cat\n"


def test_a_template_is_found_by_name_by_file_or_is_one_itself(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    assert find_template(str(file)) == find_template("{{ messages }}") == "{{ messages }}"
    assert {find_template(name) for name in ("vicuna_v1", "plain", "chatml")} == set(SUPPLIED.values())
    with pytest.raises(UserError, match=r"no chat template is called 'vicuna'; known: vicuna_v1, plain, chatml, a"):
        find_template("vicuna")
    with pytest.raises(UserError, match=r"none\.jinja: cannot be read"):
        find_template(str(tmp_path / "none.jinja"))
