"""Scenes in memory: right answers, balanced questions, no leaks between splits, pictures that show them."""

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scenes import COLOURS, HELD_OUT, PLACES, SHAPES, Scene, Thing
from data.scenes.draw import RGB, SHADE, draw_look, render
from data.scenes.language import captions, description
from data.scenes.questions import ANSWERS, KINDS, ask, ask_many, candidates
from data.scenes.rows import heldout_item, text_row, train_pair, train_rows, unseen_item
from data.scenes.world import draw_scene, draw_twin, is_reserved, scene_key
from tests.data.scene_reader import answer_of, parse

SEEDS = st.integers(0, 2**32)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def random_scene(seed: int) -> Scene:
    """Any scene at all, held-out pairs included."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.3:
        return draw_scene(rng, held_out=HELD_OUT[int(rng.integers(len(HELD_OUT)))])
    return draw_scene(rng, reserved=bool(rng.integers(2)))


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_every_question_has_the_right_answer(seed: int) -> None:
    scene = random_scene(seed)
    for focus in (None, *scene):
        for kind in KINDS:
            for answer, groups in candidates(scene, kind, focus).items():
                assert answer in ANSWERS[kind]
                assert all(groups)
                for text in (text for group in groups for text in group):
                    assert answer_of(scene, text) == answer, (scene, text)


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_questions_of_a_scene_differ_and_their_kinds_are_even(seed: int, count: int) -> None:
    scene = random_scene(seed)
    asked = ask_many(np.random.default_rng(seed), scene, count)
    assert len({q.text for q in asked}) == len(asked) == count
    assert all(answer_of(scene, q.text) == q.answer for q in asked)
    kinds = Counter(q.kind for q in asked)
    allowed = [kind for kind in KINDS if candidates(scene, kind)]
    if count <= len(allowed):
        assert max(kinds.values()) == 1


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_captions_name_all_objects(seed: int) -> None:
    scene = random_scene(seed)
    texts = captions(np.random.default_rng(seed), scene, 2)
    assert len(set(texts)) == 2
    assert all(parse(text) == Counter(scene) for text in texts)


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_twins_differ_by_one_edit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    twin = draw_twin(rng, scene)
    before, after = Counter(scene), Counter(twin)
    gone, come = list((before - after).elements()), list((after - before).elements())
    if len(scene) != len(twin):
        assert len(gone) + len(come) == 1
    else:
        assert len(gone) == len(come) == 1
        assert sum(a != b for a, b in zip(gone[0], come[0], strict=True)) == 1
    for one in (scene, twin):
        assert 1 <= len(one) <= 4
        assert len({thing.place for thing in one}) == len(one)
        assert not is_reserved(one)
        assert not any(thing.pair in HELD_OUT for thing in one)


def test_all_edits_occur() -> None:
    seen = Counter[str]()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        twin = draw_twin(rng, scene)
        if len(scene) != len(twin):
            seen["add" if len(twin) > len(scene) else "remove"] += 1
        else:
            (old,), (new,) = Counter(scene) - Counter(twin), Counter(twin) - Counter(scene)
            seen[next(f for f, a, b in zip(Thing._fields, old, new, strict=True) if a != b)] += 1
    assert set(seen) == {"size", "colour", "shape", "place", "add", "remove"}
    assert min(seen.values()) > 15


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_pictures_show_each_object_in_its_quadrant(seed: int) -> None:
    scene = random_scene(seed)
    look = draw_look(np.random.default_rng(seed))
    picture = render(scene, look).astype(int)
    at = {thing.place: thing for thing in scene}
    for index, place in enumerate(PLACES):
        row, column = divmod(index, 2)
        quadrant = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        areas = {c: int((np.abs(quadrant - rgb).max(axis=2) <= SHADE).sum()) for c, rgb in RGB.items()}
        thing = at.get(place)
        if thing is None:
            assert not any(areas.values())
            continue
        assert [c for c, area in areas.items() if area] == [thing.colour]
        mask = np.abs(quadrant - RGB[thing.colour]).max(axis=2) <= SHADE
        height, width = (int(mask.any(axis=axis).sum()) for axis in (1, 0))
        assert height == width
        assert (width <= 19) if thing.size == "small" else (width >= 25)
        fill = areas[thing.colour] / (height * width)
        assert {"square": 0.99, "circle": 0.7, "triangle": 0.4}[thing.shape] < fill
        assert fill < {"square": 1.01, "circle": 0.9, "triangle": 0.62}[thing.shape]


def test_backgrounds_stay_away_from_the_object_colours() -> None:
    palette = np.array(list(RGB.values()))
    canvases = np.stack([draw_look(np.random.default_rng(seed)).canvas for seed in range(200)]).astype(int)
    assert (canvases.max(axis=3) - canvases.min(axis=3)).max() <= 30
    shades = palette.max(axis=1) - palette.min(axis=1)
    assert shades.min() - 2 * SHADE >= 90
    flat = np.unique(canvases.reshape(-1, 3), axis=0)
    assert np.linalg.norm(flat[:, None] - palette, axis=2).min() > 50
    apart = np.linalg.norm(palette[:, None] - palette, axis=2) + 1e9 * np.eye(len(palette))
    assert apart.min() > 100


def test_held_out_pairs_leave_every_colour_and_shape_in_training() -> None:
    assert len(set(HELD_OUT)) == 3
    rest = {(c, s) for c in COLOURS for s in SHAPES} - set(HELD_OUT)
    assert {c for c, _ in rest} == set(COLOURS)
    assert {s for _, s in rest} == set(SHAPES)
    seen = {thing.pair for pair in range(300) for drawn in train_pair(0, pair) for thing in drawn.scene}
    assert seen == rest


def test_keys_tell_descriptions_apart() -> None:
    scenes = {random_scene(seed) for seed in range(3000)}
    assert len({scene_key(scene) for scene in scenes}) == len(scenes)


def test_unseen_scenes_show_a_held_out_pair_and_ask_about_it() -> None:
    pairs = Counter[tuple[str, str]]()
    for index in range(180):
        drawn, question = unseen_item(0, index)
        focus = [thing for thing in drawn.scene if thing.pair in HELD_OUT]
        assert len(focus) == 1
        pairs[focus[0].pair] += 1
        assert answer_of(drawn.scene, question.text) == question.answer
        about = candidates(drawn.scene, question.kind, focus[0])
        assert any(question.text in group for group in about[question.answer])
        if question.kind == "colour":
            assert question.answer == focus[0].colour
        if question.kind == "shape":
            assert question.answer == focus[0].shape
    assert set(pairs.values()) == {60}


def test_answering_blind_stays_low() -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(1002):
        _, question = heldout_item(0, index)
        counts[question.kind][question.answer] += 1
    assert [sum(c.values()) for c in counts.values()] == [167] * 6
    assert np.mean([max(c.values()) / sum(c.values()) for c in counts.values()]) <= 0.36
    trained: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        for question in ask_many(rng, draw_scene(rng), 6):
            trained[question.kind][question.answer] += 1
    assert np.mean([max(c.values()) / sum(c.values()) for c in trained.values()]) <= 0.36
    assert {kind: set(c) for kind, c in trained.items()} == {kind: set(a) for kind, a in ANSWERS.items()}


def test_wording_does_not_tell_the_answer() -> None:
    """The best guess from the whole wording, learnt from training, is little better than by kind."""
    prior: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in range(2500):
        for index, drawn in enumerate(train_pair(0, pair), start=2 * pair):
            turns = train_rows(0, index, drawn.scene, "x.png", 6)[2]["messages"]
            turns[0]["content"] = turns[0]["content"][1]["text"]
            for asked, told in zip(turns[::2], turns[1::2], strict=True):
                prior[asked["content"]][told["content"]] += 1
    right = 0
    for index in range(1200):
        _, question = heldout_item(0, index)
        best = prior[question.text].most_common(1)
        right += bool(best) and best[0][0] == question.answer
    assert right / 1200 <= 0.40


def test_denied_objects_have_a_colour_and_a_shape_that_are_there() -> None:
    hard = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        question = ask(rng, scene, "existence", answer="no")
        assert question is not None
        *_, colour, shape = question.text.rstrip("?").split()
        colours, shapes, pairs = ({getattr(t, f) for t in scene} for f in ("colour", "shape", "pair"))
        if {(c, s) for c in colours for s in shapes} - pairs - set(HELD_OUT):
            hard += 1
            assert colour in colours
            assert shape in shapes
    assert hard > 100


def test_text_rows_answer_from_their_caption() -> None:
    begun: Counter[str] = Counter()
    for index in range(400):
        turns = text_row(7, index)["messages"]
        caption, _, first = turns[0]["content"].partition(". ")
        scene = tuple(parse(caption))
        turns[0]["content"] = first
        assert not is_reserved(tuple(sorted(scene, key=lambda t: PLACES.index(t.place))))
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        if first in ("repeat.", "describe the picture."):
            _, told = pairs.pop(0)
            begun[first] += 1
            assert told["content"] == (caption if first == "repeat." else description(scene))
            assert parse(told["content"]) == Counter(scene)
        assert len(pairs) == 6
        for asked, told in pairs:
            assert answer_of(scene, asked["content"]) == told["content"]
    assert 60 < begun["repeat."] < 140
    assert 150 < begun["describe the picture."] < 250


def test_relations_come_in_opposite_pairs() -> None:
    for seed in range(100):
        found = candidates(random_scene(seed), "relation")
        for direction in OPPOSITE.keys() & found.keys():
            assert len(found[direction][0]) == len(found[OPPOSITE[direction]][0])
