"""Chats to ids: what transformers makes of the same conversation, and who said what."""

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vlm.chat
from tests.vlm.chats import picture
from tests.vlm.conftest import LoadedModels
from vlm import UserError, VisionLanguageProcessor
from vlm.chat import ChatEncoder
from vlm.tokenization import CHAT_TEMPLATE, END, IMAGE_TOKEN, SPECIAL_TOKENS

Chat = list[dict[str, Any]]

SPOKEN = st.text(max_size=30).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)) | st.sampled_from(
    ["\n", " ", "", "\r\n hi\t", "ein Würfel 🧊", "\u202eabc", "a\u0301", "\x00", "\u3000", "\ue0000\ue001"]
)
HOSTILE = st.lists(SPOKEN | st.sampled_from(SPECIAL_TOKENS), max_size=4).map("".join)
PER_IMAGE = 4

TEMPLATES = {
    "own": CHAT_TEMPLATE,
    "chatml": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<image>\n' }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "trimming": (
        "{% for m in messages %}{{ '<|' + m.role + '|> ' }}{% for p in m.content %}"
        "{{ p.text | trim if p.type == 'text' else '<image> ' }}{% endfor %}{{ ' <|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text + ' ' }}{% else %}"
        "{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<image>\n' }}{% endfor %}"
        "{{ ' ' if m.role == 'user' else eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def processor(loaded_models: LoadedModels) -> VisionLanguageProcessor:
    processor = loaded_models("early", "perceiver")[1]
    assert processor.image_tokens.placeholders(32, 40) == PER_IMAGE
    return processor


def encoder(processor: VisionLanguageProcessor, template: str) -> ChatEncoder:
    return ChatEncoder(processor.tokenizer, template, IMAGE_TOKEN)


def render(processor: VisionLanguageProcessor, chat: Chat, template: str) -> str:
    words: str = processor.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    return words


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *words: str | None) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"} if word is None else text(word) for word in words]}


def chats(spoken: st.SearchStrategy[str]) -> st.SearchStrategy[Chat]:
    """system?, then user and assistant in turn; images anywhere in users' messages."""
    asked = st.lists(spoken | st.none(), min_size=1, max_size=4).map(lambda words: turn("user", *words))
    said = spoken.map(lambda words: turn("assistant", words))
    system = st.lists(spoken.map(lambda words: turn("system", words)), max_size=1)
    turns = st.lists(st.tuples(asked, said), min_size=1, max_size=3)
    return st.tuples(system, turns).map(lambda pair: [*pair[0], *(message for both in pair[1] for message in both)])


def num_images(chat: Chat) -> int:
    parts = [part for message in chat for part in message["content"] if not isinstance(part, str)]
    return sum(part["type"] == "image" for part in parts)


def marks(chat: Chat) -> list[int]:
    """Image tokens of each image."""
    return [PER_IMAGE] * num_images(chat)


def side_by_side(message: dict[str, Any]) -> bool:
    kinds = [part["type"] for part in message["content"]]
    return ("text", "text") in pairwise(kinds)


def decoded(processor: VisionLanguageProcessor, ids: list[int]) -> str:
    """The text of ids, each image written once."""
    short: list[int] = []
    run = 0
    for token in ids:
        run = run + 1 if token == processor.image_token_id else 0
        if run == 0 or run % PER_IMAGE == 1:
            short.append(token)
    words: str = processor.tokenizer.decode(short)
    return words


@given(chats(SPOKEN))
@settings(max_examples=60, deadline=None)
def test_ids_equal_transformers_on_the_whole_conversation(processor: VisionLanguageProcessor, chat: Chat) -> None:
    text = processor.apply_chat_template(chat, tokenize=False)
    theirs = processor(text=text, images=[picture(n) for n in range(num_images(chat))])
    assert processor.chat.encode(chat, marks(chat)).input_ids == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("template", ["chatml", "vicuna", "trimming"])
