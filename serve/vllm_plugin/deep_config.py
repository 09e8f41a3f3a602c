"""vLLM's settings for deep fusion: what can't work is refused by name, what follows from the model is set."""

from math import prod

from vllm.config import CompilationConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from serve.vllm_plugin.names import MEDIA_OPERATION
from vlm.configuration import VisionLanguageConfig
from vlm.fusion import gated_layer_indices

log = init_logger("vllm.vlm")  # below vLLM's own name, so that its settings show it
KEPT_OUT_OF_GRAPHS = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")


class DeepConfig(VerifyAndUpdateConfig):
    """vLLM calls this once, when it has all its settings and nothing is loaded yet."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        _refuse(vllm_config)
        _keep_operation_out_of_graphs(vllm_config.compilation_config)
        config: VisionLanguageConfig = vllm_config.model_config.hf_config
        limit, text = image_limit(vllm_config), config.get_text_config()
        # vLLM counts an image as the one token that stands for it, and would encode and keep as many images as tokens.
        # So it's told how many give that many visual tokens, as in early fusion
        scheduler = vllm_config.scheduler_config
        images = max(limit, scheduler.max_num_batched_tokens // visual_tokens(config))
        scheduler.max_num_encoder_input_tokens = scheduler.encoder_cache_size = images
        shapes, size = state_shape(vllm_config), vllm_config.model_config.dtype.itemsize
        layers = len(gated_layer_indices(config.cross_attention_settings, text.num_hidden_layers))
        megabytes = layers * size * sum(prod(shape) for shape in shapes[:2]) / 1e6
        log.info(
            "Deep fusion: up to %d images a request, whose keys and values take %.2f MB on each rank; up to %d images "
            "are encoded in a step; %d tokens a step, %d requests at a time.",
            limit,
            megabytes,
            images,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
        )


def visual_tokens(config: VisionLanguageConfig) -> int:
    """Of an image that has as many as any."""
    return config.image_tokens.visual(*config.image_tokens.largest)


def image_limit(vllm_config: VllmConfig) -> int:
    limit: int = vllm_config.model_config.get_multimodal_config().get_limit_per_prompt("image")
    return limit


def state_shape(vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
    """What a request keeps of its images for one gated block on each rank: keys, values, and whose they are."""
    config: VisionLanguageConfig = vllm_config.model_config.hf_config
    settings, ranks = config.cross_attention_settings, vllm_config.parallel_config.tensor_parallel_size
    tokens = image_limit(vllm_config) * visual_tokens(config)
    heads = settings.heads // ranks if can_be_cut(config, ranks) else settings.heads
    return (tokens, heads, settings.head_dim), (tokens, heads, settings.head_dim), (tokens,)


def can_be_cut(config: VisionLanguageConfig, ranks: int) -> bool:
    """Whether gated blocks can be dealt over the ranks; they are whole on each where not."""
    settings, text = config.cross_attention_settings, config.get_text_config()
    return all(size % ranks == 0 for size in (settings.heads, text.hidden_size * settings.ff_mult))


def _refuse(vllm_config: VllmConfig) -> None:
    parallel, cache, compilation = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.compilation_config
    contexts = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    asked = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": contexts > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "prefix caching": cache.enable_prefix_caching,
        "prefix caching of states": cache.mamba_cache_mode != "none",
        "transfer of the cache": vllm_config.kv_transfer_config is not None,
        "offloading of the cache": cache.kv_offloading_size is not None,
        "transfer of images": vllm_config.ec_transfer_config is not None,
        "embeddings as prompts": vllm_config.model_config.enable_prompt_embeds,
        "dual batch overlap": parallel.enable_dbo,
        "fused quantised attention": compilation.pass_config.fuse_attn_quant,
        "graphs of all operations": compilation.splitting_ops == [],
        "a limit of no images": image_limit(vllm_config) < 1,
    }
    for feature, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"deep fusion is not served with {feature}; leave it out, or use --engine torch")


def _keep_operation_out_of_graphs(compilation: CompilationConfig) -> None:
    kept_out = compilation.splitting_ops
    if kept_out is None:
        kept_out = [*compilation._attention_ops, *KEPT_OUT_OF_GRAPHS]
    compilation.splitting_ops = [*kept_out, f"vllm::{MEDIA_OPERATION}"]
