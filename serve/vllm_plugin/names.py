"""What the launcher and the plugin call things between them."""

MODE = "vlm"  # the tokenizer mode, which brings our renderer, and the media connector
# vLLM takes no empty list of domains as "none"; no host can have this name (RFC 2606)
NO_DOMAIN = "none.invalid"
EARLY_ONLY = "vLLM serves models of early fusion only so far; serve this one with --engine torch"
