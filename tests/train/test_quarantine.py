"""The share of broken rows that ends a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.bad import Bad
from data.mixture import Mixture
from data.sources import open_source
from tests.train.recipes import chat_recipe, write_recipe
from train.quarantine import Quarantine
from train.recipe import load_recipe
from train.runs import Run
from vlm import UserError


def quarantine(tmp_path: Path, rows: int | None, max_bad: float) -> Quarantine:
    (tmp_path / "run").mkdir(exist_ok=True)
    settings: dict[str, Any] = {**chat_recipe(tmp_path), "max_bad": max_bad}
    return Quarantine(Run(tmp_path / "run"), load_recipe(write_recipe(tmp_path / "r.yaml", settings)), "chat", rows)


def bad(*lines: int) -> list[Bad]:
    return [Bad(f"rows.jsonl:{line}", "an empty answer") for line in lines]


def test_a_row_counts_once_however_often_it_is_met(tmp_path: Path) -> None:
    kept = quarantine(tmp_path, 100, 0.02)
    for step in range(5):
        kept.add(bad(1, 2), step, 100 * step, 2 * step)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="3 of 100 rows are broken, more than max_bad"):
        quarantine(tmp_path, 100, 0.02).add(bad(3), 6, 600, 13)


def test_of_a_stream_the_share_is_of_the_rows_seen_and_of_a_thousand_at_least(tmp_path: Path) -> None:
    kept = quarantine(tmp_path, None, 0.01)
    kept.add(bad(*range(10)), 1, 10, 10)
    kept.add(bad(*range(10)), 2, 2000, 20)  # it began again
    with pytest.raises(UserError, match="21 of 2000 rows"):
        kept.add(bad(10), 3, 2000, 21)


def test_the_same_row_with_other_images_may_be_broken_in_two_ways(tmp_path: Path) -> None:
    kept = quarantine(tmp_path, 10, 0.2)
    kept.add([Bad("a:1", "a.png: no such image"), Bad("a:1", "b/a.png: no such image")], 1, 2, 2)
    assert len(kept) == 2


def test_the_rows_that_a_stage_can_meet_are_the_whole_that_the_share_is_of(tmp_path: Path) -> None:
    for name, rows in (("a", 30), ("b", 10)):
        text = [json.dumps({"question": str(row), "answer": "yes"}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(text))
    a, b = (open_source(tmp_path / f"{name}.jsonl") for name in "ab")
    assert Mixture([a, b], 0).reach(None) == 40
    assert Mixture([a, a, b], 0).reach(None) == 40
    assert Mixture([a, b], 0, [5, 10]).reach(None) == 40
    mixture = Mixture([a, a, b], 0, [5, 3, 20])
    samples = 2 * len(mixture)
    met = {(id(source), row) for source, row in map(mixture.place, map(mixture.sample, range(samples)))}
    assert {source for source, _ in met} == {id(a), id(b)}
    assert Mixture([a, b], 0, [5, 20]).reach(2 * 25) == 10 + 10
    assert mixture.reach(samples) == 16 + 10 >= len(met)
    assert Mixture([open_source(tmp_path / "a.jsonl"), a], 0, [5, 5]).reach(10) == 10
    (tmp_path / "other").mkdir()
    assert Mixture([open_source(tmp_path / "a.jsonl", tmp_path / "other"), a], 0).reach(None) == 60
