import math

import pytest
import torch

from serve.engine import SamplingParams
from serve.errors import ParameterError
from serve.sampling import Sampler, sample

VOCABULARY = 50


def sampler(prompt=(), copy=0, **settings):
    return Sampler(SamplingParams(**settings), prompt, VOCABULARY, copy, torch.device("cpu"))


def logits(rows=1, seed=0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def tokens(numbers, samplers):
    return [choice.token_id for choice in sample(numbers, samplers)]


def test_greedy_is_the_argmax_also_beside_rows_that_draw():
    numbers = logits(4)
    mixed = [sampler(temperature=0.0), sampler(), sampler(temperature=0.0), sampler(top_k=3)]
    chosen = tokens(numbers, mixed)
    assert [chosen[0], chosen[2]] == numbers.argmax(-1)[[0, 2]].tolist()


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    alone, crowded = sampler(seed=7), sampler(seed=7)
    for step in range(20):
        numbers = logits(5, seed=step)
        others = [sampler(), sampler(temperature=0.0, logprobs=True), sampler(top_p=0.5, seed=1), sampler(top_k=2)]
        expected = tokens(numbers[2:3], [alone])
        assert tokens(numbers, [*others[:2], crowded, *others[2:]])[2:3] == expected


def test_seeds_and_copies_differ():
    def draw(**settings):
        one = sampler(**settings)
        return [tokens(logits(seed=step), [one])[0] for step in range(30)]

    assert draw(seed=3) == draw(seed=3)
    sequences = [draw(seed=3), draw(seed=-3), draw(seed=3 + 2**32), draw(seed=3, copy=1), draw(), draw()]
    assert len({tuple(sequence) for sequence in sequences}) == len(sequences)


def test_draws_follow_the_distribution():
    numbers = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    one = Sampler(SamplingParams(seed=0), [], 3, 0, torch.device("cpu"))
    counts = torch.bincount(torch.tensor([tokens(numbers, [one])[0] for _ in range(4000)]), minlength=3)
    assert counts.tolist() == pytest.approx([2000, 1200, 800], abs=130)


def test_temperature_flattens_and_sharpens():
    numbers = torch.log(torch.tensor([[0.6, 0.4]])).expand(1, 2)
    sharp = Sampler(SamplingParams(temperature=0.05, seed=0), [], 2, 0, torch.device("cpu"))
    tiny = Sampler(SamplingParams(temperature=2e-5, seed=0), [], 2, 0, torch.device("cpu"))
    assert sum(tokens(numbers, [sharp])[0] for _ in range(300)) < 5
    assert tokens(numbers * 1e6, [tiny]) == [0]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 1e-46}, {0}),  # which is 0 in 32 bits
        ({"top_p": 5e-324, "min_p": 1.0}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.5}, {0}),  # of the three that are left, the first has 5 / 9
        ({"top_k": -1}, {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly_the_tokens_it_should(settings, allowed):
    numbers = torch.log(torch.tensor([[0.5, 0.3, 0.1, 0.1]]))[:, [0, 1, 2, 3]]
    numbers[0, 3] -= 1e-3
    one = Sampler(SamplingParams(seed=1, **settings), [], 4, 0, torch.device("cpu"))
    assert {tokens(numbers, [one])[0] for _ in range(300)} == allowed


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    numbers, prompt = logits(), [3, 4, 5, 5]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, 9]]), numbers.clone())
    one = sampler(prompt, repetition_penalty=1.7)
    one.observe(9)
    assert torch.equal(one.adjust(numbers[0]), expected[0])


def test_presence_and_frequency_count_what_was_generated():
    one = sampler([8], presence_penalty=0.5, frequency_penalty=0.25)
    for token in (1, 1, 2):
        one.observe(token)
    change = one.adjust(torch.zeros(VOCABULARY))
    assert change[[1, 2, 8, 0]].tolist() == [-1.0, -0.75, 0.0, 0.0]


def test_bias_forces_and_forbids_also_when_greedy():
    best = int(logits().argmax())
    assert tokens(logits(), [sampler(temperature=0.0, logit_bias={5: 100.0})]) == [5]
    assert tokens(logits(), [sampler(temperature=0.0, logit_bias={5: 100})]) == [5]
    assert tokens(logits(), [sampler(temperature=0.0, logit_bias={best: -100.0})]) != [best]


def test_logprobs_are_those_of_the_model():
    numbers = logits(2)
    asking = sampler(temperature=0.0, logprobs=True, top_logprobs=3, logit_bias={5: 100.0})
    quiet, asked = sample(numbers, [sampler(), asking])
    expected = numbers[1].log_softmax(-1)
    assert quiet.logprob is None
    assert asked.logprob is not None
    assert asked.logprob.token_id == 5
    assert asked.logprob.logprob == pytest.approx(float(expected[5]))
    values, indices = expected.topk(3)
    assert [token for token, _ in asked.logprob.top] == indices.tolist()
    assert [value for _, value in asked.logprob.top] == pytest.approx(values.tolist())


def test_rows_without_numbers_are_told_apart():
    numbers = logits(3)
    numbers[1, 7] = math.nan
    choices = sample(numbers, [sampler(), sampler(), sampler(temperature=0.0)])
    assert [choice.finite for choice in choices] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("seed", 2**63),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("top_logprobs", 21),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 257,)),
        ("stop", ("",)),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_values_out_of_bounds_are_named(name, value):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert any(character.isdigit() for character in str(caught.value))