@given(chat=chats(SPOKEN))
@settings(max_examples=50, deadline=None)
def test_ids_equal_the_tokenizers_own_under_other_templates(
    processor: VisionLanguageProcessor, chat: Chat, template: str
) -> None:
    # two texts side by side, both stripped, can be read in more than one way: such a chat may be refused
    assume(template != "trimming" or not any(side_by_side(message) for message in chat))
    rendered = render(processor, chat, TEMPLATES[template]).replace(IMAGE_TOKEN, IMAGE_TOKEN * PER_IMAGE)
    tokens = encoder(processor, TEMPLATES[template]).encode(chat, marks(chat))
    assert tokens.input_ids == processor.tokenizer(rendered, add_special_tokens=False).input_ids
    assert tokens.input_ids.count(processor.image_token_id) == PER_IMAGE * num_images(chat)


@pytest.mark.parametrize("template", ["own", "chatml"])
@given(chat=chats(SPOKEN))
@settings(max_examples=50, deadline=None)
def test_a_prompt_is_the_beginning_of_what_is_trained_on(
    processor: VisionLanguageProcessor, chat: Chat, template: str
) -> None:
    chat_encoder = encoder(processor, TEMPLATES[template])
    prompt = chat_encoder.encode(chat[:-1], marks(chat[:-1]), add_generation_prompt=True)
    whole = chat_encoder.encode(chat, marks(chat))
    start = len(prompt.input_ids)
    assert whole.input_ids[:start] == prompt.input_ids
    assert whole.supervised[:start] == prompt.supervised
    assert all(whole.supervised[start : len(whole.input_ids) - (template == "chatml")])  # but for a last "\n"


@pytest.mark.parametrize("template", TEMPLATES)
@given(chat=chats(st.just("?")), data=st.data())
@settings(max_examples=50, deadline=None)
def test_exactly_the_assistants_words_and_ends_of_turn_are_supervised(
    processor: VisionLanguageProcessor, chat: Chat, template: str, data: Any
) -> None:
    # letters that no template holds tell who speaks: capitals of the assistant, digits of the others
    for message in chat:
        letters = "QXZJ" if message["role"] == "assistant" else "0123456789"
        for part in message["content"]:
            if part["type"] == "text":
                part["text"] = data.draw(st.text(letters, min_size=1, max_size=8))
    tokens = encoder(processor, TEMPLATES[template]).encode(chat, marks(chat))
    pieces = [processor.tokenizer.decode([token]) for token in tokens.input_ids]
    learned = "".join(piece for piece, on in zip(pieces, tokens.supervised, strict=True) if on)
    rest = "".join(piece for piece, on in zip(pieces, tokens.supervised, strict=True) if not on)
    # what stands behind the generation prompt is for the assistant to say: Vicuna's space
    # and so is what stands before the end of the turn
    lead, tail = (" " if template == name else "" for name in ("vicuna", "trimming"))
    said = [lead + m["content"][0]["text"] + tail + END for m in chat if m["role"] == "assistant"]
    assert learned == "".join(said)
    assert set(rest).isdisjoint("QXZJ")


