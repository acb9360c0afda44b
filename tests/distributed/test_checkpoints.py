"""A run that goes on from a checkpoint is the run that never stopped; at another layout too, as far as sums go."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo.models.convert import torch_dist_to_hf
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.types import Sample
from tests.checkpoints import (
    SCHEDULE,
    State,
    checkpoints_of,
    differences,
    draw,
    load_and_go_on,
    state_of,
    train_and_save,
    update,
)
from tests.distributed.test_checkpoint_tools import alone
from tests.policies import make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.weights import Tensors, assert_bits_equal, read_weights

VOCABULARY = 50
DISTRIBUTED = {"use_distributed_optimizer": True}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
BIAS = {"moe_router_bias_update_rate": 0.03125}
BALANCING = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.1,
    "moe_router_dtype": "fp32",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "moe": make_tiny_qwen3_moe(root / "moe", vocab_size=VOCABULARY),
        # For two stages on each of two ranks.
        "four layers": make_tiny_qwen3_moe(root / "four", vocab_size=VOCABULARY, num_layers=4),
        "tied": make_tiny_qwen3(root / "tied", vocab_size=VOCABULARY, num_layers=4, tie_word_embeddings=True),
        # Half of the layers are dense, so that the first pipeline stage has no experts; routers have a bias.
        "sigmoid": make_tiny_sigmoid_moe(
            root / "sigmoid", "glm4_moe", vocab_size=VOCABULARY, num_layers=2, first_k_dense_replace=1
        ),
    }


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return random_samples(10, VOCABULARY)


# --- the same layout: to the last bit ---

EXACT: dict[str, tuple[str, int, dict[str, Any]]] = {
    "1 rank": ("moe", 1, BALANCING),
    "1 rank, distributed optimizer": ("moe", 1, DISTRIBUTED),
    "1 rank, bf16": ("moe", 1, {"bf16": True}),
    "DP2": ("moe", 2, {}),
    "DP2, distributed optimizer": ("moe", 2, DISTRIBUTED),
    "DP2, distributed optimizer, bf16": ("moe", 2, DISTRIBUTED | {"bf16": True}),
    "EP2": ("sigmoid", 2, EP | BIAS),
    "EP2, distributed optimizer": ("sigmoid", 2, EP | BIAS | DISTRIBUTED),
    "EP2 DP2, distributed optimizer": ("moe", 4, EP | DISTRIBUTED),
    "TP2": ("moe", 2, TP | BALANCING),
    "PP2": ("sigmoid", 2, PP | BIAS),
    "PP2, distributed optimizer": ("sigmoid", 2, PP | DISTRIBUTED),
    "PP2 VPP2": ("tied", 2, VPP),
}


@pytest.mark.parametrize("layout", EXACT)
def test_a_resumed_run_is_the_run_that_never_stopped(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path, layout: str
) -> None:
    model, size, megatron = EXACT[layout]
    args = (models[model], samples, megatron, tmp_path / "checkpoints")
    straight = run_ranks(size, train_and_save, *args, **megatron)
    resumed = run_ranks(size, load_and_go_on, *args, **megatron)
    for rank in range(size):
        (wanted, figures), (found, again) = straight[rank], resumed[rank]
        assert not differences(found, wanted)
        assert figures == again
    assert figures[0] != figures[2], "or nothing was trained"


def saved_before_the_first_step(model: Path, samples: list[Sample], folder: Path) -> tuple[State, State]:
    policy = make_policy(model, DISTRIBUTED, **SCHEDULE)
    checkpoints_of(policy, folder).save(0, None)
    update(policy, samples, DISTRIBUTED)
    again = make_policy(model, DISTRIBUTED, **SCHEDULE)
    checkpoints_of(again, folder).load(0)
    update(again, samples, DISTRIBUTED)
    return state_of(policy), state_of(again)


def test_a_run_may_be_saved_before_its_first_step(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path
) -> None:
    for straight, resumed in run_ranks(2, saved_before_the_first_step, models["moe"], samples, tmp_path):
        assert not differences(resumed, straight)


# --- another layout: the same next losses and grad norms ---

RESHARDED: dict[str, tuple[str, tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]] = {
    "TP2 EP2 to PP2": ("moe", (2, TP | EP), (2, PP)),
    "TP2 EP2 to PP2, distributed": ("moe", (2, TP | EP | DISTRIBUTED), (2, PP | DISTRIBUTED)),
    "DP2 to 1 rank, distributed": ("moe", (2, DISTRIBUTED), (1, DISTRIBUTED)),
    "EP2 to TP2": ("moe", (2, EP), (2, TP)),
    "EP2 to TP2, distributed": ("moe", (2, EP | DISTRIBUTED), (2, TP | DISTRIBUTED)),
    "1 rank to EP2": ("sigmoid", (1, BIAS), (2, EP | BIAS)),
    "1 rank to PP2 VPP2": ("four layers", (1, {}), (2, VPP)),
    "PP2 VPP2 to TP2, distributed": ("four layers", (2, VPP | DISTRIBUTED), (2, TP | DISTRIBUTED)),
    "PP2 to 1 rank, the first stage without experts": ("sigmoid", (2, PP), (1, {})),
    "PP2 to EP2, the first stage without experts, distributed": (
        "sigmoid",
        (2, PP | DISTRIBUTED),
        (2, EP | DISTRIBUTED),
    ),
    "tied PP2 to TP2": ("tied", (2, PP), (2, TP)),
}


@pytest.mark.parametrize("case", RESHARDED)
def test_another_layout_goes_on_alike(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path, case: str
) -> None:
    model, (size, megatron), (other_size, other) = RESHARDED[case]
    folder = tmp_path / "checkpoints"
    straight = run_ranks(size, train_and_save, models[model], samples, megatron, folder, **megatron)[0][1]
    resumed = run_ranks(other_size, load_and_go_on, models[model], samples, other, folder, **other)[0][1]
    assert resumed == pytest.approx(straight, rel=1e-5)


def reseeded(model: Path, samples: list[Sample], folder: Path) -> tuple[bool, State]:
    policy = make_policy(model, {})
    return checkpoints_of(policy, folder, seed=5).load(None).same_random_streams, draw()


def test_random_streams_of_another_layout_follow_from_seed_and_iteration(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path
) -> None:
    run_ranks(1, train_and_save, models["moe"], samples, {}, tmp_path)
    ((same, goes_on),) = run_ranks(1, reseeded, models["moe"], samples, tmp_path)
    once, again = (run_ranks(2, reseeded, models["moe"], samples, tmp_path) for _ in range(2))
    assert same and not once[0][0] and once == again
    assert all(once[0][1][stream] != goes_on[stream] for stream in goes_on)


# --- the configuration rules ---


def with_other_settings(model: Path, samples: list[Sample], folder: Path) -> tuple[float, float, State, State]:
    """The rate before and after a change of it; moments as saved and as loaded."""
    before = make_policy(model, {}, **SCHEDULE)
    for _ in range(4):
        update(before, samples, {})
    checkpoints_of(before, folder).save(4, None)
    after = make_policy(model, {"lr": 1e-4, "adam_beta2": 0.9}, **SCHEDULE)
    checkpoints_of(after, folder).load(4)
    states = [
        {name: value for name, value in state_of(policy).items() if name.startswith("optimizer 0.")}
        for policy in (before, after)
    ]
    assert after._optimizer.param_groups[0]["betas"][1] == 0.9
    return before._optimizer.param_groups[0]["lr"], after._optimizer.param_groups[0]["lr"], *states


def test_a_run_can_go_on_with_another_learning_rate(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path
) -> None:
    ((before, after, saved, loaded),) = run_ranks(1, with_other_settings, models["moe"], samples, tmp_path)
    assert after == pytest.approx(before * 1e-4 / 3e-3)
    assert not differences(loaded, saved)


# --- others read it ---


def save_and_export(model: Path, samples: list[Sample], megatron: dict[str, Any], folder: Path) -> Tensors:
    policy = make_policy(model, megatron)
    update(policy, samples, megatron)
    checkpoints_of(policy, folder).save(1, {"run_state": b"x"})
    exporter = HfExporter(policy.chunks, load_architecture(model))
    return {key: tensor.clone() for bucket in exporter.stream() for key, tensor in bucket}


@pytest.mark.parametrize("layout", ["EP2, distributed optimizer", "PP2", "TP2"])
def test_the_conversion_tool_reads_it(
    models: dict[str, Path], samples: list[Sample], tmp_path: Path, layout: str
) -> None:
    model, size, megatron = EXACT[layout]
    weights = run_ranks(size, save_and_export, models[model], samples, megatron, tmp_path / "mg", **megatron)[0]
    assert alone(torch_dist_to_hf, tmp_path / "mg", tmp_path / "hf", models[model]) is None
    assert_bits_equal(read_weights(tmp_path / "hf"), weights)
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in read_weights(models[model]).items())


def loaded_by_megatron(model: Path, folder: Path) -> list[str]:
    """As Megatron-LM asks for weights alone; the names of those that differ."""
    from megatron.core import dist_checkpointing

    ours, theirs = make_policy(model, {}), make_policy(model, {})
    checkpoints_of(ours, folder).load(None)
    checkpoint = str(folder / "iter_0000001")
    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    model_state = theirs.chunks[0].sharded_state_dict(metadata=metadata)
    state = dist_checkpointing.load({"model": model_state}, checkpoint)
    assert (state["iteration"], state["checkpoint_version"]) == (1, 3.0)
    theirs.chunks[0].load_state_dict(state["model"])
    pairs = zip(ours.chunks[0].named_parameters(), theirs.chunks[0].named_parameters(), strict=True)
    return [name for (name, one), (_, other) in pairs if not torch.equal(one, other)]


def test_megatron_reads_its_weights(models: dict[str, Path], samples: list[Sample], tmp_path: Path) -> None:
    run_ranks(2, save_and_export, models["moe"], samples, TP | EP, tmp_path, **TP, **EP)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert run_ranks(1, loaded_by_megatron, models["moe"], tmp_path) == [[]]
