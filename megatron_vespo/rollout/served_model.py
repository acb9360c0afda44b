"""The model folder that the run's own servers start from, and the arguments that go with it. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.files import atomic_write
from megatron_vespo.fp8_format import quantization_config

SUFFIX = ".served_model"
# Weights are pushed before anything is sampled; those of the folder are in another format.
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX_SUFFIX = ".index.json"


def served_model(config: Config) -> Path:
    """Where the servers find config and tokenizer: the run's own model, or a folder that says it is in FP8.

    The folder, beside the run's, which rank 0 may be about to empty, is written here: everything of the model's but its
    weights. Whoever writes it writes the same, so that nodes need not agree on one who does.

    Raises:
        OSError: It cannot be written.
    """
    source = Path(config.model.hf_path)
    if not config.quantises_pushes:
        return source
    folder = config.run_folder.with_name(config.run_folder.name + SUFFIX)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHT_FILES and not path.name.endswith(_INDEX_SUFFIX):
            atomic_write(folder / path.name, path.read_bytes())
    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    facts["quantization_config"] = quantization_config()
    atomic_write(folder / "config.json", json.dumps(facts, indent=2) + "\n")
    return folder


def served_arguments(config: Config) -> dict[str, Any]:
    """SGLang's arguments that follow from how the run places and pushes to its servers; ``sglang:`` comes on top."""
    arguments: dict[str, Any] = {}
    if config.quantises_pushes:
        arguments["load_format"] = "dummy"
    if config.shares_devices and config.rollout.server.device == "cuda":
        arguments["enable_memory_saver"] = True
    return arguments
