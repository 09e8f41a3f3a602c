"""Templates and tokenizers of the Llama family: the prompt is the one that transformers makes of the same chat."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlm.chat import ChatEncoder
from vlm.errors import UserError
from vlm.templates import fit_template

# the shape of llava-hf's: it walks over parts, images first, and leaves the beginning to the tokenizer
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# the shape of a text model's: it adds strings, strips them, and begins by itself
TEXT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m['content'].strip() + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)


def chat(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}
SHOWN = chat([text("what is this?"), IMAGE, text("and\nthis?"), IMAGE], [text("a cat")], [text("sure?")])


@pytest.fixture(params=["every piece", "first word", "byte level"])
def llama(request: pytest.FixtureRequest) -> Any:
    """Tokenizers that put a space before every piece between control tokens, before a text's first word, or nowhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if request.param == "every piece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif request.param == "first word":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first", split=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<s>", "</s>", "<image>"]
    texts = ["USER: what is this? and\nthis? ASSISTANT: a cat sure? [user] [assistant] "]
    tokenizer.train_from_iterator(texts * 3, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def test_a_prompt_is_what_the_tokenizer_made_of_it_with_the_first_template(llama: Any) -> None:
    ended = [SHOWN[0], {"role": "assistant", "content": [text("a cat</s>")]}, SHOWN[2]]
    rendered = llama.apply_chat_template(ended, chat_template=PARTS, add_generation_prompt=True, tokenize=False)
    fitted = fit_template(PARTS, llama, "<image>")
    again = llama.apply_chat_template(SHOWN, chat_template=fitted, add_generation_prompt=True, tokenize=False)
    ids = ChatEncoder(llama, fitted, "<image>").encode(SHOWN, [1, 1], add_generation_prompt=True).input_ids
    assert ids == llama(rendered).input_ids == llama(again, add_special_tokens=False).input_ids
    assert fit_template(fitted, llama, "<image>") == fitted  # nothing is added twice


def test_a_template_of_parts_takes_text(llama: Any) -> None:
    encoder = ChatEncoder(llama, fit_template(PARTS, llama, "<image>"), "<image>")
    assert (
        encoder.encode(chat("what?", "a cat")).input_ids
        == encoder.encode(chat([text("what?")], [text("a cat")])).input_ids
    )


def test_a_template_of_text_takes_images(llama: Any) -> None:
    flat = chat("<image>\n<image>\nwhat is this?\nand\nthis?", "a cat</s>", "sure?")
    rendered = llama.apply_chat_template(flat, chat_template=TEXT, add_generation_prompt=True, tokenize=False)
    fitted = fit_template(TEXT, llama, "<image>")
    ids = ChatEncoder(llama, fitted, "<image>").encode(SHOWN, [1, 1], add_generation_prompt=True).input_ids
    assert ids == llama(rendered, add_special_tokens=False).input_ids
    assert ids.count(llama.convert_tokens_to_ids("<image>")) == 2
    stays = ChatEncoder(llama, fitted, "<image>").encode(chat("a literal <image> is text"))
    assert llama.convert_tokens_to_ids("<image>") not in stays.input_ids


def test_what_a_person_wrote_may_be_stripped_at_either_end(llama: Any) -> None:
    fitted = fit_template(TEXT, llama, "<image>")
    said = ChatEncoder(llama, fitted, "<image>").renderer.render(chat([IMAGE, text("  what? ")]))
    assert "".join(segment.text for segment in said) == "<s>[user] <image>\n  what?\n"


def test_a_template_that_takes_both_stays_as_it_is(tiny_tokenizer: Any) -> None:
    own = tiny_tokenizer.chat_template
    assert fit_template(own, tiny_tokenizer, "<image>") == own
    ending = EITHER.replace("{% endif %}{% endfor %}", "{% endif %}{{ eos_token }}{% endfor %}")
    assert fit_template(ending, tiny_tokenizer, "<image>") == ending


@pytest.mark.parametrize("template", [PARTS, TEXT, EITHER], ids=["parts", "text", "either"])
def test_an_answer_teaches_its_end(llama: Any, template: str) -> None:
    fitted = fit_template(template, llama, "<image>")
    encoder = ChatEncoder(llama, fitted, "<image>")
    for turns in (chat("what?", "a cat", "sure?", "this"), chat([text("what?")], [text("a cat")], "sure?", "this")):
        tokens = encoder.encode(turns)
        learned = [token for token, said in zip(tokens.input_ids, tokens.supervised, strict=True) if said]
        assert learned.count(llama.eos_token_id) == tokens.input_ids.count(llama.eos_token_id) == 2
        assert learned[-1] == llama.eos_token_id
    assert fit_template(fitted, llama, "<image>") == fitted


def test_a_template_that_shows_no_images_is_made_to_or_refused(llama: Any) -> None:
    hides = EITHER.replace("else '<image>'", "else ''")
    encoder = ChatEncoder(llama, fit_template(hides, llama, "<image>"), "<image>")
    tokens = encoder.encode(chat([IMAGE, text("what?")]), [3])
    assert tokens.input_ids.count(llama.convert_tokens_to_ids("<image>")) == 3
    only_parts = PARTS.replace("{{ '<image>\n' }}", "")
    with pytest.raises(UserError, match="shows no images"):
        fit_template(only_parts, llama, "<image>")


def test_a_template_that_renders_nothing_is_refused(tiny_tokenizer: Any) -> None:
    for broken in ("nothing", "{{ raise_exception('no') }}", "{% for"):
        with pytest.raises(UserError, match="can't render a message of a user"):
            fit_template(broken, tiny_tokenizer, "<image>")
