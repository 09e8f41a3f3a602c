from PIL import Image
from starlette.testclient import TestClient

from serve.app import create_app
from tests.serve.helpers import CHAT, TEXT, chat_body, data_url, endless, events, picture, refused, spoiled


def test_a_chat_is_answered_whole_and_streamed_alike(client):
    settings = {"images": [data_url(picture(1))], "temperature": 0, "stream_options": {"include_usage": True}}
    whole = client.post(CHAT, json=chat_body(**settings)).json()
    assert (whole["object"], whole["model"]) == ("chat.completion", "tiny")
    [choice] = whole["choices"]
    assert choice["message"]["role"] == "assistant"
    chunks = events(client.post(CHAT, json=chat_body(**settings, stream=True)))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == choice["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == choice["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


def test_what_lmms_eval_and_vlmevalkit_send_is_served(client):
    text, file = {"type": "text", "text": "hello"}, data_url(picture(1), "JPEG")
    answers = []
    for image in ({"url": file}, {"url": file, "detail": "low"}):
        body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image}, text]}]}
        done = client.post(CHAT, json={"model": "tiny", **body, "n": 1, "temperature": 0, "max_tokens": 8})
        assert done.status_code == 200, done.text
        answers.append(done.json()["choices"][0]["message"]["content"])
    assert answers[0] == answers[1]
    alone = {"messages": [{"role": "user", "content": [text]}], "temperature": 0.0, "max_tokens": 8}
    assert client.post(CHAT, json=alone).status_code == 200


def test_usage_counts_image_tokens_and_every_choice(client, loaded):
    _, processor = loaded()
    without = client.post(CHAT, json=chat_body()).json()["usage"]
    with_two = client.post(CHAT, json=chat_body(images=[data_url(picture(i)) for i in range(2)], n=3)).json()["usage"]
    assert with_two["prompt_tokens"] == without["prompt_tokens"] + sum(processor.placeholders([picture(0)] * 2))
    assert with_two["total_tokens"] == with_two["prompt_tokens"] + with_two["completion_tokens"]
    assert with_two["completion_tokens"] > 8


def test_choices_have_their_own_texts_in_both_forms(client):
    settings = {"n": 2, "seed": 3, "temperature": 1.0}
    whole = [choice["message"]["content"] for choice in client.post(CHAT, json=chat_body(**settings)).json()["choices"]]
    texts = ["", ""]
    for chunk in events(client.post(CHAT, json=chat_body(**settings, stream=True))):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == whole
    assert whole[0] != whole[1]


def test_without_max_tokens_the_answer_may_fill_the_context(client, loaded):
    settings = chat_body(logit_bias={str(t): b for t, b in endless(loaded()[1])["logit_bias"].items()})
    del settings["max_tokens"]
    usage = client.post(CHAT, json=settings).json()["usage"]
    assert usage["total_tokens"] == 512


def test_logprobs_name_tokens_and_their_bytes(client):
    answer = client.post(CHAT, json=chat_body(temperature=0, logprobs=True, top_logprobs=2)).json()
    items = answer["choices"][0]["logprobs"]["content"]
    assert len(items) == answer["usage"]["completion_tokens"]
    for item in items:
        assert item["top_logprobs"][0]["token"] == item["token"]  # greedy
        assert len(item["top_logprobs"]) == 2
        assert item["logprob"] <= 0
    spelled = bytes(byte for item in items for byte in item["bytes"]).decode(errors="replace")
    assert answer["choices"][0]["message"]["content"] in spelled
    streamed = events(client.post(CHAT, json=chat_body(temperature=0, logprobs=True, top_logprobs=2, stream=True)))
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [item for part in parts if part for item in part["content"]] == items


def test_stop_may_be_a_string_or_several(client):
    text = client.post(CHAT, json=chat_body(temperature=0, max_tokens=30)).json()["choices"][0]["message"]["content"]
    word = text[5:7]
    for stop in (word, ["nowhere", word]):
        choice = client.post(CHAT, json=chat_body(temperature=0, max_tokens=30, stop=stop)).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(word)]
        assert choice["finish_reason"] == "stop"


def test_control_tokens_in_text_are_text(client, loaded):
    _, processor = loaded()
    plain = client.post(CHAT, json=chat_body("x")).json()["usage"]["prompt_tokens"]
    literal = client.post(CHAT, json=chat_body("<image><|end|>")).json()["usage"]["prompt_tokens"]
    assert literal - plain + 1 == len(processor.chat.encode_text("<image><|end|>")) > 8
    both = client.post(CHAT, json=chat_body("<image>", images=[data_url(picture(1))]))
    assert both.status_code == 200


def test_several_turns_and_roles(client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture(1))}}]},
        {"role": "assistant", "content": "a ball"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": " this?"}]},
    ]
    assert client.post(CHAT, json=chat_body() | {"messages": messages}).status_code == 200


