"""Reading a Hugging Face ``config.json``: every field is used, held to the values supported, or known not to matter.

A field that is missing is never given a default, and one that the model code does not honour is never skipped: a wrong
architecture loads silently and only the answers are bad.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.models import fp8
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
        derived: HF field -> how the family's own code computes it where config.json leaves it out.
        problem: What fields cannot be together, as a message, or None.
        left_out: Whether an HF tensor, by name, is of a part of the checkpoint that is neither loaded nor written.
    """

    model_type: str
    fields: Mapping[str, str]
    required: frozenset[str]
    fixed: Mapping[str, Callable[[Any], bool]]
    transformer_config: Callable[[HfConfig], dict[str, Any]]
    rules: tuple[Rule, ...]
    derived: Mapping[str, Callable[[HfConfig], Any]] = field(default_factory=dict)
    problem: Callable[[HfConfig], str | None] = lambda config: None
    left_out: Callable[[HfConfig, str], bool] = lambda config, name: False


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
    def rope_options(self) -> dict[str, Any]:
        """GPTModel arguments that say how positions are embedded.

        Of scaled kinds there is Llama 3's only; a family that takes it checks the numbers that Megatron has built in.
        """
        options = {
            "position_embedding_type": "rope",
            "rotary_base": self.rope_theta,
            "rotary_percent": self.config.get("partial_rotary_factor") or 1.0,
        }
        scaling = self.config.get("rope_scaling")
        if scaling is not None and scaling["rope_type"] == "llama3":
            options |= {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
        return options

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.config["tie_word_embeddings"]


# Beside the kind of scaling, transformers 5 keeps these in rope_parameters; transformers 4 has them at the top.
_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")


def _normalise(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers 4 and 5 spellings -> one: ``rope_theta``, ``rope_scaling``, ``num_experts``; checkpoint format out.

    Raises:
        UserError: Both spellings are there and disagree, or the weights are quantised in a way that is not supported.
    """
    config = dict(raw)
    fp8.weight_block(path, config)
    config.pop("quantization_config", None)
    if isinstance(config.get("rope_scaling"), dict):
        config["rope_scaling"] = _rope_scaling(config["rope_scaling"])
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        new = {name: rope[name] for name in _ROPE_FIELDS if name in rope}
        new["rope_scaling"] = _rope_scaling({name: rope[name] for name in rope if name not in _ROPE_FIELDS})
        for name, value in new.items():
            if config.get(name) not in (None, value):
                raise UserError(f"{path}: {name}={config[name]!r}, but rope_parameters say {value!r}; keep one of them")
        config |= new
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def _rope_scaling(scaling: dict[str, Any]) -> dict[str, Any] | None:
    """One spelling of the kind of scaling; None for none. Old files say ``type``."""
    rest = {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}


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
    config = _normalise(path, raw)
    _check_required(path, family, config, (family.required | family.fields.keys()) - family.derived.keys())
    config |= {name: derive(config) for name, derive in family.derived.items() if config.get(name) is None}
    _check_fields(path, family, config)
    return Architecture(family, config, path)


def _check_required(path: Path, family: Family, config: HfConfig, names: Collection[str]) -> None:
    for name in sorted(names):
        if config.get(name) is None:
            raise UserError(f"{path}: '{name}' is missing; a {family.model_type} config must have it")


def _check_fields(path: Path, family: Family, config: HfConfig) -> None:
    required = family.required | family.fields.keys()
    for name, value in config.items():
        if name in family.fixed and not family.fixed[name](value):
            raise UserError(f"{path}: {name}={value!r} is not supported for {family.model_type}")
        if name not in required and name not in family.fixed and name not in _WITHOUT_MEANING:
            hint = nearest(name, required | family.fixed.keys())
            raise UserError(f"{path}: '{name}' is not a field that the {family.model_type} code honours{hint}")
    problem = family.problem(config)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
