"""Every parallel layout, and every cut into microbatches, computes the same thing; and that thing is the formula."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.loss import Regularization
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Weighting
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy import head as head_module
from megatron_vespo.policy import policy as policy_module
from megatron_vespo.policy.figures import Sums, Table
from megatron_vespo.policy.objectives import NextToken, Objective, PolicyGradient, denominators
from megatron_vespo.types import FloatArray, Sample
from tests.host_syncs import count_host_syncs
from tests.policies import load_model, make_plan, make_policy, off_policy_samples
from tests.ranks import run_ranks
from tests.tiny_families import make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

VOCABULARY = 50  # padded to 64
SAMPLES = 13
UPDATES = 2


@dataclass(frozen=True)
class Case:
    """One objective and one cut into microbatches."""

    objective: str
    max_tokens: int
    empty: bool = False


CASES = {
    "token-mean": Case("token-mean", 10_000),
    "token-mean, many microbatches": Case("token-mean", 20),
    "token-mean, an empty microbatch": Case("token-mean", 40, empty=True),
    "seq-mean-token-sum": Case("seq-mean-token-sum", 30),
    "next token": Case("next-token", 30, empty=True),
    "grpo, kl and entropy": Case("grpo", 30),
}
# Which objective and cut meets which optimizer matters to neither.
ORDINARY = ("token-mean, an empty microbatch", "seq-mean-token-sum", "next token", "grpo, kl and entropy")
DISTRIBUTED = ("token-mean, many microbatches", "next token")
TP = {"tensor_model_parallel_size": 2}
TP_SP = TP | {"sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
ETP = {"expert_tensor_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "DP2": (2, "moe", {}),
    "EP2": (2, "moe", EP),
    "TP2 SP": (2, "moe", TP_SP),
    "PP2": (2, "moe", PP),
    "TP2 SP EP2": (4, "moe", TP_SP | EP),
    "PP2 EP2": (4, "moe", PP | EP),
    "TP2 SP DP2": (4, "moe", TP_SP),
    "PP2 VPP2": (2, "moe", VPP),
    "TP2 SP ETP2": (2, "moe", TP_SP | ETP),
    "ETP2": (2, "moe", ETP),
    "EP2 ETP2": (4, "moe", EP | ETP),
    "DP2 overlapped": (2, "moe", {"overlap_grad_reduce": True}),
    "EP2 recompute": (
        2,
        "moe",
        EP | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "TP2 SP recompute of attention and experts, router in fp32": (
        2,
        "moe",
        TP_SP
        | {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "moe"],
            "moe_router_dtype": "fp32",
        },
    ),
    "shared expert TP2 SP EP2": (4, "shared_expert", TP_SP | EP),
    "shared expert PP2": (2, "shared_expert", PP),
    "dense tied DP2": (2, "dense_tied", {}),
    "dense tied TP2": (2, "dense_tied", TP),
    "dense tied TP2 SP": (2, "dense_tied", TP_SP),
    "dense tied PP2": (2, "dense_tied", PP),
    "dense tied TP2 PP2": (4, "dense_tied", TP_SP | PP),
    "dense tied PP2 VPP2": (2, "dense_tied", VPP),
}


@dataclass(frozen=True)
class Outcome:
    """What two updates on one minibatch did."""

    log_probs: list[FloatArray]
    tables: list[Table]
    grad_norms: list[float]
    weights: dict[str, Tensor]  # on rank 0, by their Hugging Face names


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "moe": make_tiny_qwen3_moe(root / "moe", vocab_size=VOCABULARY, num_layers=4),
        "shared_expert": make_tiny(root / "shared_expert", "qwen2_moe", vocab_size=VOCABULARY, num_layers=4),
        "dense_tied": make_tiny_qwen3(
            root / "dense_tied", vocab_size=VOCABULARY, num_layers=4, tie_word_embeddings=True
        ),
    }


@pytest.fixture(scope="module")
def samples(folders: dict[str, Path]) -> dict[str, list[Sample]]:
    return {name: off_policy_samples(folder, SAMPLES) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def single(folders: dict[str, Path], samples: dict[str, list[Sample]]) -> dict[str, dict[str, Outcome]]:
    """Outcomes on one rank, by model and case."""
    return {name: run_ranks(1, train, folder, samples[name], {}, tuple(CASES))[0] for name, folder in folders.items()}


def objective_of(name: str, samples: Sequence[Sample]) -> Objective:
    if name == "next-token":
        return NextToken(denominators(samples))
    if name == "grpo":
        weighting = Weighting(KERNELS["grpo"], KERNELS["grpo"].make_params({}))
        regularization = Regularization(kl_coef=0.5, entropy_coef=0.1)
        return PolicyGradient(weighting, Aggregation.SEQ_MEAN_TOKEN_MEAN, denominators(samples), regularization)
    return PolicyGradient(Weighting(KERNELS["vespo"], VespoParams()), Aggregation(name), denominators(samples))


def train(
    folder: Path, samples: Sequence[Sample], megatron: dict[str, Any], cases: Sequence[str]
) -> dict[str, Outcome]:
    """For each case a fresh policy, updated twice; by the case's name."""
    outcomes = {}
    for name in cases:
        case = CASES[name]
        policy = make_policy(folder, megatron)
        plan = make_plan(samples, case.max_tokens, case.empty, microbatch_multiple(megatron))
        if name == "grpo, kl and entropy":
            # Of the reference, while the policy is the one after the first update: they differ.
            policy.keep_reference()
            warm_up = objective_of("token-mean", samples)
            policy.forward_backward(samples, plan, warm_up)
            policy.optim_step()
            with policy.reference():
                log_ref = policy.log_probs(samples, plan)
            samples = [replace(sample, log_ref=values) for sample, values in zip(samples, log_ref, strict=True)]
        log_probs = policy.log_probs(samples, plan)
        tables, norms = [], []
        for _ in range(UPDATES):
            tables.append(policy.forward_backward(samples, plan, objective_of(case.objective, samples)).table)
            norms.append(policy.optim_step().grad_norm)
        exporter = HfExporter(policy.chunks, load_architecture(folder))
        weights = {key: tensor.clone() for bucket in exporter.stream() for key, tensor in bucket}
        outcomes[name] = Outcome(log_probs, tables, norms, weights)
    return outcomes


