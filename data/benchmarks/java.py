"""What only Java programs do: Stanford's tokeniser, METEOR and SPICE, from the jars that pycocoevalcap brings."""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from data.benchmarks.measures import Array, Measure
from data.benchmarks.ptb import PUNCTUATION
from vlm.errors import UserError

_TOKENISER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_SPICE = "spice/spice-1.0.jar"
_SPICE_MODELS = "spice/lib/stanford-corenlp-3.6.0-models.jar"
# what METEOR 1.5 was tuned to for English: Denkowski and Lavie 2014, table 1
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # of exact, stem, synonym and paraphrase matches


def missing() -> str:
    """Why Java's programs can't be run here; "" when they can."""
    if shutil.which("java") is None:
        return "no java on this machine's PATH"
    if _package() is None:
        return "pycocoevalcap, which has the programs, is not installed (pip install 'vlm[eval]')"
    return ""


def spice_missing() -> str:
    why = missing()
    if not why and not _jar(_SPICE_MODELS).is_file():
        why = (
            "its Stanford models are not there (430 MB: python -c 'from pycocoevalcap.spice.get_stanford_models import "
            "get_stanford_models as get; get()')"
        )
    return why


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption's words as the COCO script gets them, separated by one space."""
    last = "end"  # the program forgets empty lines at the end
    arguments = ["-cp", _TOKENISER, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{' '.join(caption.split())}\n" for caption in captions) + last
    with _started(*arguments) as (program, errors):
        told, _ = program.communicate(text)
        lines = told.rstrip().split("\n")
        if program.returncode or lines[-1] != last or len(lines) != len(captions) + 1:
            counts = f"{len(lines) - 1} lines for {len(captions)} captions"
            raise UserError(f"the PTB tokeniser gave {counts} ({_end(errors)})")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION) for line in lines[:-1]]


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """METEOR 1.5 of the corpus (Denkowski and Lavie 2014). Texts are tokenised ones."""
    statistics = []
    with _started("-Xmx2G", "-jar", _METEOR, "-", "-", "-stdio", "-l", "en", "-norm") as (program, errors):
        assert program.stdin is not None
        assert program.stdout is not None
        for hypothesis, others in zip(hypotheses, references, strict=True):
            text = hypothesis.replace("|||", "").replace("  ", " ")  # as the COCO script does
            line = " ||| ".join(("SCORE", *others, text))
            with suppress(BrokenPipeError):  # it ended, and what it said of that is told below
                program.stdin.write(" ".join(line.splitlines()) + "\n")
                program.stdin.flush()
            told = program.stdout.readline()
            if len(told.split()) != 23:
                raise UserError(f"METEOR gave {told.strip()!r} for the caption {text!r} ({_end(errors)})")
            statistics.append([float(number) for number in told.split()])
    return Measure(meteor_statistics(statistics), meteor_score)


def meteor_statistics(lines: Sequence[Sequence[float]]) -> Array:
    """METEOR's 23 numbers of each caption, ready to be summed: one that is its reference has no fragments. [n, 23]"""
    statistics = np.array(lines, np.float64).reshape(-1, 23)
    whole = (statistics[:, 21:23] == statistics[:, 0:2]).all(1) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    return statistics


def meteor_score(statistics: Array) -> Array:
    """The score of METEOR's 23 statistics [..., 23], of one caption or summed over many."""
    lengths, functional = statistics[..., 0:2], statistics[..., 2:4]  # of the hypothesis and the reference
    stages = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)  # [stage, content | function, side]
    chunks, matches = statistics[..., 20], statistics[..., 21:23]
    kinds = np.array([_DELTA, 1 - _DELTA])
    matched = np.einsum("...skh,s,k->...h", stages, np.array(_WEIGHTS), kinds)
    weighted = _DELTA * (lengths - functional) + (1 - _DELTA) * functional
    share = matched / np.where(weighted > 0, weighted, 1)
    precision, recall = share[..., 0], share[..., 1]
    below = _ALPHA * precision + (1 - _ALPHA) * recall
    mean = precision * recall / np.where(below > 0, below, 1)
    total = matches.sum(-1) / 2
    result: Array = mean * (1 - _GAMMA * (chunks / np.where(total > 0, total, 1)) ** _BETA)
    return result


def spice(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """SPICE of each caption (Anderson et al. 2016)."""
    pairs = enumerate(zip(hypotheses, references, strict=True))
    rows = [{"image_id": index, "test": text, "refs": list(others)} for index, (text, others) in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        (folder / "in.json").write_text(json.dumps(rows))
        files = [str(folder / "in.json"), "-cache", str(folder / "cache"), "-out", str(folder / "out.json")]
        with _started("-Xmx8G", "-jar", _SPICE, *files, "-subset", "-silent") as (program, errors):
            program.communicate()
            if program.returncode:
                raise UserError(f"SPICE ended with {program.returncode} ({_end(errors)})")
        told = json.loads((folder / "out.json").read_text())
    found = {row["image_id"]: row["scores"]["All"]["f"] for row in told}
    return np.array([found[index] for index in range(len(hypotheses))], np.float64)


@contextmanager
def _started(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """java with the package's jars, and the file that its errors go to; ended when it isn't needed any more."""
    jars = [str(_jar(argument)) if argument.endswith(".jar") else argument for argument in arguments]
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *jars]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, encoding="utf-8") as program,
    ):
        try:
            yield program, errors
        finally:
            program.kill()
            assert program.stdin is not None
            with suppress(BrokenPipeError):
                program.stdin.close()


def _end(errors: IO[str]) -> str:
    errors.seek(0)
    return " ".join(errors.read().split())[-300:] or "it said nothing more"


def _jar(name: str) -> Path:
    package = _package()
    assert package is not None
    return package / name


def _package() -> Path | None:
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None
