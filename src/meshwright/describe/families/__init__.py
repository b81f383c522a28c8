"""One module per Hugging Face ``model_type``: ``build(config) -> Model``."""
