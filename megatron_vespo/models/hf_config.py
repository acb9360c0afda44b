"""Reading a Hugging Face ``config.json``: every field is used, held to the values supported, or known not to matter.

A field that is missing is never given a default, and one that the model code does not honour is never skipped: a wrong
architecture loads silently and only the answers are bad.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.models.layouts import HfConfig, Rule
from megatron_vespo.upstream import nearest

# Fields that say nothing about what the weights compute.
_WITHOUT_MEANING = frozenset(
    {
        "architectures",
        "model_type",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tokenizer_class",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "auto_map",
        "max_window_layers",
        "sliding_window",
    }
)


@dataclass(frozen=True)
class Family:
    """One ``model_type``: what its config means to Megatron and where its weights go.

    Attributes:
        model_type: HF ``model_type``.
        fields: HF field -> TransformerConfig field, all required.
        required: Further HF fields that must be there.
        fixed: HF field -> predicate; the field may be absent, and if there must satisfy it.
        transformer_config: Further TransformerConfig fields computed from the HF config.
        rules: The weight table.
    """

    model_type: str
    fields: Mapping[str, str]
    required: frozenset[str]
    fixed: Mapping[str, Callable[[Any], bool]]
    transformer_config: Callable[[HfConfig], dict[str, Any]]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Architecture:
    """A model's architecture: its family and its checked, normalised HF config."""

    family: Family
    config: HfConfig
    source: Path = field(default=Path())

    def transformer_config(self) -> dict[str, Any]:
        """TransformerConfig fields that the architecture fixes."""
        direct = {ours: self.config[theirs] for theirs, ours in self.family.fields.items()}
        return {**direct, **self.family.transformer_config(self.config)}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding in the HF checkpoint."""
        return self.config["vocab_size"]

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and response together."""
        return self.config["max_position_embeddings"]

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding."""
        return self.config["rope_theta"]

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.config["tie_word_embeddings"]


def _normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 4 and 5 spellings -> one: ``rope_theta``, ``rope_scaling``, ``num_experts``."""
    config = dict(raw)
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        rope = dict(rope)
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type", "default")
        config["rope_scaling"] = None if kind == "default" and not rope else {"rope_type": kind, **rope}
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def read_architecture(folder: str | Path, families: Mapping[str, Family]) -> Architecture:
    """Read and check ``config.json`` of a Hugging Face folder.

    Raises:
        UserError: The folder or file is missing, the model type is unknown, or a field is missing, of a value that the
            model code does not honour, or unknown.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"model.hf_path: {path} not found; give a Hugging Face checkpoint folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    model_type = raw.get("model_type")
    if model_type not in families:
        raise UserError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(families))}")
    family = families[model_type]
    config = _normalise(raw)
    _check_fields(path, family, config)
    return Architecture(family, config, path)


def _check_fields(path: Path, family: Family, config: HfConfig) -> None:
    required = family.required | family.fields.keys()
    for name in sorted(required):
        if config.get(name) is None:
            raise UserError(f"{path}: '{name}' is missing; a {family.model_type} config must have it")
    for name, value in config.items():
        if name in family.fixed and not family.fixed[name](value):
            raise UserError(f"{path}: {name}={value!r} is not supported for {family.model_type}")
        if name not in required and name not in family.fixed and name not in _WITHOUT_MEANING:
            hint = nearest(name, required | family.fixed.keys())
            raise UserError(f"{path}: '{name}' is not a field that the {family.model_type} code honours{hint}")
