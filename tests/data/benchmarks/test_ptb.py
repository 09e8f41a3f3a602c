"""The tokeniser that needs no Java against Stanford's: on sentences with the program's output beside them, and where
there is Java, on many more."""

import json
import os
import random
from pathlib import Path

import pytest

from data.benchmarks import java, ptb

REAL = os.environ.get("VLM_DEV_DATA", "")
NEEDS_JAVA = pytest.mark.skipif(bool(java.missing()), reason=f"the program can't run here: {java.missing()}")
# sentence: what the program (CoreNLP 3.4.1, -preserveLines -lowerCase) makes of it, without the marks that are dropped
WRITTEN_DOWN = {
    "A dog runs on the grass.": "a dog runs on the grass",
    "A man's dog, a brown one, isn't running; it's asleep!": "a man 's dog a brown one is n't running it 's asleep",
    'Two men (one in red) can\'t see the "STOP" sign.': "two men -lrb- one in red -rrb- ca n't see the stop sign",
    "The kids' toys don't fit - they're too big.": "the kids toys do n't fit they 're too big",
    "A red/blue bike leans on a wall ...": "a red/blue bike leans on a wall",
    "She said: \"I'll go,\" and we'd wait": "she said i 'll go and we 'd wait",
    "A black-and-white photo of a t-shirt": "a black-and-white photo of a t-shirt",
    "I cannot believe it's gonna rain": "i can not believe it 's gon na rain",
    "A clock reads 5:30 p.m. on Sunday": "a clock reads 5:30 p.m. on sunday",
    "The U.S. flag flies at half-mast.": "the u.s. flag flies at half-mast",
    "Mr. and Mrs. Smith sit near St. Paul's.": "mr. and mrs. smith sit near st. paul 's",
    "1,000 people ran 3.5 miles in the 1950's": "1,000 people ran 3.5 miles in the 1950 's",
    "A $5 bill & a 20% discount": "a $ 5 bill & a 20 % discount",
    "AT&T store next to the R&B club": "at&t store next to the r&b club",
    "A 3-D model, a 1/2 cup and a 2nd plate": "a 3-d model a 1/2 cup and a 2nd plate",
    "Wait... what?! Really??": "wait what ?! really ??",
    "A cat -- or is it a dog -- sleeps": "a cat or is it a dog sleeps",
    "two dogs , one ball .": "two dogs one ball",
    "A bird [blue] {small} <big>": "a bird -lsb- blue -rsb- -lcb- small -rcb- <big>",
    "\"Hello\" 'world' ``quoted''": "hello world quoted",
    "rock 'n' roll at five o'clock": "rock 'n' roll at five o'clock",
    "y'all should've, could've, would've": "y' all should 've could 've would 've",
    "Dr. No and Jr. play vs. the Sr. team": "dr. no and jr. play vs. the sr. team",
    "A plane No. 5 flies at 10 a.m.": "a plane no. 5 flies at 10 a.m.",
    "An e-mail to a.b@c.com from www.example.com": "an e-mail to a.b@c.com from www.example.com",
    "A #1 sign and @home": "a # 1 sign and @home",
    "The man is 6'2\" tall": "the man is 6 2 tall",
    'A guy in a "Dogs\' club" shirt': "a guy in a dogs club shirt",
    "Big Ben, London, U.K.": "big ben london u.k.",
    "People walk, talk, etc.": "people walk talk etc.",
    "it's the '90s, 'tis nice": "it 's the '90s 't is nice",
    "A boy wearing a Ph.D. gown": "a boy wearing a ph.d. gown",
    "A long \u2013 very long \u2014 dash": "a long very long dash",
    "\u201cSmart quotes\u201d and \u2018single\u2019 ones": "smart quotes and single ones",
    "Caf\u00e9 with a na\u00efve waiter": "caf\u00e9 with a na\u00efve waiter",
    "a dog  with   spaces": "a dog with spaces",
    "A dog.A cat.": "a dog.a cat",
    "end of line,": "end of line",
    "Is this a test?Yes!": "is this a test?yes",
    "A person in a wet-suit/surf suit": "a person in a wet-suit/surf suit",
    "$1.50 and \u20ac3 and \u00a34": "$ 1.50 and $ 3 and # 4",
    "50-year-old man, 20-30 people": "50-year-old man 20-30 people",
    "bus no. 12 on 5th ave.": "bus no. 12 on 5th ave.",
    'A sign saying "NO PARKING 8am-5pm"': "a sign saying no parking 8am-5pm",
    "the dog: brown; the cat: white": "the dog brown the cat white",
    "a pizza (with olives, cheese, etc.) on a plate": "a pizza -lrb- with olives cheese etc. -rrb- on a plate",
    "* a starred thing *": "* a starred thing *",
    "1 + 1 = 2": "1 + 1 = 2",
    ":) a happy face :-(": ":-rrb- a happy face :--lrb-",
    "a semi;colon": "a semi colon",
    'the "world\'s best" cup': "the world 's best cup",
    "I'm sure he'd've come": "i 'm sure he 'd 've come",
    "O'Brien's pub": "o'brien 's pub",
    "an SUV's door": "an suv 's door",
    "x-ray of a hand_made toy": "x-ray of a hand_made toy",
    "two-thirds of a pie": "two-thirds of a pie",
    "ain't wanna go, gimme that, lemme see, gotta run": "ai n't wan na go gim me that lem me see got ta run",
    "more than one (1) item(s)": "more than one -lrb- 1 -rrb- item -lrb- s -rrb-",
    "her hair's brown": "her hair 's brown",
    "An old lady's handbag's strap": "an old lady 's handbag 's strap",
    "half a cup \u2026 and \u00bd more": "half a cup and 1/2 more",
    "5+6 is a sum, cat,5 is none": "5 +6 is a sum cat ,5 is none",
    "a sign says test?yes": "a sign says test?yes",
    "*** stars ***": "*** stars ***",
}


