"""Our models in vLLM 0.32. vLLM finds `register` by the entry point `vllm.general_plugins`."""

from serve.vllm_plugin.names import DEEP, MODE


def register() -> None:
    """Tells vLLM what ours is called and where it lies; in each of its processes, any number of times."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    import vlm.auto
    from serve.vllm_plugin.deep_config import DeepConfig
    from serve.vllm_plugin.media import SafeImages

    vlm.auto.register()
    ModelRegistry.register_model("VisionLanguageModel", "serve.vllm_plugin.model:VisionLanguageModel")
    ModelRegistry.register_model(DEEP, "serve.vllm_plugin.deep:DeepVisionLanguageModel")
    MODELS_CONFIG_MAP[DEEP] = DeepConfig
    register_backend(MambaAttentionBackendEnum.CUSTOM, "serve.vllm_plugin.media_state.MediaBackend", is_mamba=True)
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, "serve.vllm_plugin.renderer", "ChatRenderer")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    MEDIA_CONNECTOR_REGISTRY.register(MODE)(SafeImages)
