import asyncio
from dataclasses import replace

import pytest
import torch

from serve.engine import Request, SamplingParams
from serve.errors import ParameterError
from serve.torch_engine import TorchEngine
from tests.conftest import build_tiny_model
from tests.serve.helpers import chat_ids, endless, make_request, picture, run, spoiled
from tests.serve.vllm_models import KINDS, Oracle, ask_engine, assert_same_tokens, build, cases
from vlm import UserError, load

PAIRS = [(fusion, connector) for fusion in ("early", "deep") for connector in ("mlp", "perceiver")]


def same_tokens(model, processor, request, images, answer):
    """Equal to generate's, or first different where generate's two best logits are within 1e-3."""
    length = len(request.input_ids)
    oracle = model.generate(
        torch.tensor([request.input_ids]),
        **(processor.pixels(images) if images else {}),
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = oracle.sequences[0, length:].tolist()
    for step, (ours, theirs) in enumerate(zip(answer, expected, strict=False)):
        if ours != theirs:
            best = oracle.logits[step][0].topk(2).values
            return float(best[0] - best[1]) < 1e-3
    return len(answer) == len(expected)


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_greedy_is_generate_alone_and_batched_and_staggered(make_engine, loaded, fusion, connector):
    model, processor = loaded(fusion, connector)
    engine = make_engine(fusion, connector, max_batch=5, prefill_tokens=200)
    pictures = [tuple(picture(10 * i + j) for j in range(i % 3)) for i in range(12)]
    requests = [
        make_request(processor, "what colour is it? " * (i % 4), images, max_tokens=8 + 5 * (i % 5))
        for i, images in enumerate(pictures)
    ]
    alone = [run(engine, request)[0] for request in requests[:4]]
    batched = run(engine, *requests)
    staggered = run(engine, *requests, stagger=0.01)
    for answers in (alone, batched, staggered):
        for request, images, [(ids, text, finish)] in zip(requests, pictures, answers, strict=False):
            assert same_tokens(model, processor, request, images, ids)
            assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
            assert finish == ("stop" if ids[-1] == processor.tokenizer.eos_token_id else "length")
    assert engine.runner.images.hits > 0
    assert len({tuple(ids) for [(ids, _, _)] in batched}) > 6  # not all the same by some collapse


@pytest.mark.parametrize("kind", [kind for kind, settings in KINDS.items() if "gemma" not in str(settings)])
def test_images_of_all_sizes_are_answered_as_generate_does(kind, tmp_path):
    build(tmp_path / "m", kind)
    model, processor = load(tmp_path / "m")
    oracle, asked = Oracle(model, processor), cases(18)
    assert_same_tokens(oracle, asked, ask_engine(TorchEngine(model, processor, "tiny", max_batch=4), oracle, asked))


def test_a_window_that_slides_is_refused(tmp_path):
    build(tmp_path / "m", next(kind for kind, settings in KINDS.items() if "gemma" in str(settings)))
    with pytest.raises(UserError, match="full attention only; this gemma3_text model"):
        TorchEngine(*load(tmp_path / "m"), "tiny")


def test_all_images_are_seen_where_the_model_attends_to_all(tiny_tokenizer, tmp_path):
    build_tiny_model(tmp_path / "m", tiny_tokenizer, "deep", "perceiver")
    model, processor = load(tmp_path / "m")
    model.config.cross_attention = {**model.config.cross_attention, "attend": "all"}
    engine = TorchEngine(model, processor, "tiny")
    engine.start()
    images = [(picture(1), picture(2), picture(3)), (picture(4),), ()]
    requests = [make_request(processor, "and now?", shown, max_tokens=20) for shown in images]
    answers = run(engine, *requests)
    engine.stop()
    for request, shown, [(ids, _, _)] in zip(requests, images, answers, strict=True):
        assert same_tokens(model, processor, request, shown, ids)


def test_sampled_text_depends_on_the_seed_alone(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()
    request = make_request(processor, "tell me", (picture(1),), temperature=0.9, seed=11, max_tokens=24)
    alone = run(engine, request)[0]
    others = [make_request(processor, "x" * i, temperature=1.5, max_tokens=30) for i in range(6)]
    crowded = run(engine, *others[:3], replace(request, id="again"), *others[3:])[3]
    assert crowded == alone
    other_seed = replace(request, id="other", sampling=replace(request.sampling, seed=12))
    assert run(engine, other_seed)[0] != alone


def test_the_repetition_penalty_is_generates(make_engine, loaded):
    model, processor = loaded()
    engine = make_engine()
    request = make_request(processor, "tell me", max_tokens=40, repetition_penalty=1.3)
    [(ids, _, _)] = run(engine, request)[0]
    prompt = torch.tensor([request.input_ids])
    oracle = model.generate(prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    assert ids == oracle[0, prompt.shape[1] :].tolist()


def test_choices_share_the_prompt_and_differ_by_their_numbers(make_engine, loaded):
    _, processor = loaded("deep", "mlp")
    engine = make_engine("deep", "mlp", max_batch=4)
    prompts = []
    prefill = engine.runner.prefill
    with spoiled(engine.runner, "prefill", lambda part, first: prompts.append(len(part)) or prefill(part, first)):
        request = make_request(processor, "tell me", (picture(1),), n=3, temperature=1.0, seed=5, max_tokens=12)
        choices = run(engine, request)[0]
    assert prompts == [1]
    assert len({text for _, text, _ in choices}) == 3
    single = replace(request, id="single", n=1)
    assert run(engine, single)[0][0] == choices[0]
    greedy = make_request(processor, "tell me", (picture(1),), n=3)
    assert len({tuple(ids) for ids, _, _ in run(engine, greedy)[0]}) == 1


def test_usage_comes_with_the_last_delta_of_each_choice(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()

    async def deltas(stream):
        request = replace(make_request(processor, "a", (picture(1),), n=2, max_tokens=6), stream=stream)
        return request, [delta async for delta in engine.submit(request)]

    for stream in (True, False):
        request, parts = asyncio.run(deltas(stream))
        last = [part for part in parts if part.finish_reason]
        assert len(last) == 2
        assert {part.usage.prompt_tokens for part in last} == {len(request.input_ids)}
        assert len(request.input_ids) > processor.placeholders([picture(0)])[0]
        assert all(part.usage is None for part in parts if not part.finish_reason)
        assert sum(len(part.token_ids) for part in parts) == sum(part.usage.completion_tokens for part in last)
    assert len(parts) == 2  # one whole delta per choice when nothing is streamed


def test_stop_strings_end_an_answer(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()
    [(ids, text, _)] = run(engine, make_request(processor, "tell me", max_tokens=40, temperature=0.0))[0]
    word = text[len(text) // 2 :][:2]
    [(cut_ids, cut, finish)] = run(engine, make_request(processor, "tell me", max_tokens=40, stop=(word,)))[0]
    assert (cut, finish) == (text[: text.index(word)], "stop")
    assert len(cut_ids) < len(ids)


def test_scores_are_the_sums_of_the_models_own_log_probabilities(make_engine, loaded):
    model, processor = loaded("deep", "perceiver")
    engine = make_engine("deep", "perceiver")
    request = make_request(processor, "which?", (picture(3),))
    continuation = processor.chat.encode_text("the red ball")
    ids = torch.tensor([[*request.input_ids, *continuation]])
    logits = model(input_ids=ids, **processor.pixels([picture(3)])).logits[0]
    logprobs = logits[len(request.input_ids) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(continuation)[:, None]).sum()
    score = asyncio.run(engine.score(request.input_ids, request.images, continuation))
    assert score == pytest.approx(expected.item(), abs=1e-3)
    with pytest.raises(ParameterError):
        asyncio.run(engine.score(request.input_ids, request.images, []))


def test_it_fills_the_context_to_the_last_token(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()
    ids = chat_ids(processor, "x" * 100)
    settings = {**endless(processor), "max_tokens": engine.info.context_length - len(ids), "temperature": 0.0}
    [(answer, _, finish)] = run(engine, Request("full", ids, (), SamplingParams(**settings)))[0]
    assert (len(answer), finish) == (settings["max_tokens"], "length")
