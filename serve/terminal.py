"""A conversation on the terminal, over the same engine and prompts as the server."""

import asyncio
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any

from serve.engine import ImageInput, Request, SamplingParams
from serve.errors import EngineError, ParameterError
from serve.media import prepare_image
from serve.torch_engine import TorchEngine
from vlm import UserError, VisionLanguageProcessor
from vlm.errors import first_line
from vlm.images import read_image

HELP = "/image FILE shows a picture, /reset starts again, /quit ends"


class ModelError(UserError):
    """The model, and not what was asked, is why there is no answer."""


class Conversation:
    """Messages so far and the images in them. max_tokens None: what the context holds."""

    def __init__(
        self, engine: TorchEngine, processor: VisionLanguageProcessor, max_tokens: int | None, temperature: float
    ) -> None:
        self.engine, self.processor = engine, processor
        self.max_tokens, self.temperature = max_tokens, temperature
        self.messages: list[dict[str, Any]] = []
        self.images: list[ImageInput] = []
        self.shown: list[ImageInput] = []  # to go with the next question

    def show(self, file: Path) -> None:
        """Adds a picture to the next question; UserError when it can't be read."""
        self.shown.append(prepare_image(read_image(file), self.processor))

    def reset(self) -> None:
        self.messages, self.images, self.shown = [], [], []

    def ask(self, text: str, out: IO[str]) -> str:
        """Writes the answer to `out` as it comes, and remembers both. Nothing is remembered when it fails.

        UserError when it doesn't fit the context, ModelError when the model can't answer.
        """
        content = [*({"type": "image"} for _ in self.shown), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *self.shown]
        placeholders = [image.placeholders for image in images]
        try:
            encoded = self.processor.chat.encode(messages, placeholders, add_generation_prompt=True)
        except Exception as error:  # turns that alternate suit every template, and words every tokenizer
            raise ModelError(f"its chat template or tokenizer fails ({first_line(error)})") from error
        left = self.engine.info.context_length - len(encoded.input_ids)
        if left < 1:
            held = self.engine.info.context_length
            raise UserError(f"the conversation has outgrown the model's context of {held} tokens; /reset starts again")
        limit = left if self.max_tokens is None else min(self.max_tokens, left)
        sampling = SamplingParams(max_tokens=limit, temperature=self.temperature)
        request = Request(uuid.uuid4().hex, encoded.input_ids, tuple(images), sampling)
        try:
            answer = asyncio.run(self._stream(request, out))
        except ParameterError as error:
            raise ModelError(f"its tokenizer doesn't fit its config.json ({error})") from error
        except EngineError as error:
            raise ModelError(f"{error} ({first_line(error.__cause__ or error)})") from error
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.images, self.shown = images, []
        return answer

    async def _stream(self, request: Request, out: IO[str]) -> str:
        parts: list[str] = []
        async with aclosing(self.engine.submit(request)) as deltas:
            async for delta in deltas:
                parts.append(delta.text)
                out.write(delta.text)
                out.flush()
        out.write("\n")
        out.flush()
        return "".join(parts)

    def run(self, source: IO[str], out: IO[str]) -> int:
        """Questions and commands, line by line, until the end of `source` or /quit. A mistake is told and the next line
        read; ModelError ends it."""
        interactive = source.isatty()
        if interactive:
            import readline  # noqa: F401  (gives input() a history and editing)

            out.write(HELP + "\n")
        while (line := _next_line(source, interactive)) is not None:
            command, _, rest = line.strip().partition(" ")
            try:
                match command:
                    case "":
                        continue
                    case "/quit" | "/exit":
                        break
                    case "/reset":
                        self.reset()
                    case "/image":
                        self.show(Path(rest.strip()).expanduser())
                    case _ if command.startswith("/"):
                        raise UserError(f"{command} is not known here; {HELP}")
                    case _:
                        self.ask(line.strip(), out)
            except ModelError:
                raise
            except UserError as error:
                out.write(f"{error}\n")
        return 0


def _next_line(source: IO[str], interactive: bool) -> str | None:
    if interactive:
        try:
            return input("> ")
        except EOFError:
            return None
    return source.readline() or None
