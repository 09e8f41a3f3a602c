"""Folders of the original LLaVA against transformers' class with the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, LlavaImageProcessorPil

from tests.vlm.chats import picture, user
from tests.vlm.llavas import PINPOINTS, SIZE, TEXT, VISION, edit, make_llava, write
from tests.vlm.test_convert_llava import held, ours, take, theirs
from vlm import UserError, load
from vlm.convert.importing import import_model

THEIR_TEXT = {name: value for name, value in TEXT.items() if name not in ("model_type", "rope_parameters")}


@pytest.fixture(scope="session", params=[False, True], ids=["square", "anyres"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """The same model as transformers keeps it."""
    folder = tmp_path_factory.mktemp("twin") / "twin"
    return make_llava(folder, tiny_tokenizer, anyres=request.param)


def original(twin: Path, folder: Path, tower: Path, safetensors: bool = False) -> Path:
    """What LLaVA's own code saves of the twin: the language side in one folder, the tower in another."""
    shutil.copytree(twin, folder, ignore=shutil.ignore_patterns("*.safetensors", "processor_config.json"))
    anyres = json.loads((twin / "config.json").read_text())["model_type"] == "llava_next"
    write(
        folder / "config.json",
        {
            **THEIR_TEXT,
            "rope_theta": 500000.0,
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "torch_dtype": "float32",
            "mm_vision_tower": str(tower),
            "mm_hidden_size": 32,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "anyres" if anyres else "square",
            **({"image_grid_pinpoints": [[w, h] for h, w in PINPOINTS]} if anyres else {}),
            **({"mm_patch_merge_type": "spatial_unpad"} if anyres else {}),
        },
    )
    clip = CLIPModel(
        CLIPConfig(
            vision_config={k: v for k, v in VISION.items() if k != "model_type"},
            text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    ).state_dict()
    language = {}
    for name, tensor in load_file(twin / "model.safetensors").items():
        if name.startswith("vision_tower."):
            clip["vision_model." + name.removeprefix("vision_tower.")] = tensor
        elif name.startswith("multi_modal_projector."):
            index = {"linear_1": "0", "linear_2": "2"}[name.split(".")[1]]
            language[f"model.mm_projector.{index}.{name.split('.')[2]}"] = tensor
        elif name == "image_newline":
            language["model.image_newline"] = tensor
        else:
            language[name.removeprefix("language_model.")] = tensor
    tower.mkdir()
    torch.save(clip, tower / "pytorch_model.bin")
    write(tower / "config.json", {"model_type": "clip", "vision_config": VISION, "text_config": {"hidden_size": 16}})
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(tower)
    if safetensors:
        save_file(language, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    # in two files, with the index of a pickled checkpoint
    names = sorted(language)
    files = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in files.items():
        torch.save({name: language[name] for name in own}, folder / file)
    index = {name: file for file, own in files.items() for name in own}
    write(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": index})
    return folder


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_whole_model_equals_its_twin(twin: Path, tmp_path: Path, safetensors: bool) -> None:
    source = original(twin, tmp_path / "any-name", tmp_path / "tower", safetensors)
    imported = take(source, tmp_path / "imported")
    expected = held(take(twin, tmp_path / "twin"))
    got = held(imported)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    torch.testing.assert_close(ours(imported), theirs(twin), rtol=0, atol=1e-5)


@pytest.fixture
def folder(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """An original folder beside its tower, to be changed."""
    twin = make_llava(tmp_path / "twin", tiny_tokenizer)
    source = original(twin, tmp_path / "source", tmp_path / "tower", safetensors=True)
    shutil.rmtree(twin)
    return source


def test_a_tower_that_was_trained_is_taken_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    language, tower = load_file(folder / "model.safetensors"), torch.load(tmp_path / "tower" / "pytorch_model.bin")
    inside = {
        f"model.vision_tower.vision_tower.{name}": tensor + 1
        for name, tensor in tower.items()
        if "vision_model" in name
    }
    save_file({**language, **inside}, folder / "model.safetensors", metadata={"format": "pt"})
    got = held(take(folder, tmp_path / "out"))
    name = "embeddings.class_embedding"
    assert torch.equal(got[f"vision_tower.encoder.{name}"], tower[f"vision_model.{name}"] + 1)


def split_language_model(folder: Path, lm: Path) -> dict[str, torch.Tensor]:
    """Moves all but the projector into a folder of its own; returns the projector."""
    shutil.copytree(folder, lm)
    held = load_file(folder / "model.safetensors")
    projector = {name: tensor for name, tensor in held.items() if "mm_projector" in name}
    rest = {name: tensor for name, tensor in held.items() if name not in projector}
    save_file(rest, lm / "model.safetensors", metadata={"format": "pt"})
    write(lm / "config.json", {**TEXT, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]})
    (folder / "model.safetensors").unlink()
    return projector


def test_a_projector_alone_joins_its_language_model(folder: Path, tmp_path: Path) -> None:
    whole = held(take(folder, tmp_path / "whole"))
    projector = split_language_model(folder, tmp_path / "lm")
    torch.save(projector, folder / "mm_projector.bin")
    with pytest.raises(UserError, match="only a projector; name its language model with --base"):
        take(folder, tmp_path / "none")
    joined = held(take(folder, tmp_path / "joined", base=str(tmp_path / "lm")))
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


@pytest.mark.parametrize("pickled", [False, True])
def test_of_a_tower_on_the_hub_pickles_are_fetched_only_where_there_is_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    tower, asked = tmp_path / "tower", list[str]()
    if not pickled:
        tensors = torch.load(tower / "pytorch_model.bin")
        save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some/tower"
        asked.extend(allow_patterns)
        return str(tower)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    take(folder, tmp_path / "out", vision_tower="some/tower")
    assert "*.safetensors" in asked
    assert ("*.bin" in asked) == pickled


def lora_checkpoint(folder: Path, lm: Path, **settings: Any) -> dict[str, torch.Tensor]:
    projector = split_language_model(folder, lm)
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()}, folder / "non_lora_trainables.bin"
    )
    torch.manual_seed(0)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    lora = {name.format("A"): torch.randn(4, 32), name.format("B"): torch.randn(32, 4)}
    torch.save(lora, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": str(lm), **settings}
    write(folder / "adapter_config.json", config)
    return lora


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 1.5), (True, 3.0)])
def test_a_lora_checkpoint_is_merged(folder: Path, tmp_path: Path, rslora: bool, scaling: float) -> None:
    whole = held(take(folder, tmp_path / "whole"))
    a, b = lora_checkpoint(folder, tmp_path / "lm", use_rslora=rslora).values()
    merged = held(take(folder, tmp_path / "merged"))
    assert merged.keys() == whole.keys()
    changed = "language_model.model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[changed], whole[changed] + scaling * torch.einsum("or,ri->oi", b, a))
    assert all(torch.equal(merged[name], whole[name]) for name in whole if name != changed)