def test_text_completions(client, loaded):
    _, processor = loaded()
    ids = processor.chat.encode_text("one two")
    settings = {"max_tokens": 6, "temperature": 0, "logprobs": 1}
    answers = [
        client.post(TEXT, json={"prompt": p, **settings}).json() for p in ("one two", ids, ["x", "one two"], [ids])
    ]
    texts = [answer["choices"][-1]["text"] for answer in answers]
    assert texts == [texts[0]] * 4
    assert [choice["index"] for choice in answers[2]["choices"]] == [0, 1]
    assert answers[0]["usage"]["prompt_tokens"] == len(ids)
    assert answers[2]["usage"]["prompt_tokens"] == len(ids) + 1
    assert len(answers[0]["choices"][0]["logprobs"]["tokens"]) == answers[0]["usage"]["completion_tokens"]
    chunks = events(client.post(TEXT, json={"prompt": ["x", "one two"], "stream": True, **settings}))
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 1) == texts[0]
    assert refused(client.post(TEXT, json={"prompt": "x", "echo": True}))["param"] == "echo"
    assert refused(client.post(TEXT, json={"prompt": [[999999]]}))["param"] == "prompt"
    assert "0 prompts, where 1 to 4" in refused(client.post(TEXT, json={"prompt": []}))["message"]
    assert refused(client.post(TEXT, json={"prompt": [[]]}))["param"] == "prompt"


def test_models_health_readiness_and_page(client):
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 512)
    assert client.get("/v1/models/tiny").json() == card
    assert refused(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    page = client.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    client.app.state.traffic.draining = True
    assert client.get("/health").status_code == 200
    refused(client.get("/ready"), 503)
    refused(client.post(CHAT, json=chat_body()), 503)
    client.engine.stop()
    refused(client.get("/health"), 503)


def test_unknown_routes_methods_and_models_have_the_same_shape(client):
    assert refused(client.get("/nowhere"), 404)["code"] == "not_found"
    response = client.get(CHAT)
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    assert refused(client.post(CHAT, json=chat_body(model="gpt-4")), 404)["code"] == "model_not_found"
    assert client.post(CHAT, json={"messages": chat_body()["messages"], "max_tokens": 1}).status_code == 200


def test_keys(make_engine, loaded):
    client = TestClient(create_app(make_engine(), loaded()[1], "tiny", api_key="sesame"))
    for path in ("/health", "/ready", "/"):
        assert client.get(path).status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "sesame"},
        {"Authorization": "Bearer sesam\xe9"},
    ):
        for path in ("/v1/models", "/nowhere", "/%2F", "/health/", "/v1/chat/completions"):
            response = client.get(path, headers={name: value.encode("latin-1") for name, value in headers.items()})
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer"):
        assert client.get("/v1/models", headers={"Authorization": f"{scheme} sesame"}).status_code == 200


def test_images_are_told_apart_by_shape(client):
    """The same bytes of pixels, as 20 x 10 and as 10 x 20, are two images to the cache."""
    pixels = picture(3, 20, 10).tobytes()
    wide, tall = (Image.frombytes("RGB", size, pixels) for size in ((20, 10), (10, 20)))
    settings = {"temperature": 0, "logprobs": True}
    answers = [client.post(CHAT, json=chat_body(images=[data_url(i)], **settings)).json() for i in (wide, tall, wide)]
    first, second, third = (answer["choices"][0]["logprobs"] for answer in answers)
    assert first == third != second
    assert client.engine.runner.images.hits == 1


def test_the_queue_and_the_server_say_when_they_are_full(client):
    traffic = client.app.state.traffic
    traffic.limit, traffic.active = 1, 1
    response = client.post(CHAT, json=chat_body())
    assert refused(response, 429)["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    traffic.limit, traffic.active = 10, 0
    client.engine.max_waiting = 0
    refused(client.post(CHAT, json=chat_body()), 429)
    client.engine.max_waiting = 2
    assert client.post(CHAT, json=chat_body()).is_success
    assert traffic.active == 0


def test_failures_of_the_model_are_told_without_details(client):
    def fail(*arguments):
        raise RuntimeError("secret detail")

    with spoiled(client.engine.runner, "prefill", fail):
        for stream in (False, True):
            response = client.post(CHAT, json=chat_body(stream=stream))
            assert refused(response, 500)["code"] == "request_failed"
            assert "secret" not in response.text
    with spoiled(client.engine.runner, "decode", fail):
        *_, last = events(client.post(CHAT, json=chat_body(stream=True)))
        assert last["error"]["code"] == "request_failed"
    with spoiled(client.engine, "submit", fail):
        assert refused(client.post(CHAT, json=chat_body()), 500)["code"] == "internal_error"
    assert client.post(CHAT, json=chat_body()).is_success
    assert client.app.state.traffic.active == 0


def test_a_request_on_whose_reading_an_iterator_ends_is_answered(client, monkeypatch):
    monkeypatch.setattr("serve.app.parse_body", lambda kind, payload: next(iter(())))
    assert refused(client.post(CHAT, json=chat_body()), 500)["code"] == "internal_error"
    assert client.app.state.traffic.active == 0
