"""What the published chat templates of other families write, in words of our own, without their tools; and tiny
tokenizers with the control tokens of each family, which split words as its own do.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "USER: what is this? and\nthis? ASSISTANT: a cat, sure? user assistant system model [INST] hello there [/INST] ",
    "You are Qwen, created by Alibaba Cloud. A chat between a curious user and an assistant. one two three\n\n",
]
# how the tokenizers of Llama 3 and Qwen cut a text: line ends stay together, whatever follows them
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROMPT = "{%- if add_generation_prompt -%}{{- START -}}{%- endif -%}"
ALTERNATE = (
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}{%- endfor -%}"
)

LLAMA3_TURN = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>'"
LLAMA3_START = "'<|start_header_id|>assistant<|end_header_id|>\n\n'"
LLAMA3 = (
    "{%- for m in messages -%}{{- (bos_token if loop.first else '') + " + LLAMA3_TURN + " -}}{%- endfor -%}" + PROMPT
).replace("START", LLAMA3_START)
LLAMA3_2 = (
    "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' "
    "+ 'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' -}}"
    "{%- set system = messages[0].role == 'system' -%}"
    "{{- (messages[0].content | trim if system else '') + '<|eot_id|>' -}}"
    "{%- for m in (messages[1:] if system else messages) -%}{{- " + LLAMA3_TURN + " -}}{%- endfor -%}" + PROMPT
).replace("START", LLAMA3_START)

CHATML_START = "'<|im_start|>assistant\n'"
QWEN2_5 = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    + PROMPT
).replace("START", CHATML_START)
# the last answer gets a thought, empty where it brings none; those before the last question lose theirs
QWEN3 = (
    "{%- set ns = namespace(last=messages | length - 1) -%}"
    "{%- for m in messages if m.role == 'user' and m.content is string -%}{%- set ns.last = 0 -%}{%- endfor -%}"
    "{%- if ns.last == 0 -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- for m in messages -%}{%- set said = m.content if m.content is string else '' -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role != 'assistant' -%}{{- said -}}{%- else -%}{%- set thought = '' -%}"
    "{%- if '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') -}}"
    "{%- else -%}{{- said -}}{%- endif -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}" + PROMPT
).replace("START", CHATML_START)

TURNS = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else none -%}"
    "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
)
# Mistral-7B-Instruct-v0.2, where [INST] is ordinary text
MISTRAL = (
    TURNS + ALTERNATE + "{{- bos_token -}}{%- for m in turns -%}{%- if m.role == 'user' -%}"
    "{{- ' [INST] ' + (system + '\n\n' if loop.first and system is not none else '') + m.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
# Mistral-Nemo-Instruct, where it is a token, and the system's text stands before a question that is the last message
NEMO = (
    TURNS + ALTERNATE + "{{- bos_token -}}{%- for m in turns -%}{%- if m.role == 'user' -%}"
    "{{- '[INST]' + (system + '\n\n' if loop.last and system is not none else '') + m.content + '[/INST]' -}}"
    "{%- else -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
GEMMA_TURN = "'<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
GEMMA_START = "'<start_of_turn>model\n'"
GEMMA = (
    "{{- bos_token -}}"
    "{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for m in messages -%}{{- " + GEMMA_TURN + " + m.content | trim + '<end_of_turn>\n' -}}{%- endfor -%}" + PROMPT
).replace("START", GEMMA_START)
GEMMA3 = (
    "{{- bos_token -}}" + TURNS + ALTERNATE + "{%- for m in turns -%}{{- " + GEMMA_TURN + " -}}"
    "{%- if system is not none and loop.first -%}"
    "{{- (system if system is string else system[0].text) + '\n\n' -}}{%- endif -%}"
    "{%- if m.content is string -%}{{- m.content | trim -}}{%- else -%}{%- for part in m.content -%}"
    "{{- part.text | trim if part.type == 'text' else '<start_of_image>' -}}{%- endfor -%}{%- endif -%}"
    "{{- '<end_of_turn>\n' -}}{%- endfor -%}" + PROMPT
).replace("START", GEMMA_START)
PHI3 = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}"
    "{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}"
)
# FastChat's vicuna_v1.1; Vicuna itself brings no Jinja
VICUNA = (
    TURNS + "{{- bos_token + (system if system is not none else 'A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') -}}"
    "{%- for m in turns -%}{{- (' USER: ' + m.content + ' ' if m.role == 'user' "
    "else 'ASSISTANT: ' + m.content + eos_token) -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """A template and its tokenizer's habits. words: bytes, pieces (a space before the first word of all) or gemma
    (none); eats: its control tokens take the space behind them, as Phi-3's do."""

    template: str
    control: tuple[str, ...]
    begin: str | None
    end: str
    words: str = "bytes"
    eats: bool = False
    others: tuple[str, ...] = ()
    system: bool = True


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_TOKENS = ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
PHI_TOKENS = ("<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LLAMA2_TOKENS = ("<unk>", "<s>", "</s>")
FAMILIES = {
    "llama-3": Family(LLAMA3, LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.2": Family(LLAMA3_2, LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": Family(QWEN2_5, CHATML_TOKENS, None, "<|im_end|>"),
    "qwen3": Family(QWEN3, CHATML_TOKENS, None, "<|im_end|>", others=("<think>", "</think>")),
    "mistral": Family(MISTRAL, LLAMA2_TOKENS, "<s>", "</s>", "pieces"),
    "mistral-nemo": Family(NEMO, (*LLAMA2_TOKENS, "[INST]", "[/INST]"), "<s>", "</s>", system=False),
    "gemma": Family(GEMMA, GEMMA_TOKENS, "<bos>", "<eos>", "gemma", system=False),
    "gemma-3": Family(GEMMA3, GEMMA_TOKENS, "<bos>", "<eos>", "gemma"),
    "phi-3": Family(PHI3, PHI_TOKENS, "<s>", "<|endoftext|>", "pieces", eats=True),
    "vicuna": Family(VICUNA, LLAMA2_TOKENS, "<s>", "</s>", "pieces"),
}


def make_tokenizer(family: Family) -> Any:
    control = [AddedToken(token, special=True, normalized=False, rstrip=family.eats) for token in family.control]
    control.append(AddedToken("<image>", special=True, normalized=False))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=control,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if family.words == "bytes" else [],
    )
    if family.words == "bytes":
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False, fuse_unk=True))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
        if family.words == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    letters = " ".join(chr(code) for code in range(33, 127))
    tokenizer.train_from_iterator([*TEXTS * 3, letters, "\n", "\t"], trainer)
    if (
        family.words == "pieces"
    ):  # as of SentencePiece, no token goes on behind a space: words are apart in training alone
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.others])
    if family.begin is not None and "bos_token" in family.template:
        number = tokenizer.token_to_id(family.begin)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.begin} $A", special_tokens=[(family.begin, number)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.begin,
        eos_token=family.end,
        chat_template=family.template,
        additional_special_tokens=[*family.control, "<image>"],
    )
