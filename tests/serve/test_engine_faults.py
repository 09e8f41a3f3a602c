"""Cancellation, failures, limits: what happens to one request, and that it happens to no other."""

import asyncio
import gc
import time
from dataclasses import replace

import pytest
import torch

from serve.engine import SamplingParams
from serve.errors import DeadlineError, EngineStoppedError, ParameterError, QueueFullError, RequestError
from tests.conftest import build_tiny_model
from tests.serve.helpers import collect, endless, image_input, make_request, picture, run, slowly, spoiled, wait_until
from vlm import load
from vlm.errors import UserError


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_cancelled_request_frees_its_rows_and_others_go_on(make_engine, loaded, how):
    _, processor = loaded("deep", "mlp")
    engine = make_engine("deep", "mlp", max_batch=2)
    endlessly = make_request(processor, "on and on", (picture(1),), **endless(processor))
    patient = make_request(processor, "a short one", (picture(2),), max_tokens=12)
    expected = run(engine, patient)

    async def scene():
        stream = engine.submit(endlessly)
        waiting = asyncio.create_task(collect(engine, patient))
        await anext(stream)
        if how == "close":
            await stream.aclose()
            assert [delta async for delta in stream] == []
        else:
            engine.cancel(endlessly.id)
            rest = [delta async for delta in stream]
            assert sum(len(delta.token_ids) for delta in rest) < 450
            assert all(delta.finish_reason is None for delta in rest)
        running = engine.scheduler.running
        await asyncio.to_thread(wait_until, lambda: endlessly not in [row.ticket.request for row in running], 1.0)
        return await waiting

    # 450 steps would take 4.5 seconds
    with spoiled(engine.runner, "decode", slowly(engine.runner.decode)):
        assert [asyncio.run(scene())] == expected
    assert engine.scheduler.idle


