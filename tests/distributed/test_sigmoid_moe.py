"""DeepSeek-V3 and GLM-4.5-MoE: the tests that all families share, and what is theirs alone."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_vespo import parallel
from megatron_vespo.models.build import transformer_config
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.models.router import Router
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.types import Sample
from tests.distributed.test_conversion import LAYOUTS as CONVERSION_LAYOUTS
from tests.distributed.test_conversion import (
    Tensors,
    assert_bits_equal,
    exporter,
    read_weights,
    round_trips,
    stream_all,
)
from tests.distributed.test_hf_parity import (
    LAYOUTS,
    LENGTHS,
    TOLERANCE,
    VOCABULARY,
    Reference,
    difference,
    megatron_log_probs,
)
from tests.distributed.test_layouts import BALANCING, SAMPLES, Outcome, assert_same, objective_of, train, train_balanced
from tests.distributed.test_layouts import LAYOUTS as TRAINING_LAYOUTS
from tests.hf_reference import hf_log_probs
from tests.policies import make_policy, off_policy_samples, random_samples
from tests.ranks import run_ranks
from tests.tiny_deepseek import YARN, make_tiny_sigmoid_moe

FAMILIES = ("deepseek_v3", "glm4_moe")
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root = tmp_path_factory.mktemp("parity")
    variants = {
        "deepseek_yarn": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
        "deepseek_plain_rope": ("deepseek_v3", {"rope_scaling": None, "num_layers": 4, "first_k_dense_replace": 3}),
        "deepseek_yarn_without_mscales": (
            "deepseek_v3",
            {"rope_scaling": {name: YARN[name] for name in YARN if "mscale" not in name}},
        ),
        "glm": ("glm4_moe", {"num_nextn_predict_layers": 1}),
        "glm_plain": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "num_layers": 4}),
    }
    folders = [
        make_tiny_sigmoid_moe(root / name, model_type, vocab_size=VOCABULARY, **changes)
        for name, (model_type, changes) in variants.items()
    ]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    log_probs = hf_log_probs(folders, sequences, root / "scratch")
    return Reference({folder.name: folder for folder in folders}, sequences, log_probs, root / "scratch" / "saved")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_equal_hugging_faces(reference: Reference, layout: str) -> None:
    answers = megatron_log_probs(layout, list(reference.folders.values()), reference.sequences)
    differences = {
        name: difference(answer, reference.log_probs[name])
        for name, answer in zip(reference.folders, answers, strict=True)
    }
    assert max(differences.values()) < TOLERANCE, differences


def zero_bias(folder: Path) -> None:
    weights = read_weights(folder)
    save_file(
        {name: torch.zeros_like(tensor) if BIAS in name else tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(
    "model, change",
    [
        ("deepseek_yarn", {"rope_scaling": YARN | {"factor": 8.0}}),
        ("deepseek_yarn", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}),
        ("deepseek_yarn", {"rope_scaling": YARN | {"mscale": 0.5}}),
        ("deepseek_yarn", {"rope_scaling": YARN | {"beta_slow": 0.01}}),
        ("deepseek_yarn", {"rope_scaling": YARN | {"original_max_position_embeddings": 64}}),
        ("deepseek_yarn", {"rope_scaling": None}),
        ("deepseek_yarn", {"rope_theta": 2e4}),
        ("deepseek_yarn", {"routed_scaling_factor": 1.0}),
        ("deepseek_yarn", {"n_group": 2}),
        ("deepseek_yarn", {"n_group": 1}),
        ("deepseek_plain_rope", {"rope_theta": 2e4}),
        ("glm", {"partial_rotary_factor": 1.0}),
        ("glm", {"routed_scaling_factor": 1.0}),
        *((model, {}) for model in ("deepseek_yarn", "glm")),  # the bias is lost
    ],
    ids=str,
)
def test_what_is_wrong_shows(reference: Reference, tmp_path: Path, model: str, change: dict[str, Any]) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(reference.folders[model], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if not change:
        zero_bias(folder)
    (answer,) = megatron_log_probs("1 rank", [folder], reference.sequences)
    assert difference(answer, reference.log_probs[model]) > 100 * TOLERANCE


def test_the_config_as_transformers_saves_it_means_the_same(reference: Reference) -> None:
    for name, folder in reference.folders.items():
        ours, saved = load_architecture(folder), load_architecture(reference.saved / name)
        assert ours.transformer_config() == saved.transformer_config(), name
        assert ours.rope_options == saved.rope_options, name


# --- an update, in every layout ---

RECOMPUTE = "TP2 SP recompute of attention and experts, router in fp32"
TRAINED_LAYOUTS = ("DP2", "EP2", "TP2 SP", "PP2", "PP2 VPP2", "TP2 SP EP2", "PP2 EP2", "EP2 recompute", RECOMPUTE)
CASES = ("token-mean, an empty microbatch",)


@dataclass(frozen=True)
class Trained:
    """A model, samples for it and what an update on one rank did."""

    folder: Path
    samples: list[Sample]
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("training")
    # Half of the layers are dense, so that the first pipeline stage has no experts.
    size = {"num_layers": 4, "first_k_dense_replace": 2, "vocab_size": VOCABULARY}
    made = {}
    for name in FAMILIES:
        folder = make_tiny_sigmoid_moe(root / name, name, **size)
        samples = off_policy_samples(folder, SAMPLES)
        made[name] = Trained(folder, samples, run_ranks(1, train, folder, samples, {}, CASES)[0])
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", TRAINED_LAYOUTS)
def test_every_layout_trains_as_one_rank(trained: dict[str, Trained], family: str, layout: str) -> None:
    size, _, megatron = TRAINING_LAYOUTS[layout]
    model = trained[family]
    for distributed in (False, True):
        options = megatron | {"use_distributed_optimizer": distributed}
        ranks = run_ranks(size, train, model.folder, model.samples, options, CASES, **megatron)
        for rank, outcomes in enumerate(ranks):
            assert_same(outcomes[CASES[0]], model.outcomes[CASES[0]], weights=rank == 0)


@pytest.mark.parametrize("layout", ["PP2", "EP2"])
def test_auxiliary_losses_are_means_over_the_layers_with_experts(trained: dict[str, Trained], layout: str) -> None:
    size, _, megatron = TRAINING_LAYOUTS[layout]
    model = trained["glm4_moe"]
    samples = [sample for sample in model.samples if len(sample.response_ids)][:8]
    (single,) = run_ranks(1, train_balanced, model.folder, samples, BALANCING)
    assert 1 < single.losses["load_balancing_loss"] < 2, "1 where the load is even; half of it if dense layers counted"
    for outcome in run_ranks(size, train_balanced, model.folder, samples, megatron | BALANCING, **megatron):
        assert outcome.losses == pytest.approx(single.losses, rel=1e-5)
        assert outcome.grad_norm == pytest.approx(single.grad_norm, rel=1e-5)


# --- weights there and back, the bias among them ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    size = {"vocab_size": VOCABULARY, "num_layers": 4, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1}
    return {name: make_tiny_sigmoid_moe(root / name, name, **size) for name in FAMILIES}


def expected_export(folder: Path, bf16: bool) -> Tensors:
    """What a model of this dtype gives back: all but the layer for multi-token prediction."""
    weights = {name: tensor for name, tensor in read_weights(folder).items() if ".layers.4." not in name}
    assert len(weights) < len(read_weights(folder))
    return {name: tensor.bfloat16() if bf16 and BIAS not in name else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", CONVERSION_LAYOUTS)
def test_there_and_back_is_exact(folders: dict[str, Path], layout: str, bf16: bool) -> None:
    size, megatron = CONVERSION_LAYOUTS[layout]
    megatron = megatron | ({"bf16": True} if bf16 else {})
    ranks = run_ranks(size, round_trips, list(folders.values()), megatron, **megatron)
    for folder, (tensors, _, again) in zip(folders.values(), ranks[0], strict=True):
        assert_bits_equal(tensors, expected_export(folder, bf16))
        assert_bits_equal(again, expected_export(folder, bf16))


def export_of_policy(folder: Path, megatron: dict[str, Any], samples: Sequence[Sample]) -> tuple[Tensors, Tensors]:
    """What a policy exports before and after an update, its microbatches of one sample each."""
    policy = make_policy(folder, megatron)
    plan = [[number] for number in range(len(samples))][parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    before = stream_all(HfExporter(policy.chunks, load_architecture(folder)))[0]
    policy.forward_backward(samples, plan, objective_of("next-token", samples))
    policy.optim_step()
    return before, stream_all(HfExporter(policy.chunks, load_architecture(folder)))[0]


def save_loaded(source: Path, target: Path, megatron: dict[str, Any]) -> None:
    save_hf(exporter(source, megatron), target, source)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_says_that_it_has_no_extra_layers(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    run_ranks(1, save_loaded, folders[family], tmp_path / "saved", {"bf16": True})
    assert_bits_equal(read_weights(tmp_path / "saved"), expected_export(folders[family], bf16=True))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (folders[family], tmp_path / "saved")]
    assert configs[0].pop("num_nextn_predict_layers") == 1
    assert configs[1].pop("num_nextn_predict_layers") == 0
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_is_float32_in_a_policy_in_bf16_and_stays_put(folders: dict[str, Path], family: str) -> None:
    samples = random_samples(4, VOCABULARY)
    ((before, after),) = run_ranks(1, export_of_policy, folders[family], {"bf16": True}, samples)
    assert_bits_equal(before, expected_export(folders[family], bf16=True))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in after:
        if BIAS in name:
            assert not torch.equal(after[name], after[name].bfloat16().float()), "or this shows nothing"
            assert torch.equal(after[name], before[name])


# --- load balancing by the bias ---


def router_options(folder: Path, megatron: dict[str, Any]) -> tuple[str | None, float]:
    config = transformer_config(load_architecture(folder), megatron, "local")
    return config.moe_router_dtype, config.moe_router_bias_update_rate


def test_routers_are_in_fp32_and_their_bias_stays_put_unless_asked(folders: dict[str, Path]) -> None:
    asked = {"moe_router_dtype": "fp64", "moe_router_bias_update_rate": 1e-3}
    for folder in folders.values():
        assert run_ranks(1, router_options, folder, {"bf16": True}) == [("fp32", 0.0)]
        assert run_ranks(1, router_options, folder, asked) == [("fp64", 1e-3)]


RATE = 0.03125  # a power of two, so that sums are exact


@pytest.fixture(scope="module")
def loaded_samples() -> list[Sample]:
    return [sample for sample in random_samples(10, VOCABULARY) if len(sample.response_ids)][:8]


@pytest.fixture(scope="module")
def moved(folders: dict[str, Path], loaded_samples: list[Sample]) -> dict[str, Tensors]:
    """Where the biases of each family must be after an update.

    By the rate, up where an expert got less than the mean and down where more: the sign of what a count shows.
    """
    found = {}
    for family, folder in folders.items():
        (loads,) = run_ranks(1, loads_of_experts, folder, loaded_samples)
        assert len(loads) == 2 and all(count.max() > count.min() for count in loads.values())
        before = read_weights(folder)
        found[family] = {name: before[name] + RATE * torch.sign(count.mean() - count) for name, count in loads.items()}
    return found


@pytest.mark.parametrize("layout", ["1 rank", "DP2", "EP2", "TP2 SP", "PP2", "PP2 VPP2", "EP2 recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_moves_against_the_load(
    folders: dict[str, Path], loaded_samples: list[Sample], moved: dict[str, Tensors], family: str, layout: str
) -> None:
    size, _, megatron = TRAINING_LAYOUTS.get(layout, (1, "", {}))
    options = {"moe_router_bias_update_rate": RATE, "lr": 0.0} | megatron
    ranks = run_ranks(size, export_of_policy, folders[family], options, loaded_samples, **megatron)
    before, after = ranks[0]
    assert {name for name in after if BIAS in name} == moved[family].keys()
    for name, bias in moved[family].items():
        assert not torch.equal(before[name], bias)
        assert torch.equal(after[name], bias), name


def loads_of_experts(folder: Path, samples: Sequence[Sample]) -> Tensors:
    """How many tokens each expert works on, by the HF name of the layer's bias; one sample at a time, counted here."""
    counts: Tensors = {}
    policy = make_policy(folder, {})

    def count(module: Any, inputs: Any, outputs: Any) -> None:
        name = f"model.layers.{module.layer_number - 1}.mlp.gate.{BIAS}"
        counts[name] = counts.get(name, 0) + outputs[1].float().sum(0)

    for module in policy.chunks[0].modules():
        if isinstance(module, Router):
            module.register_forward_hook(count)
    policy.log_probs(samples, [[number] for number in range(len(samples))])
    return counts
