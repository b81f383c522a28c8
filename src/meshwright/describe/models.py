"""Models by name, path or config: ``load_model``, ``build_model``, ``parameters``.

``families`` has one module per Hugging Face ``model_type`` with ``build(config) -> Model``;
``configs`` has one JSON file of config facts per well-known model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from meshwright import registry
from meshwright.describe.config import Config
from meshwright.describe.model import Model
from meshwright.errors import DocumentError, MeshwrightError, ModelError, did_you_mean

FAMILIES = "meshwright.describe.families"
MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that ``load_model`` finds by name."""

    name: str
    model_type: str
    num_params: int
    num_active_params: int


def load_model(text: str) -> Model:
    """Return a model from a ``config.json``, a folder holding one, or a known name.

    Names are compared by letters and digits alone, and may carry an owner
    (``meta-llama/Llama-3.1-8B``).

    Raises ``DocumentError`` for a file that cannot be used and ``ModelError`` for an unknown name
    or a config that describes no model.
    """
    if not text.strip():
        raise ModelError("model", text, "It names a model.", "Give a config.json or a known name.")
    known = _spellings().get(_squashed(text))
    if known is not None and "/" not in text:
        return _known(known)
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):
        path, exists = Path(), False
    if exists:
        return _from_path(path)
    last = _spellings().get(_squashed(text.rsplit("/", 1)[-1]))
    if last is not None and text.count("/") == 1:
        return _known(last)
    if text.endswith(".json") or "/" in text or "\\" in text:
        remedy = "Give a config.json, its folder, or a known name (meshwright list models)."
        raise DocumentError("model", text, "There is no such file or folder.", remedy)
    raise ModelError("model", text, "No file and no known model has this name.", _name_remedy(text))


def load_config(text: str) -> Mapping[str, Any]:
    """Return the config that ``load_model`` reads, as it stands. Raises what that raises."""
    load_model(text)
    path = Path(text).expanduser()
    known = _spellings().get(_squashed(text.rsplit("/", 1)[-1]))
    if known is not None and ("/" not in text or not path.exists()):
        file = resources.files("meshwright.describe") / "configs" / f"{known}.json"
        return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
    return _read_json(path / "config.json" if path.is_dir() else path)


def build_model(config: Mapping[str, Any], name: str = "") -> Model:
    """Return the model of a Hugging Face config.

    Keys left out take the defaults of ``transformers`` and are listed in ``assumed``. Of a
    multimodal config the text decoder is taken.

    Raises ``ModelError`` naming the key, its value, the rule and the remedy.
    """
    model_type, inner = _text_part(config)
    module = _family(model_type)
    try:
        model = module.build(inner)
    except RecursionError:
        raise ModelError(
            "config", "...", "It is nested too deeply.", "Give a plain config."
        ) from None
    return replace(
        model,
        name=name or model.name,
        model_type=model_type,
        assumed=tuple(dict.fromkeys(inner.assumed)),
    )


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the parameter counts of a Hugging Face config, vocabulary unpadded.

    ``total`` counts every weight of the main model once, tied tables too, and the routers'
    correction biases as checkpoints store them; ``active`` those that one token meets (``topk`` of
    the experts); ``embedding`` the embedding tables; ``expert`` the routed experts; ``mtp`` the
    multi-token-prediction layers, which ``total`` and ``active`` leave out, as published sizes do.

    Raises ``ModelError`` when the config describes no model.
    """
    model = build_model(config)
    return {
        "total": model.num_params,
        "active": model.num_active_params,
        "embedding": model.embedding.num_params,
        "expert": model.num_expert_params,
        "mtp": model.num_mtp_params,
    }


def known_models() -> tuple[KnownModel, ...]:
    """Return every model that ``load_model`` knows by name, sorted by name."""
    return tuple(
        KnownModel(
            name=name,
            model_type=model.model_type,
            num_params=model.num_params,
            num_active_params=model.num_active_params,
        )
        for name in sorted(_known_files())
        for model in (_known(name),)
    )


def known_names() -> tuple[str, ...]:
    """Return the names of the known models, sorted, without building them."""
    return tuple(sorted(_known_files()))


def _text_part(config: Mapping[str, Any]) -> tuple[str, Config]:
    """Return the model type that decides and the config of the (text) decoder."""
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelError("config", config, "It is an object of keys.", "Write {...}.")
    outer = Config(config)
    if outer.given("text_config"):
        inner = outer.nested("text_config")
        outer_type = outer.text("model_type", "")
        spellings = (str(inner.values.get("model_type") or ""), f"{outer_type}_text", outer_type)
        known = registry.names(FAMILIES)
        model_type = next((s for s in spellings if s in known), spellings[0] or outer_type)
        inner.assumed.append("text_config: the text decoder only, other towers are left out")
        return model_type, inner
    if not outer.given("model_type"):
        raise ModelError(
            "config.model_type",
            None,
            "It names the model family.",
            f"Add model_type, one of {', '.join(registry.names(FAMILIES))}.",
        )
    return outer.text("model_type", ""), outer


def _family(model_type: str) -> Any:
    try:
        return registry.load(FAMILIES, model_type, field="config.model_type")
    except MeshwrightError as error:
        raise ModelError(
            error.field,
            model_type,
            "No family of this model type is described.",
            f"{error.remedy} Or add {model_type}.py with build(config) to describe/families.",
        ) from None


@cache
def _known_files() -> frozenset[str]:
    folder = resources.files("meshwright.describe") / "configs"
    return frozenset(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


@cache
def _spellings() -> dict[str, str]:
    """Return the known names by their letters and digits alone."""
    return {_squashed(name): name for name in known_names()}


def _squashed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


@cache
def _known(name: str) -> Model:
    file = resources.files("meshwright.describe") / "configs" / f"{name}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return build_model(config, name)


def _from_path(path: Path) -> Model:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DocumentError(
                "model",
                str(path),
                "The folder holds no config.json.",
                "Give the folder of a Hugging Face checkpoint, or a known name.",
            )
        path = path / "config.json"
    return build_model(_read_json(path), path.resolve().parent.name)


def _read_json(path: Path) -> Mapping[str, Any]:
    field, shown = "model", str(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            rule = f"A config has at most {MAX_CONFIG_BYTES} bytes; this file has {size}."
            raise DocumentError(field, shown, rule, "Give the config.json, not the weights.")
        if not path.is_file():
            raise DocumentError(field, shown, "It is not a file.", "Give a config.json.")
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise DocumentError(field, shown, f"It cannot be read: {reason}.", "") from None
    except MeshwrightError:
        raise
    except (ValueError, RecursionError) as error:
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        rule = f"It is not valid JSON{where}."
        raise DocumentError(field, shown, rule, "Give a Hugging Face config.json.") from None
    if not isinstance(found, dict):
        rule = "It holds no JSON object."
        raise DocumentError(field, shown, rule, "Give a Hugging Face config.json.")
    return cast("dict[str, Any]", found)


def _name_remedy(text: str) -> str:
    longer = [n for n in known_names() if n.startswith(text.strip().lower())] if text else []
    return did_you_mean(text, longer or known_names())