def test_a_loop_that_ends_takes_its_requests_along(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()

    async def leave():
        await anext(engine.submit(make_request(processor, "on and on", **endless(processor))))

    with spoiled(engine.runner, "decode", slowly(engine.runner.decode)):
        asyncio.run(leave())
        wait_until(lambda: engine.scheduler.idle, seconds=1.0)
    assert run(engine, make_request(processor, "next"))[0][0][2]


def test_a_request_that_fails_does_not_hurt_those_admitted_with_it(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine(max_batch=4)
    good = [make_request(processor, f"good {i}", (picture(i),)) for i in range(3)]
    expected = run(engine, *good)
    bad = make_request(processor, "bad", (picture(66),))
    encode = engine.runner.encode

    def fail_on_the_bad_one(images):
        if any(image.key == bad.images[0].key for image in images):
            raise RuntimeError("boom")
        return encode(images)

    async def scene():
        return await asyncio.gather(*(collect(engine, r) for r in [*good[:2], bad, good[2]]), return_exceptions=True)

    with spoiled(engine.runner, "encode", fail_on_the_bad_one):
        first, second, failed, third = asyncio.run(scene())
    assert [first, second, third] == expected
    assert isinstance(failed, RequestError)
    assert "boom" not in str(failed)


@pytest.mark.parametrize(("fusion", "connector"), [("early", "mlp"), ("deep", "mlp")])
def test_an_image_that_gives_no_numbers_poisons_nobody(make_engine, loaded, fusion, connector):
    _, processor = loaded(fusion, connector)
    engine = make_engine(fusion, connector, max_batch=3)
    good = [make_request(processor, f"good {i}", (picture(i),), max_tokens=30) for i in range(4)]
    expected = run(engine, *good)
    good_image = image_input(processor, picture(50))
    bad_image = replace(good_image, pixels={name: values * torch.nan for name, values in good_image.pixels.items()})
    bad = replace(make_request(processor, "bad", (picture(50),)), images=(bad_image,))

    async def scene():
        return await asyncio.gather(*(collect(engine, r) for r in [good[0], bad, *good[1:]]), return_exceptions=True)

    answers = asyncio.run(scene())
    assert isinstance(answers.pop(1), RequestError)
    assert answers == expected


def test_rows_without_numbers_fail_alone_and_leave_nothing_behind(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine(max_batch=3)
    # the short one takes over the bad one's row, and would read what is left there, masked, beside the long one
    bad, long, short = (make_request(processor, text, max_tokens=20) for text in ("bad", "long " * 40, "short"))
    expected = run(engine, long, short)
    prefill = engine.runner.prefill

    def spoil(prompts, first):
        logits = prefill(prompts, first)
        for row, prompt in enumerate(prompts):
            if list(prompt.input_ids) == list(bad.input_ids):
                logits[row] = torch.nan
                for layer in engine.runner.rows.slots:
                    layer.stores[1][first + row] = torch.nan
        return logits

    async def scene():
        return await asyncio.gather(*(collect(engine, r) for r in (bad, long, short)), return_exceptions=True)

    with spoiled(engine.runner, "prefill", spoil):
        failed, *answers = asyncio.run(scene())
    assert isinstance(failed, RequestError)
    assert answers == expected


@pytest.mark.parametrize("where", ["row", "sampler", "text"])
def test_failures_of_one_row_are_its_own(make_engine, loaded, monkeypatch, where):
    _, processor = loaded()
    engine = make_engine(max_batch=4)
    good = [make_request(processor, f"good {i}") for i in range(3)]
    expected = run(engine, *good)
    bad = make_request(processor, "bad", logit_bias={7: 1.0}, stop=("bad",))

    def fail(*arguments):
        raise RuntimeError("boom")

    make_row = engine._make_row

    def make(ticket, choice, prompt):
        row = make_row(ticket, choice, prompt)
        if ticket.request is bad:
            if where == "row":
                fail()
            target, name = (row.sampler, "adjust") if where == "sampler" else (row.detokenizer, "push")
            monkeypatch.setattr(target, name, fail)
        return row

    async def scene():
        return await asyncio.gather(*(collect(engine, r) for r in [good[0], bad, *good[1:]]), return_exceptions=True)

    with spoiled(engine, "_make_row", make):
        answers = asyncio.run(scene())
    assert isinstance(answers.pop(1), RequestError)
    assert answers == expected
    assert engine.alive


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()

    def fail(tokens, positions):
        raise RuntimeError("boom")

    with spoiled(engine.runner, "decode", fail), pytest.raises(RequestError):
        run(engine, make_request(processor, "a"))
    assert run(engine, make_request(processor, "a"))


def test_a_full_queue_says_so_at_once(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine(max_batch=1, max_waiting=2)

    async def scene():
        running = engine.submit(make_request(processor, "runs", **endless(processor)))
        await anext(running)
        waiting = [engine.submit(make_request(processor, "waits")) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(make_request(processor, "too much"))
        await running.aclose()
        return [[delta async for delta in stream] for stream in waiting]

    assert all(asyncio.run(scene()))


def test_deadlines_end_waiting_and_running_requests(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine(max_batch=1)
    long = make_request(processor, "long", **endless(processor))
    soon = time.monotonic() + 0.1
    runs, waits = (replace(long, id=name, deadline=soon) for name in ("runs", "waits"))

    async def scene():
        return await asyncio.gather(collect(engine, runs), collect(engine, waits), return_exceptions=True)

    with spoiled(engine.runner, "decode", slowly(engine.runner.decode)):
        assert [type(answer) for answer in asyncio.run(scene())] == [DeadlineError, DeadlineError]
    wait_until(lambda: engine.scheduler.idle)


def test_requests_that_can_not_be_served_are_refused_with_a_reason(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine(max_batch=2)
    good = make_request(processor, "a", (picture(1),))

    async def refused(**changes):
        with pytest.raises(ParameterError) as caught:
            engine.submit(replace(good, **changes))
        return caught.value.param, str(caught.value)

    sampling = SamplingParams(max_tokens=600)
    assert asyncio.run(refused(n=3)) == ("n", "n must be between 1 and 2, got 3")
    assert asyncio.run(refused(sampling=sampling))[1].endswith("together over the context of 512")
    assert asyncio.run(refused(images=()))[0] == "prompt"
    assert asyncio.run(refused(input_ids=[5, 9999]))[1].startswith("the prompt has token 9999")
    assert asyncio.run(refused(input_ids=[]))[0] == "prompt"
    assert asyncio.run(refused(adapter="other"))[0] == "model"
    assert asyncio.run(refused(sampling=SamplingParams(logit_bias={9999: 1.0})))[0] == "logit_bias"


def test_stopping_ends_what_runs_and_refuses_what_comes(make_engine, loaded):
    _, processor = loaded()
    engine = make_engine()

    async def scene():
        stream = engine.submit(make_request(processor, "long", **endless(processor)))
        await anext(stream)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineStoppedError):
            async for _ in stream:
                pass
        with pytest.raises(EngineStoppedError):
            engine.submit(make_request(processor, "late"))

    assert engine.alive
    asyncio.run(scene())
    assert not engine.alive


def test_language_models_of_another_kind_are_refused(tiny_tokenizer, tmp_path):
    from serve.torch_engine import TorchEngine

    build_tiny_model(tmp_path / "m", tiny_tokenizer, "early", "mlp", model_type="mistral", sliding_window=64)
    with pytest.raises(UserError, match="sliding_attention"):
        TorchEngine(*load(tmp_path / "m"), "tiny")


def test_requests_leave_nothing_behind(make_engine, loaded):
    _, processor = loaded("deep", "perceiver")
    engine = make_engine("deep", "perceiver", max_batch=4, image_cache_bytes=20_000)
    for round_ in range(5):
        run(engine, *(make_request(processor, f"{i}", (picture(round_ * 10 + i),)) for i in range(6)))
    gc.collect()
    wait_until(lambda: engine.scheduler.idle)
    assert engine.runner.images.bytes <= 20_000
    assert not engine.scheduler.running
