"""What the runtime does not compute is refused by name. Provenance: law."""

from __future__ import annotations

import pytest

from meshwright.describe.models import load_config, load_model
from meshwright.errors import ModelError
from meshwright.runtime.read_shape import shape_of


def test_dropout_in_attention_is_refused_and_not_left_out() -> None:
    config = dict(load_config("llama3-8b")) | {"attention_dropout": 0.1}
    with pytest.raises(ModelError, match="attention_dropout"):
        shape_of(load_model("llama3-8b"), config)
