"""What the launcher and the plugin call things between them."""

MODE = "vlm"  # the tokenizer mode, which brings our renderer, and the media connector
# vLLM takes no empty list of domains as "none"; no host can have this name (RFC 2606)
NO_DOMAIN = "none.invalid"
DEEP = "DeepVisionLanguageModel"  # the architecture, as vLLM is told; both fusions are one class elsewhere
MEDIA_OPERATION = "attend_to_media"  # as PyTorch knows it
# those whose decoder layers take (positions, hidden_states, residual) in vLLM; the tests ask all of them
DEEP_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
# in the server's environment: the model's folder, where it has a self-test to be passed, and the file for what failed
SELF_TEST, VERDICT = "VLM_SELF_TEST", "VLM_SELF_TEST_VERDICT"
