import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.cache import ImageCache, SlotCache, check_cacheable, size_of
from tests.serve.helpers import spoiled
from vlm import Visual
from vlm.errors import UserError


def llama(**settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=1024,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def test_rows_of_different_lengths_decode_as_each_would_alone():
    model = llama()
    prompts = [torch.randint(60, (length,)).tolist() for length in (3, 300, 20)]  # 300 is beyond the first allocation
    cache = SlotCache(2, max_rows=8, max_length=1024)
    for row, prompt in enumerate(prompts):
        cache.begin_prefill(row, 1, len(prompt))
        model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    tokens = [[5], [6], [7]]
    for step in range(3):
        positions = [len(prompt) + step for prompt in prompts]
        at = cache.begin_decode(positions, model.device)
        mask = (torch.arange(max(positions) + 1) <= at[:, None])[:, None, None]
        logits = model(
            input_ids=torch.tensor([row[-1:] for row in tokens]),
            attention_mask=mask,
            position_ids=at[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        for row, prompt in enumerate(prompts):
            alone = model(input_ids=torch.tensor([prompt + tokens[row]])).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
            tokens[row].append(int(alone.argmax()))


def test_it_grows_by_need_and_keeps_what_it_holds():
    cache = SlotCache(1, max_rows=10, max_length=700)
    keys = torch.randn(1, 2, 5, 4)
    cache.begin_prefill(0, 1, 5)
    cache.update(keys, keys, 0)
    cache.reserve(9, 600)
    store = cache.slots[0].stores[0]
    assert (store.shape[0], store.shape[2]) == (9, 600)
    assert torch.equal(store[0, :, :5], keys[0])
    cache.reserve(10, 650)
    assert cache.slots[0].stores[1].shape == (10, 2, 700, 4)
    with pytest.raises(AssertionError):
        cache.reserve(11, 1)


def test_a_growth_that_fails_leaves_the_old_size():
    cache = SlotCache(2, max_rows=10, max_length=700)
    keys = torch.randn(1, 2, 5, 4)
    cache.begin_prefill(0, 1, 5)
    for layer in range(2):
        cache.update(keys, keys, layer)
    resize, calls = cache.slots[1].resize, []

    def fail_once(rows, length):
        calls.append((rows, length))
        if len(calls) == 1:
            raise MemoryError
        resize(rows, length)

    with spoiled(cache.slots[1], "resize", fail_once), pytest.raises(MemoryError):
        cache.reserve(9, 600)
    assert {store.shape for layer in cache.slots for store in layer.stores} == {(4, 2, 256, 4)}
    assert torch.equal(cache.slots[0].stores[0][0, :, :5], keys[0])
    cache.reserve(9, 600)
    assert cache.slots[1].stores[1].shape == (9, 2, 600, 4)


def test_rows_are_copied_and_wiped():
    cache = SlotCache(1, max_rows=4, max_length=64)
    cache.begin_prefill(0, 1, 3)
    cache.update(torch.full((1, 1, 3, 2), torch.nan), torch.ones(1, 1, 3, 2), 0)
    cache.copy_row(0, 2, 2)
    keys, values = cache.slots[0].stores
    assert keys[2].isnan().sum() == 4
    assert values[2].sum() == 4
    cache.clear_rows(0, 3)
    assert keys.abs().sum() == 0
    assert values.sum() == 0


def visual(tokens):
    return Visual(torch.zeros(tokens, 8), (tokens,))


def test_the_image_cache_forgets_the_least_recently_used():
    cache = ImageCache(max_bytes=3 * size_of(visual(1)))
    for key in "abc":
        cache.put(key, visual(1))
    assert cache.get("a") is not None
    cache.put("d", visual(1))
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    cache.put("big", visual(100))
    assert (len(cache), cache.bytes) == (0, 0)


def test_ready_keys_and_values_count_as_bytes():
    layers = ((torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)),) * 3
    assert size_of(visual(1).with_layers(layers)) == 4 * (8 + 3 * 2 * 8)


def test_language_models_with_windows_or_states_are_refused():
    check_cacheable(AutoConfig.for_model("llama"))
    check_cacheable(AutoConfig.for_model("qwen2"))
    check_cacheable(AutoConfig.for_model("mistral", sliding_window=4096, max_position_embeddings=4096))
    for config in (
        AutoConfig.for_model("mistral", sliding_window=128, max_position_embeddings=4096),
        AutoConfig.for_model("gemma3_text"),
        AutoConfig.for_model("qwen3_next"),
    ):
        with pytest.raises(UserError, match="full attention"):
            check_cacheable(config)
