"""`VisionLanguageModel`: a vision tower, a connector and a causal LM, fused early (LLaVA) or deep (Flamingo)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm.configuration import VisionLanguageConfig
from vlm.cross_attention import GatedCrossAttention, carried, insert_blocks
from vlm.encoding import EncodesImages, make_connector
from vlm.fusion import Media, MediaLayout, index_media, lay_out_media
from vlm.resampler import LATENT_STD, PerceiverResampler
from vlm.vision import VisionTower
from vlm.visual import Visual

PIXELS = ("pixel_values", "image_sizes", "second_pixel_values")  # what a processor makes of images


@dataclass
class VisionLanguageOutput(CausalLMOutputWithPast):
    """The LM's output and, for the next decoding step, the images and which of them every token sees."""

    visual: Visual | None = None
    media_index: torch.Tensor | None = None
    document_start: torch.Tensor | None = None


class VisionLanguageModel(EncodesImages, PreTrainedModel, GenerationMixin):
    """Early fusion puts visual tokens in the place of image tokens; deep fusion lets the LM's layers attend to them."""

    config_class = VisionLanguageConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "visual"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        vision_config: Any = config.vision_config
        text_config: Any = config.text_config
        connector = config.connector_settings
        self.vision_tower = VisionTower(vision_config, config.vision_feature_layer, config.vision_feature_select)
        self.language_model = AutoModelForCausalLM.from_config(text_config)
        patch_width, width = self.vision_tower.feature_size, text_config.hidden_size
        self.second_vision_tower: VisionTower | None = None
        if config.second_vision_config is not None:
            second: Any = config.second_vision_config
            self.second_vision_tower = VisionTower(second, config.second_vision_feature_layer, "patch")
            patch_width += self.second_vision_tower.feature_size
        deep = config.fusion == "deep"
        keeps_width = deep and connector.type == "perceiver"
        self.multi_modal_projector = make_connector(config, patch_width, None if keeps_width else width)
        media_width = patch_width if keeps_width else width
        anyres = config.image_tokens.mode == "anyres"
        self.image_newline = nn.Parameter(torch.empty(media_width)) if anyres else None
        self.cross_attention = (
            insert_blocks(decoder_layers(self.language_model), config.cross_attention_settings, width, media_width)
            if deep
            else nn.ModuleDict()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_output_embeddings()
        return embeddings

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.language_model.get_decoder()
        return decoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            nn.init.normal_(module.latents, std=LATENT_STD)
            if module.positions is not None:
                nn.init.normal_(module.positions, std=self.config.connector_settings.position_std)
        elif isinstance(module, GatedCrossAttention):
            nn.init.zeros_(module.attn_gate)
            nn.init.zeros_(module.ff_gate)
        elif module is self and self.image_newline is not None:
            nn.init.normal_(self.image_newline, std=self.image_newline.shape[0] ** -0.5)  # as LLaVA-NeXT

    def project_layers(self, visual: Visual) -> Visual:
        """Deep fusion: the images with the keys and values of every gated block made ready, for repeated decoding."""
        blocks = [block for block in self.cross_attention.values() if isinstance(block, GatedCrossAttention)]
        return visual.with_layers([block.project(visual.tokens) for block in blocks])

    def index_media(
        self, input_ids: torch.Tensor, visual: Visual, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """media_index and document_start [B, T] of a prompt; ValueError when placeholders and images don't match."""
        placeholders = visual.lengths if self.config.fusion == "early" else (1,) * len(visual)
        return index_media(input_ids, self.config.image_token_id, placeholders, position_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        second_pixel_values: torch.Tensor | None = None,
        visual: Visual | None = None,
        media_index: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        media_layout: MediaLayout | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> VisionLanguageOutput:
        """One step of the LM over text and images.

        input_ids: [B, T] with image tokens; pixel_values, image_sizes and second_pixel_values of all images in reading
        order (see `encode_images`), or `visual`, what `encode_images` made of them. media_index and document_start:
        [B, T], see `fusion.index_media`; found from the image tokens when left out (a prompt), required when decoding
        deep fusion from a cache. Images that no token refers to take part with weight zero. media_layout: what follows
        from the three in deep fusion, for a decoding loop that keeps it between steps. Raises ValueError when image
        tokens and images don't match.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if visual is None and pixel_values is not None:
            visual = self.encode_images(pixel_values, image_sizes, second_pixel_values)
        if media_index is None and input_ids is not None and self.config.image_token_id is not None:
            cached = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
            if not cached:
                shown = visual or Visual(inputs_embeds.new_zeros(0, 1), ())
                media_index, document_start = self.index_media(input_ids, shown, position_ids)
        layer_kwargs: dict[str, Any] = {}
        if visual is not None and self.config.fusion == "early":
            if input_ids is None:
                raise ValueError("images need input_ids, too: their places can't be found in inputs_embeds")
            inputs_embeds = self._scatter(input_ids, inputs_embeds, visual, unseen=media_index is not None)
        elif visual is not None:
            if media_layout is None:
                if media_index is None or document_start is None:
                    raise ValueError("decoding with images from a cache needs media_index and document_start")
                attend = self.config.cross_attention_settings.attend
                media_layout = lay_out_media(media_index, document_start, visual.lengths, attend)
            if use_cache and not self.training and not visual.layers:
                visual = self.project_layers(visual)
            layer_kwargs = {"media": Media(visual, media_layout)}
        with carried(layer_kwargs.get("media")):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **layer_kwargs,
                **kwargs,
            )
        return VisionLanguageOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual=visual if self.config.fusion == "deep" else None,
            media_index=media_index,
            document_start=document_start,
        )

    def _scatter(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, visual: Visual, unseen: bool
    ) -> torch.Tensor:
        """unseen: the images may be there for no token at all, so that the vision path runs on every rank."""
        tokens = visual.tokens.to(inputs_embeds.dtype)
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        found = int(mask.sum())
        if found != len(tokens) and not (unseen and not found):
            raise ValueError(f"the text has {found} image tokens, but its {len(visual)} images need {len(tokens)}")
        return inputs_embeds.masked_scatter(mask, tokens)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        length = (
            inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else inputs["inputs_embeds"].shape[1]
        )
        for name in ("media_index", "document_start"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][:, -length:]
        # without a cache every step is a prompt of its own, and needs its images again
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            inputs.update(dict.fromkeys(PIXELS))
            if self.config.fusion == "early":
                inputs["visual"] = None
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if outputs.get("visual") is not None:
            kwargs["visual"] = outputs.visual
            for name in ("media_index", "document_start"):
                known = kwargs.get(name)
                known = outputs[name] if known is None else known
                kwargs[name] = torch.cat([known, known[:, -1:].expand(-1, num_new_tokens)], dim=1)
        return kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Beams and copies share the images of their prompt: each is encoded once and never repeated in deep fusion."""
        pixels = {name: model_kwargs.pop(name) for name in PIXELS if model_kwargs.get(name) is not None}
        visual = model_kwargs.get("visual")
        if expand_size == 1 or input_ids is None or (visual is None and not pixels):
            model_kwargs.update(pixels)
            expanded: tuple[torch.Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
            return expanded
        visual = self.encode_images(**pixels) if visual is None else visual
        if model_kwargs.get("media_index") is None:
            indexed = self.index_media(input_ids, visual, model_kwargs.get("position_ids"))
            model_kwargs["media_index"], model_kwargs["document_start"] = indexed
        if self.config.fusion == "early":
            rows = model_kwargs.pop("media_index").tolist()
            model_kwargs.pop("document_start")
            slots = [sorted(set(row) - {0}) for row in rows for _ in range(expand_size)]
            visual = visual.select([slot for row in slots for slot in row])
        model_kwargs["visual"] = visual
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


def decoder_layers(language_model: Any) -> nn.ModuleList:
    """The decoder layers of a causal LM of transformers: the one list of that many modules outside of all lists.

    ValueError for a model that has none, or several.
    """
    decoder, count = language_model.get_decoder(), language_model.config.num_hidden_layers
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [
        layers
        for name, layers in lists.items()
        if len(layers) == count and not any(name.startswith(f"{other}.") for other in lists)
    ]
    if len(outer) != 1:
        kind = type(language_model).__name__
        raise ValueError(f"{kind} keeps its {count} decoder layers in an unknown place: deep fusion can't enter")
    return outer[0]
