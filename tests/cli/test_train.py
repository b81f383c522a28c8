"""The options of ``train``."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from meshwright.cli.training import train
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.train_settings import DataSettings, TrainSettings

SPELLED = {"precision": "dtype", "timeout": "timeout_s", "data_cache": "cache"}


def defaults(settings: type[Any]) -> dict[str, object]:
    return {f.name: f.default for f in fields(settings) if f.default is not MISSING}


def test_options_of_train_have_the_defaults_of_what_they_set() -> None:
    options = {
        SPELLED.get(name, name): option.default
        for name, option in inspect.signature(train).parameters.items()
        if option.default is not inspect.Parameter.empty
    }
    known = defaults(TrainSettings) | defaults(DataSettings) | defaults(OptimizerSettings)
    shared = options.keys() & known.keys()
    assert len(shared) >= 24
    assert {name: options[name] for name in shared} == {name: known[name] for name in shared}