@pytest.mark.parametrize("sentence", WRITTEN_DOWN)
def test_sentences_become_the_words_that_the_program_makes_of_them(sentence: str) -> None:
    assert ptb.tokenize(sentence) == WRITTEN_DOWN[sentence]


def test_nothing_has_no_words() -> None:
    assert [ptb.tokenize(text) for text in ("", " ", ".", "...", "\n \t", "\U0001f600")] == [""] * 6


@NEEDS_JAVA
def test_the_program_says_what_is_written_down() -> None:
    assert dict(zip(WRITTEN_DOWN, java.tokenize(list(WRITTEN_DOWN)), strict=True)) == WRITTEN_DOWN


@NEEDS_JAVA
def test_every_line_gets_its_own_words_back() -> None:
    odd = ["", "a dog", " \r\n ", "two\nlines\rand\u2028more\x85", "end", "\U0001f600 smile", "x \x00 y", "", ""]
    told = ["", "a dog", "", "two lines and more", "end", "smile", "x y", "", ""]
    assert java.tokenize(odd) == told
    assert java.tokenize([]) == []
    assert java.tokenize([""]) == [""]


def caption(rng: random.Random) -> str:
    """Words of captions, with the marks that people put between them."""
    nouns = "dog man's woman's frisbee Kite t-shirt U.S. 3 12 don't it's they're half-pipe TV boys' 1950's".split()
    out = rng.choice(["A", "Two", "the", "An"])
    for _ in range(rng.randint(1, 12)):
        word = rng.choice(nouns)
        mark = rng.random()
        if mark < 0.05:
            word = f'"{word}"'
        elif mark < 0.1:
            word = f"({word})"
        elif mark < 0.25:
            word += rng.choice([",", ";", ":", " -", " --", "...", " &", "!", "?", " /"])
        out += f" {word}"
    return out + rng.choice(["", ".", " .", "!", "?", "..."])


@NEEDS_JAVA
def test_generated_captions_have_the_same_words_in_both() -> None:
    rng = random.Random(0)
    captions = [caption(rng) for _ in range(500)]
    assert [ptb.tokenize(text) for text in captions] == java.tokenize(captions)


@NEEDS_JAVA
@pytest.mark.skipif(not REAL, reason="VLM_DEV_DATA names no folder with flickr8k")
def test_real_captions_have_the_same_words_in_both() -> None:
    lines = (Path(REAL) / "flickr8k/captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [text for line in lines for text in json.loads(line)["captions"]]
    assert len(captions) == 10_000
    assert [ptb.tokenize(text) for text in captions] == java.tokenize(captions)
