"""The Megatron model says what Hugging Face transformers says of the same weights and tokens, in every layout."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.packing import pack
from megatron_vespo.types import Prompt, Sample
from tests.hf_reference import hf_log_probs
from tests.ranks import run_ranks
from tests.tiny_families import LLAMA3_ROPE, make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

LENGTHS = (1, 7, 2, 30, 12)
VOCABULARY = 50  # padded to 64, so that padding that leaks into the softmax shows
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
}
SIZES = {"1 rank": 1}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reference:
    """Model folders, token sequences, what Hugging Face says of them, and the configs as it saves them."""

    folders: dict[str, Path]
    sequences: list[list[int]]
    log_probs: dict[str, list[np.ndarray]]
    saved: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("parity")
    size = {"vocab_size": VOCABULARY}
    folders = [
        make_tiny_qwen3_moe(root / "moe", **size),
        make_tiny_qwen3_moe(root / "moe_not_renormalised", norm_topk_prob=False, **size),
        make_tiny_qwen3_moe(root / "moe_tied", tie_word_embeddings=True, num_experts=8, **size),
        make_tiny_qwen3(root / "dense", **size),
        make_tiny_qwen3(root / "dense_tied", tie_word_embeddings=True, **size),
        make_tiny(root / "qwen2", "qwen2", tie_word_embeddings=True, **size),
        make_tiny(root / "qwen2_moe", "qwen2_moe", **size),
        make_tiny(root / "mixtral_moe", "mixtral", **size),
        make_tiny(root / "llama", "llama", tie_word_embeddings=True, **size),
        make_tiny(root / "llama_plain", "llama", rope_scaling=None, head_dim=None, **size),
    ]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    log_probs = hf_log_probs(folders, sequences, root / "scratch")
    return Reference({f.name: f for f in folders}, sequences, log_probs, root / "scratch" / "saved")


def megatron_logits(
    folders: Sequence[Path], sequences: Sequence[Sequence[int]], megatron: dict[str, Any]
) -> list[torch.Tensor] | None:
    """Logits of the packed sequences, [tokens, this rank's share of the vocabulary], for each model; None upstream."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # One token more, so that all of the sequence is input.
    samples = [
        Sample(
            Prompt(number, np.array([*sequence, 0], dtype=np.int32)),
            0,
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int32),
            "stop",
        )
        for number, sequence in enumerate(sequences)
    ]
    batch = pack(
        samples,
        range(len(samples)),
        trains=lambda sample: True,
        alignment=parallel.tensor_parallel_size(),
        device=torch.device("cpu"),
    )

    def forward_step(_: Any, model: Any) -> Any:
        output = model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=batch.packed_seq_params,
        )
        return output, lambda logits: (logits.sum(), logits)

    results = []
    for folder in folders:
        architecture = load_architecture(folder)
        config = transformer_config(architecture, megatron, "local")
        chunks = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=16)
        load_hf_weights(chunks, architecture, HfReader(folder))
        logits = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks),
            model=[chunk.eval() for chunk in chunks],
            num_microbatches=1,
            seq_length=len(batch.tokens),
            micro_batch_size=1,
            forward_only=True,
        )
        results += [logits[0][0].detach().clone()] if parallel.is_last_stage() else []
    return results or None


def megatron_log_probs(
    layout: str, folders: Sequence[Path], sequences: Sequence[Sequence[int]]
) -> list[list[np.ndarray]]:
    """For each model log softmax of every position of every sequence, over the real vocabulary."""
    megatron = LAYOUTS[layout]
    ranks = run_ranks(SIZES.get(layout, 2), partial(megatron_logits, folders, sequences, megatron), **megatron)
    shards = [logits for logits in ranks if logits is not None]
    if layout == "EP2":
        # Both ranks saw the same tokens.
        for one, other in zip(*shards, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        shards = shards[:1]
    answers = []
    for number in range(len(folders)):
        logits = torch.cat([shard[number] for shard in shards], dim=-1)
        log_probs = logits[: sum(map(len, sequences)), :VOCABULARY].log_softmax(-1)
        answers.append([part.numpy() for part in log_probs.split([len(sequence) for sequence in sequences])])
    return answers


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_equal_hugging_faces(reference: Reference, layout: str) -> None:
    names = [name for name in reference.folders if layout != "EP2" or "moe" in name]
    answers = megatron_log_probs(layout, [reference.folders[name] for name in names], reference.sequences)
    differences = {
        name: difference(answer, reference.log_probs[name]) for name, answer in zip(names, answers, strict=True)
    }
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize(
    "model, change",
    [
        ("moe", {"rope_theta": 2e4}),
        ("moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        ("moe", {"rms_norm_eps": 1e-2}),
        ("moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("mixtral_moe", {"rms_norm_eps": 1e-2}),
        ("llama", {"rope_scaling": LLAMA3_ROPE | {"factor": 8.0}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 4e5}}),
        ("llama", {"rope_scaling": None}),
    ],
    ids=str,
)
def test_a_wrong_config_shows(reference: Reference, tmp_path: Path, model: str, change: dict[str, Any]) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(reference.folders[model], folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling") if "rope_parameters" in change else ("rope_parameters",):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | change))
    (answer,) = megatron_log_probs("1 rank", [folder], reference.sequences)
    assert difference(answer, reference.log_probs[model]) > 100 * TOLERANCE


def test_the_config_as_transformers_saves_it_means_the_same(reference: Reference) -> None:
    for name, folder in reference.folders.items():
        ours, saved = load_architecture(folder), load_architecture(reference.saved / name)
        assert ours.transformer_config() == saved.transformer_config(), name
        assert ours.rope_options == saved.rope_options, name
        assert ours.vocab_size == saved.vocab_size, name
        assert ours.tied_embeddings == saved.tied_embeddings, name
