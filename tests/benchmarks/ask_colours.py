"""Serves a demo model and has OpenAI's own client ask for the colour of the one object in 20 pictures, twice.

    python tests/benchmarks/ask_colours.py runs/demo/model

Prints how many answers were right without and with streaming. The pictures are scenes of one object that training
never showed.
"""

import argparse
import base64
import io
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import openai
from PIL import Image
from support import COMMAND

from data.scenes.draw import draw_look, render
from data.scenes.world import draw_scene

PICTURES = 20


def pictures(seed: int) -> list[tuple[str, str]]:
    """(data URL, colour) of scenes with one object, from the held-out side of the split."""
    rng = np.random.default_rng([seed, 99])
    found: list[tuple[str, str]] = []
    while len(found) < PICTURES:
        scene = draw_scene(rng, reserved=True)
        if len(scene) == 1:
            out = io.BytesIO()
            Image.fromarray(render(scene, draw_look(rng))).save(out, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
            found.append((url, scene[0].colour))
    return found


def ask(client: openai.OpenAI, model: str, url: str, stream: bool) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what color is the object?"},
    ]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8, stream=stream)
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [*COMMAND, "serve", str(options.model), "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            address = next(match[0] for line in server.stdout if (match := re.search(r"http://[\d.:]+", line)))
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused")
            name = client.models.list().data[0].id
            for stream in (False, True):
                right = sum(ask(client, name, url, stream).strip() == colour for url, colour in pictures(options.seed))
                print(f"stream={stream}: {right} of {PICTURES} right")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
