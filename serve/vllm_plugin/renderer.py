"""Chats to tokens as in training: what people wrote never becomes a control token, an `<image>` in it is text."""

import hashlib
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import resolve_chat_template
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.tokenizers.hf import HfTokenizer
from vllm.utils.async_utils import make_async

from vlm.chat import ChatEncoder
from vlm.errors import UserError

Prompt = dict[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# of a template's settings; vLLM says something of reasoning and of a format with every request
TAKEN = ("add_generation_prompt", "reasoning_effort", "enable_thinking", "cohere_format")


class ChatRenderer(BaseRenderer[HfTokenizer]):
    def __init__(self, config: VllmConfig, tokenizer: HfTokenizer | None) -> None:
        super().__init__(config, tokenizer)
        self._encoders: dict[str | None, ChatEncoder] = {}
        self._image_token_id = getattr(self.model_config.hf_config, "image_token_id", None)  # a model of text has none
        self._encode_async = make_async(self._encode, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Prompt]:
        conversation, images, _ = parse_chat_messages(
            messages,
            self.model_config,
            content_format="openai",
            media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )
        return conversation, _prompt(self._encode(conversation, params), images)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Prompt]:
        conversation, images, _ = await parse_chat_messages_async(
            messages,
            self.model_config,
            content_format="openai",
            media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )
        return conversation, _prompt(await self._encode_async(conversation, params), images)

    def _encode(self, conversation: list[Any], params: ChatParams) -> list[int]:
        settings = params.chat_template_kwargs
        for name, value in settings.items():
            if value and name not in TAKEN:
                raise VLLMValidationError(f"{name} is not supported", parameter=name)
        try:
            encoder = self._encoder(params.chat_template)
            chat = [_message(message) for message in conversation]
            shown = sum(part["type"] == "image" for message in chat for part in _parts(message))
            # one mark for each image: vLLM puts as many tokens in its place as the image needs
            return encoder.encode(chat, [1] * shown, settings.get("add_generation_prompt", True)).input_ids
        except UserError as error:
            raise VLLMValidationError(str(error), parameter="messages") from error

    def _tokenize_prompt(self, prompt: Any, params: TokenizeParams) -> Any:
        tokenizer = self.get_tokenizer()
        begin = tokenizer("")["input_ids"] if params.add_special_tokens else []
        begin = [token for token in begin if token != tokenizer.eos_token_id]
        return self._build_tokens_prompt([*begin, *self._encoder(None).encode_text(prompt["prompt"])], prompt)

    def _process_tokens(self, prompt: Any, **settings: Any) -> Any:
        return super()._process_tokens(self._checked(prompt), **settings)

    async def _process_tokens_async(self, prompt: Any, **settings: Any) -> Any:
        return await super()._process_tokens_async(self._checked(prompt), **settings)

    def _checked(self, prompt: Any) -> Any:
        """A prompt of ids may hold image tokens, which mean nothing without images."""
        marks = prompt["prompt_token_ids"].count(self._image_token_id)
        if marks and not prompt.get("multi_modal_data"):
            raise VLLMValidationError(f"the prompt has {marks} image tokens for 0 images", parameter="prompt")
        return prompt

    def _encoder(self, template: str | None) -> ChatEncoder:
        if template not in self._encoders:
            tokenizer = self.get_tokenizer()
            resolved = resolve_chat_template(tokenizer, template, None, model_config=self.model_config)
            known = self._image_token_id is not None
            image_token = tokenizer.convert_ids_to_tokens(self._image_token_id) if known else ""
            self._encoders[template] = ChatEncoder(tokenizer, resolved, image_token)
        return self._encoders[template]


def _message(message: Any) -> dict[str, Any]:
    """Role and content alone: a template takes everything else for its own words, control tokens and all."""
    if message["role"] not in ROLES:
        raise UserError(f"a role must be {', '.join(ROLES)}, got {str(message['role'])[:40]!r}")
    if message.get("tool_calls"):
        raise UserError("tool_calls are not supported")
    content: Any = message.get("content") or ""
    if isinstance(content, list) and len(content) == 1 and content[0]["type"] == "text":
        content = str(content[0]["text"])  # as training writes a message without images
    return {"role": ROLES[message["role"]], "content": content}


def _parts(message: Any) -> list[Any]:
    return message["content"] if isinstance(message["content"], list) else []


def _prompt(ids: list[int], images: Any) -> Prompt:
    prompt: Prompt = {"prompt_token_ids": ids}
    if images is not None:
        shown = images.get("image", ())
        if any(image is None for image in shown):  # what vLLM makes of an empty address
            raise VLLMValidationError("image_url: the address of the image is empty", parameter="messages")
        prompt["multi_modal_data"] = images
        # names by which an image is found again that was encoded already; vLLM makes none where no prefix is reused.
        # Those that a client may give are left out: they would find other clients' images
        names = [hashlib.sha256(image.original_bytes).hexdigest() for image in shown]
        prompt["multi_modal_uuids"] = {"image": names}
    return prompt