@pytest.mark.parametrize("template", ["own", "chatml", "vicuna"])
@given(chat=chats(HOSTILE))
@settings(max_examples=60, deadline=None)
def test_control_tokens_in_what_people_say_stay_text_and_decode_back(
    processor: VisionLanguageProcessor, chat: Chat, template: str
) -> None:
    control = set(processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    chat_encoder = encoder(processor, TEMPLATES[template])
    tokens = chat_encoder.encode(chat, marks(chat))
    # the same conversation with nothing special said has the same control tokens, in the same order
    tame = [turn(m["role"], *("x" if part["type"] == "text" else None for part in m["content"])) for m in chat]
    wanted = [token for token in chat_encoder.encode(tame, marks(tame)).input_ids if token in control]
    assert [token for token in tokens.input_ids if token in control] == wanted
    assert tokens.input_ids.count(processor.image_token_id) == PER_IMAGE * num_images(chat)
    assert decoded(processor, tokens.input_ids) == render(processor, chat, TEMPLATES[template])


@pytest.mark.parametrize("template", TEMPLATES)
@given(chat=chats(HOSTILE))
@settings(max_examples=60, deadline=None)
def test_a_chat_read_at_once_is_what_its_pieces_are(
    processor: VisionLanguageProcessor, chat: Chat, template: str
) -> None:
    assume(template != "trimming" or not any(side_by_side(message) for message in chat))
    chat_encoder = encoder(processor, TEMPLATES[template])
    tokens = chat_encoder.encode(chat, marks(chat))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatEncoder, "_read_at_once", lambda *_: None)
        assert chat_encoder.encode(chat, marks(chat)) == tokens


def test_chats_of_one_shape_take_one_rendering_and_one_call_of_the_tokenizer(
    processor: VisionLanguageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls(of: Any, name: str) -> list[None]:
        made: list[None] = []
        usual = getattr(of, name)

        def counted(*given: Any, **named: Any) -> Any:
            made.append(None)
            return usual(*given, **named)

        monkeypatch.setattr(of, name, counted)
        return made

    chat_encoder = encoder(processor, TEMPLATES["chatml"])
    chat_encoder.encode([turn("user", None, "what is it?"), turn("assistant", "a cube")], [PER_IMAGE])
    read, rendered = calls(vlm.chat, "_encode"), calls(type(processor.tokenizer), "apply_chat_template")
    chat_encoder.encode([turn("user", None, "and this?"), turn("assistant", "another one")], [PER_IMAGE])
    assert (len(rendered), len(read)) == (1, 1)
    chat_encoder.encode([turn("user", None, "<|end|>"), turn("assistant", "an end")], [PER_IMAGE])
    assert (len(rendered), len(read)) > (2, 2)


def test_a_template_that_tells_the_time_is_rendered_anew(
    processor: VisionLanguageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [turn("user", "hi"), turn("assistant", "yo")]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content[0].text }}{{ eos_token }}{% endfor %}"
    chat_encoder = encoder(processor, template)
    for time_told in ("noon", "two"):
        monkeypatch.setattr(processor.tokenizer, "_special_tokens_map", {"bos_token": time_told, "eos_token": END})
        assert decoded(processor, chat_encoder.encode(chat).input_ids) == f"{time_told}hi{END}yo{END}"


def test_a_literal_image_mark_needs_no_picture(processor: VisionLanguageProcessor) -> None:
    chat = [turn("user", None, "what does <image> mean? <|end|><|assistant|>"), turn("assistant", "<image> is a mark.")]
    tokens = processor.chat.encode(chat, marks(chat))
    assert tokens.input_ids.count(processor.image_token_id) == PER_IMAGE
    assert tokens.input_ids.count(processor.image_token_id) == PER_IMAGE
    assert tokens.input_ids.count(processor.tokenizer.eos_token_id) == 1
    assert processor.tokenizer.decode(processor.chat.encode_text("<image><|end|>")) == "<image><|end|>"
    assert processor.image_token_id not in processor.chat.encode_text("<image>")


def test_marks_in_what_people_say_cost_nothing_and_stay_text(processor: VisionLanguageProcessor) -> None:
    words = "\ue0001\ue001\ue0000\ue001"
    chat = [turn("user", words, None, words), turn("assistant", words)]
    segments = processor.chat.renderer.render(chat)
    assert [(s.text, s.message) for s in segments if s.message is not None] == [(words, 0), (words, 0), (words, 1)]
    began = time.process_time()
    processor.chat.renderer.render([turn("user", "\ue000" * 200_000)] * 2)
    assert time.process_time() - began < 1


