"""METEOR's formula against what its program computes: figures written down, and where there is Java, the program."""

import random
import subprocess

import numpy as np
import pytest

from data.benchmarks import java
from vlm import UserError

NEEDS_JAVA = pytest.mark.skipif(bool(java.missing()), reason=f"METEOR can't run here: {java.missing()}")
PAIRS = [  # another order, two synonyms, its reference itself, nothing alike, nothing said
    ("on the grass a dog runs", ["a dog runs on the grass"]),
    ("two men are sitting on a couch", ["two males sit on the sofa", "a man sleeps"]),
    ("a dog runs", ["a dog runs", "dogs"]),
    ("blue", ["a car waits"]),
    ("", ["a dog"]),
]
# what the program answers to SCORE with these, and to EVAL with those answers
LINES = [
    "6 6 3 3 3 3 3 3 0 0 0 0 0 0 0 0 0 0 0 0 2 6 6",
    "7 6 4 3 0 0 2 2 1 1 0 0 1 1 0 0 1 1 0 0 3 5 5",
    "3 3 1 1 2 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 3 3",
    "1 3 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "0 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
]
SCORES = [0.5183550629438616, 0.30174270230883254, 1.0, 0.0, 0.0]
CORPUS = 0.3373602099621917
EXACT = 1e-12


def evaluated(statistics: list[str]) -> list[float]:
    """What the program says to EVAL: a score for each caption, and that of the corpus."""
    command = ["java", "-Xmx2G", "-jar", str(java._jar(java._METEOR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    line = " ||| ".join(["EVAL", *statistics]) + "\n"
    told = subprocess.run(command, input=line, capture_output=True, text=True, check=True)
    return [float(number) for number in told.stdout.split()]


def scores(lines: list[str]) -> tuple[list[float], float]:
    statistics = java.meteor_statistics([[float(number) for number in line.split()] for line in lines])
    return list(java.meteor_score(statistics)), float(java.meteor_score(statistics.sum(0)))


def test_the_formula_gives_what_the_program_gave() -> None:
    each, corpus = scores(LINES)
    assert each == pytest.approx(SCORES, abs=EXACT)
    assert corpus == pytest.approx(CORPUS, abs=EXACT)  # of summed numbers, not the mean
    assert abs(corpus - np.mean(each)) > 0.01
    assert scores([LINES[2]] * 3) == ([1, 1, 1], 1)  # where a caption is its reference nothing is in pieces


@NEEDS_JAVA
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_scores_equal_the_programs_own() -> None:
    rng = random.Random(0)
    words = "a dog runs running ran on the grass in green two men sitting sit bench sofa couch rides ' s 're".split()
    pairs = list(PAIRS)
    for _ in range(60):
        others = [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 5))]
        said = rng.choice([others[0], " ".join(rng.choices(words, k=rng.randint(1, 9))), "", "x ||| y", "a  b"])
        pairs.append((said, others))
    measure = java.meteor([said for said, _ in pairs], [others for _, others in pairs])
    assert measure.statistics.shape == (len(pairs), 23)
    first = [[float(number) for number in line.split()] for line in LINES]
    np.testing.assert_array_equal(measure.statistics[: len(LINES)], java.meteor_statistics(first))
    *each, corpus = evaluated([" ".join(map(str, row)) for row in measure.statistics])
    assert list(measure.value(measure.statistics)) == pytest.approx(each, abs=EXACT)
    assert float(measure) == pytest.approx(corpus, abs=EXACT)
    broken, whole = (java.meteor([text, "a"], [[text], ["b"]]) for text in ("a\ndog\u2028runs", "a dog runs"))
    np.testing.assert_array_equal(broken.statistics, whole.statistics)  # a line break ends no caption


@NEEDS_JAVA
def test_a_program_that_breaks_off_is_an_error_that_quotes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "_METEOR", java._SPICE.replace("spice-1.0", "nothing"))
    with pytest.raises(UserError, match=r"METEOR gave '' for the caption 'a dog' .*nothing\.jar"):
        java.meteor(["a dog"], [["a dog"]])
    monkeypatch.setattr(java, "_TOKENISER", "nothing.jar")
    with pytest.raises(UserError, match=r"the PTB tokeniser gave 0 lines for 1 captions \(Error: "):
        java.tokenize(["a dog"])


def test_what_java_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert java.missing() == "no java on this machine's PATH"
    assert java.spice_missing() == java.missing()
    monkeypatch.setattr("shutil.which", lambda name: "/bin/true")
    assert "models are not there" in java.spice_missing()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vlm[eval]'" in java.missing()
