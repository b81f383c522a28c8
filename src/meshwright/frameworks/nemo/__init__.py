"""NeMo 2: the fields of its strategy, model configuration and callbacks (September 2025)."""