def train_with_both_optimizers(
    folder: Path, samples: Sequence[Sample], megatron: dict[str, Any]
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """Outcomes with the ordinary optimizer and with the distributed one."""
    distributed = megatron | {"use_distributed_optimizer": True}
    return train(folder, samples, megatron, ORDINARY), train(folder, samples, distributed, DISTRIBUTED)


def assert_same(ours: Outcome, theirs: Outcome, weights: bool = True) -> None:
    close = {"rtol": 2e-5, "atol": 5e-6}
    for one, other in zip(ours.log_probs, theirs.log_probs, strict=True):
        np.testing.assert_allclose(one, other, **close)
    for update, (mine, reference) in enumerate(zip(ours.tables, theirs.tables, strict=True)):
        assert mine.keys() == reference.keys()
        for name in reference:
            np.testing.assert_allclose(mine[name], reference[name], err_msg=f"{name} of update {update}", **close)
    np.testing.assert_allclose(ours.grad_norms, theirs.grad_norms, rtol=1e-5)
    if weights:
        assert ours.weights.keys() == theirs.weights.keys()
        for name, tensor in theirs.weights.items():
            torch.testing.assert_close(ours.weights[name], tensor, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- one layout equals another ---


def test_the_update_does_something(single: dict[str, dict[str, Outcome]], folders: dict[str, Path]) -> None:
    """What the comparisons below compare is neither zero nor alike for all objectives."""
    for outcomes in single.values():
        first = outcomes["token-mean"]
        table = first.tables[0]
        assert (table["tokens"] == 0).sum() == 2
        assert 0.1 < table["phi"][table["tokens"] > 0].min() < table["phi"].max() < 1.25
        assert np.abs(table["loss"]).max() > 1e-3
        assert min(first.grad_norms) > 0.2, "so that clipping acts"
        assert abs(first.grad_norms[1] / first.grad_norms[0] - 1) > 1e-3
        assert abs(outcomes["seq-mean-token-sum"].grad_norms[0] / first.grad_norms[0] - 1) > 0.1
        regularized = outcomes["grpo, kl and entropy"].tables[0]
        assert regularized["kl_ref"].max() > 1e-4
        assert abs(regularized["loss"][3]) > 1e-3, "a sample of advantage 0 has the regularization's loss alone"
        assert abs(outcomes["next token"].grad_norms[0] / first.grad_norms[0] - 1) > 0.01
        other = outcomes["next token"].weights
        assert all(float((first.weights[name] - other[name]).abs().max()) > 1e-4 for name in other if "norm" in name)


def test_the_cut_into_microbatches_does_not_matter(single: dict[str, dict[str, Outcome]]) -> None:
    for outcomes in single.values():
        for name in ("token-mean, many microbatches", "token-mean, an empty microbatch"):
            assert_same(outcomes[name], outcomes["token-mean"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_rank(
    folders: dict[str, Path],
    samples: dict[str, list[Sample]],
    single: dict[str, dict[str, Outcome]],
    layout: str,
) -> None:
    size, model, megatron = LAYOUTS[layout]
    ranks = run_ranks(size, train_with_both_optimizers, folders[model], samples[model], megatron, **megatron)
    for rank, optimizers in enumerate(ranks):
        for outcomes in optimizers:
            for name, outcome in outcomes.items():
                assert_same(outcome, single[model][name], weights=rank == 0)


# --- the router's auxiliary losses ---

BALANCING = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.1,
    "moe_router_dtype": "fp32",
}


@dataclass(frozen=True)
class Balanced:
    """What an update with auxiliary losses did."""

    grad_norm: float
    losses: dict[str, float]
    weights: dict[str, Tensor]


def train_balanced(folder: Path, samples: Sequence[Sample], megatron: dict[str, Any]) -> Balanced:
    """One update on the same four microbatches, whoever computes them: these losses are of microbatches."""
    policy = make_policy(folder, megatron)
    size = len(samples) // 4
    microbatches = [list(range(start, start + size)) for start in range(0, 4 * size, size)]
    plan = microbatches[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
    policy.forward_backward(samples, plan, objective_of("token-mean", samples))
    result = policy.optim_step()
    exporter = HfExporter(policy.chunks, load_architecture(folder))
    weights = {key: tensor.clone() for bucket in exporter.stream() for key, tensor in bucket}
    return Balanced(result.grad_norm, result.router_losses, weights)


@pytest.fixture(scope="module")
def even_samples(samples: dict[str, list[Sample]]) -> list[Sample]:
    """8 samples in 4 microbatches of an even number of tokens: sequence parallelism needs no padding."""

    def cut(sample: Sample) -> Sample:
        prompt = replace(sample.prompt, input_ids=np.resize(sample.prompt.input_ids, 3))
        return replace(
            sample,
            prompt=prompt,
            response_ids=np.resize(sample.response_ids, 4),
            log_mu=np.resize(sample.log_mu, 4),
            weight_versions=np.resize(sample.weight_versions, 4),
        )

    return [cut(sample) for sample in samples["moe"] if len(sample.response_ids)][:8]


@pytest.fixture(scope="module")
def balanced(folders: dict[str, Path], even_samples: list[Sample]) -> Balanced:
    """What one rank does."""
    (single,) = run_ranks(1, train_balanced, folders["moe"], even_samples, BALANCING)
    (plain,) = run_ranks(1, train_balanced, folders["moe"], even_samples, {})
    assert single.losses.keys() == {"load_balancing_loss", "z_loss"}
    assert single.losses["load_balancing_loss"] > 1
    assert abs(single.grad_norm / plain.grad_norm - 1) > 0.01 and not plain.losses
    return single


@pytest.mark.parametrize("layout", ["DP2", "EP2", "TP2 SP", "PP2", "PP2 VPP2", "TP2 SP EP2"])
def test_auxiliary_losses_do_not_depend_on_the_layout(
    folders: dict[str, Path], even_samples: list[Sample], balanced: Balanced, layout: str
) -> None:
    size, _, megatron = LAYOUTS[layout]
    ranks = run_ranks(size, train_balanced, folders["moe"], even_samples, megatron | BALANCING, **megatron)
    for outcome in ranks:
        assert outcome.grad_norm == pytest.approx(balanced.grad_norm, rel=1e-5)
        assert outcome.losses == pytest.approx(balanced.losses, rel=1e-5)
    for name, tensor in balanced.weights.items():
        torch.testing.assert_close(ranks[0].weights[name], tensor, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- and that is the formula ---


def plain_log_probs(model: Any, sample: Sample, temperature: float) -> Tensor:
    """log pi of each response token, this sample alone, nothing packed, the plain torch way."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ids = torch.from_numpy(np.concatenate([sample.prompt.input_ids, sample.response_ids])).long()
    if not len(sample.response_ids):
        return torch.zeros(0)
    borders = torch.tensor([0, len(ids) - 1], dtype=torch.int32)
    logits = model(
        input_ids=ids[None, :-1],
        position_ids=torch.arange(len(ids) - 1)[None],
        attention_mask=None,
        packed_seq_params=PackedSeqParams("thd", borders, borders, max_seqlen_q=len(ids), max_seqlen_kv=len(ids)),
    )[0, :, :VOCABULARY]
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[-len(sample.response_ids) :, 0]


def plain_loss(model: Any, samples: Sequence[Sample], objective: str, temperature: float) -> Tensor:
    """The formula of the paper, summed sample by sample."""
    tokens = sum(len(sample.response_ids) for sample in samples)
    total = torch.zeros(())
    for sample in samples:
        log_pi = plain_log_probs(model, sample, temperature)
        if objective == "next-token":
            total = total - log_pi.sum() / tokens
            continue
        w = (log_pi.detach() - torch.from_numpy(sample.log_mu)).sum().exp()
        c1, c2 = (2, 3) if sample.advantage >= 0 else (3, 2)
        phi = w**c1 * torch.exp(c2 * (1 - w))
        divisor = tokens if objective == "token-mean" else len(samples)
        total = total - phi * sample.advantage * log_pi.sum() / divisor
    return total


@dataclass(frozen=True)
class Gradient:
    """A loss, its gradient by parameter, and log pi of every sample."""

    loss: float
    gradient: dict[str, Tensor]
    log_pi: list[FloatArray]


def both_gradients(
    folder: Path, samples: Sequence[Sample], objective: str, temperature: float
) -> tuple[Gradient, Gradient]:
    """By torch autograd of the formula, and by the policy in three microbatches, the last of them empty."""
    (model,) = load_model(folder, {})
    loss = plain_loss(model, samples, objective, temperature)
    loss.backward()
    with torch.no_grad():
        log_pi = [plain_log_probs(model, sample, temperature).numpy() for sample in samples]
    plain = Gradient(float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}, log_pi)

    policy = make_policy(folder, {}, temperature)
    plan = [list(range(5)), list(range(5, len(samples))), []]
    measured = policy.forward_backward(samples, plan, objective_of(objective, samples))
    gradient = {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}
    for trained, scored in zip(measured.tokens.log_pi, policy.log_probs(samples, plan), strict=True):
        np.testing.assert_allclose(trained, scored, atol=1e-6)
    return plain, Gradient(float(measured.table["loss"].sum()), gradient, measured.tokens.log_pi)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("objective", ["token-mean", "seq-mean-token-sum", "next-token"])
def test_the_gradient_is_that_of_the_formula(
    folders: dict[str, Path], samples: dict[str, list[Sample]], objective: str, temperature: float
) -> None:
    ((plain, policy),) = run_ranks(1, both_gradients, folders["moe"], samples["moe"], objective, temperature)
    for one, other in zip(policy.log_pi, plain.log_pi, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)
    assert policy.loss == pytest.approx(plain.loss, rel=1e-5, abs=1e-7)
    assert policy.gradient.keys() == plain.gradient.keys()
    for name, gradient in plain.gradient.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            policy.gradient[name], gradient, rtol=0, atol=2e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- and the host waits once ---


def count_waits(folder: Path, samples: Sequence[Sample], objective: str) -> tuple[list[str], int]:
    """What the host waited for in log-probabilities, loss and metrics of a minibatch, and the number of microbatches.

    The model itself is Megatron's and left out; so is what the optimizer does.
    """
    policy = make_policy(folder, {})
    waits: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with count_host_syncs() as syncs:
                result = function(*args, **kwargs)
            waits.extend(syncs.events)
            return result

        return call

    plan = make_plan(samples, 30)
    with (
        mock.patch.object(Sums, "over_ranks", counted(Sums.over_ranks)),
        mock.patch.object(policy_module, "checked_table", counted(policy_module.checked_table)),
        mock.patch.object(head_module, "token_log_probs", counted(head_module.token_log_probs)),
        mock.patch.object(Sums, "add_columns", counted(Sums.add_columns)),
        mock.patch.object(Sums, "set_tokens", counted(Sums.set_tokens)),
        mock.patch.object(PolicyGradient, "__call__", counted(PolicyGradient.__call__)),
        mock.patch.object(NextToken, "__call__", counted(NextToken.__call__)),
    ):
        policy.forward_backward(samples, plan, objective_of(objective, samples))
    return waits, len(plan)


@pytest.mark.parametrize("objective", ["token-mean", "next-token"])
def test_the_host_waits_once_a_minibatch(
    folders: dict[str, Path], samples: dict[str, list[Sample]], objective: str
) -> None:
    ((waits, microbatches),) = run_ranks(1, count_waits, folders["moe"], samples["moe"], objective)
    assert microbatches > 2
    assert len(waits) == 1, waits


# --- what cannot be trained on ---


def spoil_and_train(folder: Path, samples: Sequence[Sample], objective: str) -> str:
    """Make the embedding of token 49 NaN and train."""
    policy = make_policy(folder, {})
    with torch.no_grad():
        policy.chunks[0].embedding.word_embeddings.weight[49] = float("nan")
    try:
        policy.forward_backward(samples, [list(range(len(samples)))], objective_of(objective, samples))
    except UserError as error:
        return str(error)
    return "trained"


def test_nan_weights_name_the_samples(folders: dict[str, Path], samples: dict[str, list[Sample]]) -> None:
    def with_prompt(sample: Sample, token: int) -> Sample:
        return replace(sample, prompt=replace(sample.prompt, input_ids=np.array([token], dtype=np.int32)))

    used = [sample for sample in samples["moe"] if len(sample.response_ids) and 49 not in sample.response_ids][:4]
    spoiled = [with_prompt(sample, 49 if number in (1, 3) else 2) for number, sample in enumerate(used)]
    for objective in ("token-mean", "next-token"):
        (message,) = run_ranks(1, spoil_and_train, folders["moe"], spoiled, objective)
        assert f"samples {used[1].name}, {used[3].name} (prompt/response)" in message
        assert "lower megatron.lr" in message