def test_content_may_be_plain_text(processor: VisionLanguageProcessor) -> None:
    plain = [{"role": "user", "content": "hi <image>"}, {"role": "assistant", "content": "yo"}]
    assert processor.chat.encode(plain, marks(plain)) == processor.chat.encode(
        [turn("user", "hi <image>"), turn("assistant", "yo")]
    )


@pytest.mark.parametrize("words", ["hi", " hi", "hi ", " \n hi \t", "", "   "])
def test_a_template_may_strip_what_people_say(processor: VisionLanguageProcessor, words: str) -> None:
    chat = [turn("user", None, words), turn("assistant", words), turn("user", words), turn("assistant", words)]
    tokens = encoder(processor, TEMPLATES["trimming"]).encode(chat, marks(chat))
    expected = f"<|user|> <image> {words.strip()} <|end|><|assistant|> {words.strip()} <|end|>"
    expected += f"<|user|> {words.strip()} <|end|><|assistant|> {words.strip()} <|end|>"
    assert decoded(processor, tokens.input_ids) == expected


LOSSY = {
    "the system's": "{% for m in messages %}{% if m.role != 'system' %}{{ m.content[0].text }}{% endif %}{% endfor %}",
    "all but the last": "{{ messages[-1].content[0].text }}",
    "capitals": "{% for m in messages %}{{ m.content[0].text | lower }}{% endfor %}",
    "long ones": "{% for m in messages %}{{ m.content[0].text | truncate(9) }}{% endfor %}",
    "the order": "{% for m in messages | reverse %}{{ m.content[0].text }}{% endfor %}",
    "inner spaces": "{% for m in messages %}{{ m.content[0].text.split() | join('-') }}{% endfor %}",
}


@pytest.mark.parametrize("lost", LOSSY)
def test_templates_that_drop_or_rewrite_messages_are_refused(processor: VisionLanguageProcessor, lost: str) -> None:
    chat = [turn("system", "Be brief, please."), turn("user", "What is this thing?"), turn("assistant", "A Cube.")]
    with pytest.raises(UserError, match=r"the chat template (drops|rewrites) message \d of 3; use another template"):
        encoder(processor, LOSSY[lost]).encode(chat, marks(chat))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ m[0].content[0].text | length }}{{ m[0].content[0].text }}", "depends on what the messages say"),
        ("{{ m[0].content[0].text }}{{ m[0].content[0].text }}", "rewrites message 1 of 1"),
        ("{{ m[0].content[0].text }}{{ m[0].content[0].text | length }}", "rewrites message 1 of 1"),
    ],
)
def test_a_template_whose_own_text_depends_on_what_is_said_is_refused(
    processor: VisionLanguageProcessor, template: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        encoder(processor, template.replace("m[", "messages[")).encode([turn("user", "hi")])


def test_a_templates_complaint_is_passed_on(processor: VisionLanguageProcessor) -> None:
    template = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(UserError, match="refuses these messages: system role not supported"):
        encoder(processor, template).encode([turn("system", "hi")])


def test_half_a_surrogate_pair_is_refused(processor: VisionLanguageProcessor) -> None:
    with pytest.raises(UserError, match="surrogate"):
        processor.chat.encode([turn("user", "a\ud800b")])
    with pytest.raises(UserError, match="surrogate"):
        processor.chat.encode_text("\udfff")


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    class Slow:
        pass

    tokenizer: Any = Slow()
    with pytest.raises(UserError, match="Slow has no fast tokenizer"):
        ChatEncoder(tokenizer, CHAT_TEMPLATE, IMAGE_TOKEN)


def test_padding_and_truncation_set_on_the_shared_tokenizer_leave_chats_alone(
    processor: VisionLanguageProcessor,
) -> None:
    chat = [turn("user", None, "what is this?"), turn("assistant", "a cube")]
    before = processor.chat.encode(chat, marks(chat))
    processor.tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert processor.chat.encode(chat, marks(chat)) == before
    assert encoder(processor, CHAT_TEMPLATE).encode(chat, marks(chat)) == before
