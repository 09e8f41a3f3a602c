"""The files that tests/benchmarks/data.py measures with: rows as LLaVA writes them, pictures, Parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = """a the is are of in on at two three red blue small large man woman dog cat street table tree house water sky
standing sitting holding looking near behind under left right what where how many which colour does this picture show
it they there people plate window road grass train bus phone book white black green yellow yes no because""".split()
SHARED_IMAGES = 16


def llava_rows(count: int, words: int, most_turns: int = 8) -> Iterator[str]:
    """JSON of so many rows, three of five with a picture; an answer has about so many words, a row one to eight."""
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(WORDS, max(1, round(length)))) for length in rng.exponential(words, 2000)]
    asked = [f"{' '.join(rng.choice(WORDS, 9))}?" for _ in range(2000)]
    turns = rng.geometric(0.3, count).clip(max=most_turns)
    pictured = rng.random(count) < 0.6
    drawn = rng.integers(0, 2000, (count, 16))
    for number in range(count):
        told = []
        for turn in range(turns[number]):
            mark = "<image>\\n" if turn == 0 and pictured[number] else ""
            question, answer = asked[drawn[number, 2 * turn]], said[drawn[number, 2 * turn + 1]]
            told.append(f'{{"from": "human", "value": "{mark}{question}"}}, {{"from": "gpt", "value": "{answer}"}}')
        image = f'"image": "{number % SHARED_IMAGES}.jpg", ' if pictured[number] else ""
        yield f'{{"id": "{number:09}", {image}"conversations": [{", ".join(told)}]}}'


def text_rows(count: int, words: int, most_turns: int = 8) -> Iterator[str]:
    """The same without pictures."""
    for row in llava_rows(count, words, most_turns):
        head, image, rest = row.partition('"image": ')
        yield head + rest.partition(", ")[2].replace("<image>\\n", "", 1) if image else row


def write_lines(path: Path, rows: Iterator[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in rows)
    return path


def write_array(path: Path, rows: Iterator[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        file.writelines(f"{',' * (number > 0)}\n{row}" for number, row in enumerate(rows))
        file.write("\n]\n")
    return path


def write_shared_images(folder: Path, edge: int = 336) -> None:
    folder.mkdir(parents=True)
    for number in range(SHARED_IMAGES):
        _photograph(number, edge).save(folder / f"{number}.jpg", quality=90)


def write_photographs(folder: Path, count: int) -> Path:
    """JPEG files of some 100 KB, no two the same, and a JSONL with a row about each. Returns the JSONL."""
    (folder / "images").mkdir(parents=True)
    sketch = folder / "sketch.jpg"
    pictures = []
    for number in range(8):
        _photograph(number, 480).save(sketch, quality=88)
        pictures.append(sketch.read_bytes())
    sketch.unlink()
    for number in range(count):
        picture, comment = pictures[number % 8], f"photograph {number:09}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment  # JPEG's comment
        (folder / "images" / f"{number:09}.jpg").write_bytes(picture[:2] + segment + picture[2:])
    rows = ({"image": f"{number:09}.jpg", "question": f"what is {number}?", "answer": "yes"} for number in range(count))
    return write_lines(folder / "rows.jsonl", map(json.dumps, rows))


def _photograph(seed: int, edge: int) -> Image.Image:
    """Coarse and fine noise, about as compressible as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((edge, edge))
    grain = rng.normal(0, 18, (edge, edge, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def write_parquet(folder: Path, rows: int, files: int, row_group: int) -> Path:
    """Rows of LLaVA's columns over so many files; as `a-000.parquet` ... in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn))])
    each = rows // files
    texts = text_rows(rows, 8)
    for number in range(files):
        with pq.ParquetWriter(folder / f"a-{number:03}.parquet", schema, use_dictionary=False) as writer:
            for start in range(0, each, row_group):
                part: list[Any] = [json.loads(next(texts)) for _ in range(min(row_group, each - start))]
                writer.write_table(pa.Table.from_pylist(part, schema), row_group_size=row_group)
    return folder
