"""Requests that are wrong, or want to do harm."""

import base64
import io
import json
import time

import pytest
from PIL import Image

from tests.serve.helpers import CHAT, chat_body, data_url, picture, refused


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"max_tokens": -1}, "max_tokens", "at least 1, got -1"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"max_tokens": 10**9}, "max_tokens", "context of 512"),
        ({"temperature": -1}, "temperature", "between 0 and 2, got -1"),
        ({"temperature": 1e9}, "temperature", "between 0 and 2"),
        ({"temperature": "hot"}, "temperature", "must be a number, got 'hot'"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"top_p": 1.5}, "top_p", "between 0 and 1"),
        ({"top_k": -7}, "top_k", "got -7"),
        ({"min_p": 2}, "min_p", "between 0 and 1"),
        ({"n": 10**9}, "n", "between 1 and 4, got 1000000000"),
        ({"n": 0}, "n", "got 0"),
        ({"n": 1.5}, "n", "must be an integer"),
        ({"seed": 2**63}, "seed", "9223372036854775807"),
        ({"seed": -(2**64)}, "seed", "-9223372036854775808"),
        ({"top_logprobs": 10**6, "logprobs": True}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"stop": ["x"] * 10_000}, "stop", "up to 16 strings, got 10000"),
        ({"stop": 5}, "stop", "must be a string or an array"),
        ({"stop": ["a", 5]}, "stop[1]", "must be a string"),
        ({"logit_bias": {"5": 1000}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "ids go from 0"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "is no id"),
        ({"logit_bias": {"--5": 1}}, "logit_bias", "'--5' is no id"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "'²' is no id"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "is no id"),
        ({"logit_bias": {"-5": 1}}, "logit_bias", "ids go from 0"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias", "up to 1024"),
        ({"presence_penalty": -3}, "presence_penalty", "between -2 and 2"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": 3}, "stream_options", "must be an object"),
        ({"model": 7}, "model", "must be a string"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": "text"}, "response_format", "must be an object"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "must be an array"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages", "at most 1000"),
        ({"messages": [5]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a string or an array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]", "'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "needs text"),
        ({"messages": [{"role": "user", "content": "y" * 600}]}, "messages", "context of 512"),
        ({"messages": [{"role": "user", "content": "y" * 200_000}]}, "messages", "characters"),
    ],
)
def test_bad_values_are_named(client, change, param, says):
    error = refused(client.post(CHAT, json=chat_body() | change))
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "JSON"),
        (b"not json", "JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"null", "not null"),
        (b"5", "not a number"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"messages": "\xff\xfe"}', "UTF-8"),
        (b'{"messages": "\xed\xa0\x80"}', "UTF-8"),
        (b"\x00" * 100, "JSON"),
    ],
)
def test_bodies_that_are_no_json_objects(client, data, says):
    assert says in refused(client.post(CHAT, content=data))["message"]


def test_odd_but_good_bodies(client):
    assert client.post(
        CHAT, json=chat_body("nul \x00 and \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"))
    ).is_success
    assert client.post(
        CHAT, json=chat_body(unknown_field={"x": [1]}, user="me", response_format={"type": "text"})
    ).is_success
    assert client.post(
        CHAT, json=chat_body(tools=None, tool_choice="none", seed=None, stop=None, temperature=None)
    ).is_success
    assert client.post(CHAT, content=b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()).is_success


def test_large_bodies_are_refused_whether_announced_or_not(client):
    large = json.dumps(chat_body("x" * 400_000)).encode()
    refused(client.post(CHAT, content=large), 413)

    def parts():
        for begin in range(0, len(large), 50_000):
            yield large[begin : begin + 50_000]

    refused(client.post(CHAT, content=parts()), 413)
    assert client.post(CHAT, json=chat_body()).is_success


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.com/a.png", "remote images are off"),
        ("http://169.254.169.254/latest", "remote images are off"),
        ("file:///etc/passwd", "remote images are off"),
        ("/etc/passwd", "remote images are off"),
        ("", "remote images are off"),
        ("data:image/png;base64", "comma"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,ü", "not valid base64"),
        ("data:;base64,", "empty"),
        ("data:image/png;base64," + base64.b64encode(b"<html>no image</html>").decode(), "not an image"),
        ("data:image/png;base64," + "A" * 100_000, "over the limit of 60,000 bytes"),
    ],
)
def test_bad_image_addresses_and_data(client, url, says):
    error = refused(client.post(CHAT, json=chat_body(images=[url])))
    assert says in error["message"]
    assert error["param"] == "messages[0].content[0].image_url"


def test_images_where_they_do_not_belong(client):
    url = data_url(picture(1))
    part = {"type": "image_url", "image_url": {"url": url}}
    for role in ("system", "assistant"):
        error = refused(client.post(CHAT, json=chat_body() | {"messages": [{"role": role, "content": [part]}]}))
        assert "user messages" in error["message"]
    bare = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}
    assert "must be an object" in refused(client.post(CHAT, json=chat_body() | bare))["message"]
    assert refused(client.post(CHAT, json=chat_body(images=[url] * 5)))["code"] == "too_many_images"
    refused(client.post(CHAT, json=chat_body(images=["data:,x"] * 1000)))


def _gif_of(width, height):
    return (
        b"GIF89a"
        + width.to_bytes(2, "little")
        + height.to_bytes(2, "little")
        + b"\x00\x00\x00,\x00\x00\x00\x00"
        + bytes(25)
    )


@pytest.mark.parametrize("kind", ["bomb", "truncated", "claims"])
def test_images_that_are_traps(client, kind):
    buffer = io.BytesIO()
    if kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
        data = buffer.getvalue()
    elif kind == "truncated":
        picture(1, 100, 100).save(buffer, "PNG")
        data = buffer.getvalue()[:500]
    else:
        data = _gif_of(65_000, 65_000)
    begun = time.monotonic()
    error = refused(
        client.post(CHAT, json=chat_body(images=["data:image/png;base64," + base64.b64encode(data).decode()]))
    )
    assert error["code"] in ("invalid_image", "image_too_large")
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("1", "PNG"), ("LA", "PNG"), ("RGB", "WEBP")]
)
def test_any_decodable_image_is_served(client, mode, kind):
    for size in ((1, 1), (30, 20)):
        assert client.post(CHAT, json=chat_body(images=[data_url(Image.new(mode, size), kind)])).is_success


def test_extreme_shapes_cost_little(client):
    begun = time.monotonic()
    for size in ((60_000, 1), (1, 60_000)):
        assert client.post(CHAT, json=chat_body(images=[data_url(Image.new("L", size))])).is_success
    assert time.monotonic() - begun < 2