def test_an_image_token_is_added_with_the_mean_of_the_others(folder: Path, tmp_path: Path) -> None:
    forget_image_token(folder)
    tensors = load_file(folder / "model.safetensors")
    few = {
        name: tensor[:304] if name in ("lm_head.weight", "model.embed_tokens.weight") else tensor
        for name, tensor in tensors.items()
    }
    save_file(
        {name: tensor.clone() for name, tensor in few.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    edit(folder / "config.json", vocab_size=304)
    notes = import_model(str(folder), tmp_path / "out", lambda *_: None)
    assert any(note.startswith("<image> was added as token 304; its row is the mean") for note in notes)
    model, processor = load(tmp_path / "out")
    assert processor.image_token_id == model.config.image_token_id == 304
    for tensor in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert tensor.shape[0] == 305
        torch.testing.assert_close(tensor[304], tensor[:304].mean(0), rtol=1e-5, atol=1e-6)
    assert ours(tmp_path / "out").isfinite().all()


def forget_image_token(folder: Path) -> None:
    """The tokenizer is left with 304 tokens, the last of which moves to the image token's place."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    vocabulary = content["model"]["vocab"]
    number = vocabulary.pop("<image>")
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = number
    write(folder / "tokenizer.json", content)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["extra_special_tokens"].remove("<image>")
    write(folder / "tokenizer_config.json", config)


def test_images_are_padded_where_the_model_was_trained_so(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", image_aspect_ratio="pad")
    notes = import_model(str(folder), tmp_path / "out", lambda *_: None)
    assert any("padded to squares with the mean colour" in note for note in notes)
    _, processor = load(tmp_path / "out")
    wide = picture(3, 90, 30)
    pixels = processor.pixels([wide])["pixel_values"][0]
    square = wide.crop((0, -30, 90, 60))  # black where there was nothing
    square.paste((102, 127, 153), (0, 0, 90, 30))
    square.paste((102, 127, 153), (0, 60, 90, 90))
    by_hand = CLIPImageProcessorPil.from_pretrained(tmp_path / "tower")(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, by_hand, rtol=0, atol=1e-6)
    assert isinstance(processor.image_processor, LlavaImageProcessorPil)


def test_vicunas_template_is_taken_only_where_there_is_none_and_for_llama(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    notes = import_model(str(folder), tmp_path / "out", lambda *_: None)
    assert any("vicuna_v1 is used" in note for note in notes)
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure?"},
    ]
    _, processor = load(tmp_path / "out")
    said = processor.chat.renderer.render(chat, add_generation_prompt=True)
    assert (
        "".join(segment.text for segment in said)
        == SYSTEM + "USER: <image>\nwhat? ASSISTANT: a cat<|end|>USER: sure? ASSISTANT:"
    )
    edit(folder / "config.json", model_type="llava_mistral")
    with pytest.raises(UserError, match="give one with --chat-template FILE"):
        take(folder, tmp_path / "mistral")


# llava/conversation.py, conv_vicuna_v1
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def use_sentencepiece(folder: Path, legacy: bool) -> Any:
    """Puts a Llama's slow tokenizer into the folder; returns what reads it."""
    import sentencepiece

    texts = ["USER: what is this? ASSISTANT: a cat on a mat."] * 20
    model = folder / "tokenizer.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    write(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_slow_tokenizer_gives_the_tokens_of_llavas_own_code(folder: Path, tmp_path: Path, legacy: bool) -> None:
    pytest.importorskip("sentencepiece")
    slow = use_sentencepiece(folder, legacy)
    _, processor = load(take(folder, tmp_path / "out"))
    image = processor.image_token_id
    got = processor.chat.encode(user(None, "what is this?"), [1], add_generation_prompt=True).input_ids
    # llava/mm_utils.py, tokenizer_image_token: the stretches between images one by one, one beginning before all
    assert got == [1, *slow.encode(SYSTEM + "USER: "), image, *slow.encode("\nwhat is this? ASSISTANT:")]
    assert slow.encode("\n")[0] == slow.piece_to_id("▁")


def test_a_slow_tokenizer_asks_for_what_reads_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("vlm.convert.sources.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs sentencepiece: pip install 'vlm\[sentencepiece\]'"):
        take(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("written", "pinpoints"),
    [
        ("[[32, 64], (96, 32)]", [[64, 32], [32, 96]]),
        ("(1x1),...,(2x3)", [[32, 32], [64, 32], [96, 32], [32, 64], [64, 64], [96, 64]]),
    ],
)
def test_sizes_of_tiles_may_be_written_as_text(
    folder: Path, tmp_path: Path, written: str, pinpoints: list[list[int]]
) -> None:
    edit(folder / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints=written)
    out = take(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tiling"]["pinpoints"] == pinpoints
