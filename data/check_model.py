"""How a model, or a language model that is to become one, would read rows: tokens, and how many an image takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.encode import encode_record
from data.pictures import ImageRef, image_size
from data.records import Record
from vlm.checkpoint import ADAPTER_CONFIG, asks_for_code, read_object
from vlm.errors import UserError, first_line
from vlm.hub import SETTINGS, fetch

if TYPE_CHECKING:
    from vlm.chat import ChatEncoder
    from vlm.processing import VisionLanguageProcessor
    from vlm.tiling import ImageTokens

NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to read rows as a model does. context None: the model's own; image_tokens: how many stand for
    an image where `model` is a language model, which doesn't say."""

    model: str
    context: int | None = None
    image_tokens: int = 576


@dataclass(frozen=True)
class Length:
    """Tokens of a whole row; what is kept of them in the context, the supervised ones of those; messages dropped."""

    tokens: int
    kept: int
    supervised: int
    dropped: int


class TooLongError(UserError):
    """A row of which not even the first turn fits."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


class Reader:
    """Reads rows with the encoder of training. chat, processor: what it was made of (no processor of an LM)."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        folder = fetch(spec.model, *SETTINGS, ADAPTER_CONFIG)
        if (folder / ADAPTER_CONFIG).is_file():
            folder = fetch(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "", *SETTINGS)
        if not (folder / "config.json").is_file():
            raise UserError(f"{spec.model}: not a model folder (no config.json in it)")
        config = read_object(folder / "config.json")
        if asks_for_code(config):
            raise UserError(f"{spec.model}: its config asks to run code from the folder (auto_map); that is never done")
        self.processor: VisionLanguageProcessor | None = None
        self.chat: ChatEncoder
        try:
            own = self._read_model(folder) if config.get("model_type") == "vlm" else self._read_language_model(folder)
        except UserError:
            raise
        except Exception as error:  # transformers fails in many ways on broken folders
            raise UserError(f"{spec.model}: cannot be loaded ({first_line(error)})") from error
        self.context = spec.context or own or NO_LIMIT
        self._sizes: dict[ImageRef, tuple[int, int]] = {}

    def _read_model(self, folder: Any) -> int | None:
        from transformers import AutoConfig

        from vlm.auto import register
        from vlm.configuration import context_length
        from vlm.processing import VisionLanguageProcessor

        register()
        self.processor = VisionLanguageProcessor.from_pretrained(folder, trust_remote_code=False)
        if not self.processor.chat_template:
            raise UserError(f"{self.spec.model}: no chat template in it (chat_template.jinja)")
        self.chat = self.processor.chat
        self.layout: ImageTokens | None = self.processor.image_tokens
        return context_length(AutoConfig.from_pretrained(folder).text_config)

    def _read_language_model(self, folder: Any) -> int | None:
        from transformers import AutoConfig

        from vlm.chat import ChatEncoder
        from vlm.configuration import context_length
        from vlm.convert.sources import read_tokenizer
        from vlm.templates import VICUNA, fit_template
        from vlm.tokenization import IMAGE_TOKEN, add_image_token, fill_padding_token

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "vision_config"):
            raise UserError(f"{self.spec.model}: a {config.model_type!r} model; vlm import makes one of ours of it")
        tokenizer = read_tokenizer(folder)
        add_image_token(tokenizer)
        fill_padding_token(tokenizer)
        template = fit_template(tokenizer.chat_template or VICUNA, tokenizer, IMAGE_TOKEN)
        self.chat = ChatEncoder(tokenizer, template, IMAGE_TOKEN)
        self.layout = None
        return context_length(config)

    def placeholders(self, image: ImageRef) -> int:
        """Image tokens that stand for an image, from its header."""
        if self.layout is None:
            return self.spec.image_tokens
        if self.layout.marks or self.layout.mode == "none":
            return self.layout.placeholders(self.layout.view_size, self.layout.view_size)
        if image not in self._sizes:
            self._sizes[image] = image_size(image)
            if len(self._sizes) > 10_000:
                del self._sizes[next(iter(self._sizes))]
        return self.layout.placeholders(*self._sizes[image])

    def measure(self, record: Record, number: int) -> Length:
        """Raises UserError for a row that training would refuse, TooLongError for one that doesn't fit the context."""
        placeholders = [self.placeholders(image) for image in record.images]

        def encode(context: int) -> Any:
            return encode_record(record, self.chat, context, "assistant", np.random.default_rng(number), placeholders)

        whole = encode(NO_LIMIT)
        tokens = len(whole.input_ids)
        if tokens <= self.context:
            return Length(tokens, tokens, whole.supervised, 0)
        try:
            kept = encode(self.context)
        except UserError as error:
            raise TooLongError(str(error), tokens) from None
        return Length(tokens, len(kept.input_ids), kept.supervised, kept.dropped)
