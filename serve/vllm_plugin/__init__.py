"""Our early-fusion models in vLLM 0.32. vLLM finds `register` by the entry point `vllm.general_plugins`."""

from serve.vllm_plugin.names import MODE


def register() -> None:
    """Tells vLLM what ours is called and where it lies; in each of its processes, any number of times."""
    from vllm import ModelRegistry
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import vlm.auto
    from serve.vllm_plugin.media import SafeImages

    vlm.auto.register()
    ModelRegistry.register_model("VisionLanguageModel", "serve.vllm_plugin.model:VisionLanguageModel")
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, "serve.vllm_plugin.renderer", "ChatRenderer")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    MEDIA_CONNECTOR_REGISTRY.register(MODE)(SafeImages)
