"""The laboratory's sampler computes what transformers and the trainer compute, and samples from what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.staleness_lab.fake_fp8 import Fp8
from examples.staleness_lab.rollouts import copy_weights, sample_groups
from examples.staleness_lab.sampler import Perturbation, Sampler
from megatron_vespo.errors import UserError
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.types import Prompt
from tests.hf_reference import hf_log_probs
from tests.policies import make_plan, make_policy
from tests.ranks import run_ranks
from tests.tiny_models import EOS_ID, make_tiny_qwen3_moe

PERTURBATIONS = {
    "bf16": Perturbation(dtype=torch.bfloat16),
    "fp8": Perturbation(fp8=Fp8()),
    "fp8-tensor": Perturbation(fp8=Fp8("tensor", "ue8m0"), fp8_attention=True),
    "noise": Perturbation(router_noise=0.3),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": make_tiny_qwen3_moe(folder / "plain", hidden_size=48, num_experts=6),
        "odd": make_tiny_qwen3_moe(
            folder / "odd", norm_topk_prob=False, tie_word_embeddings=True, num_kv_heads=4, num_layers=3
        ),
    }


def make_sampler(folder: Path, perturbation: Perturbation | None = None, seed: int = 0) -> Sampler:
    sampler = Sampler(json.loads((folder / "config.json").read_text()), perturbation or Perturbation(), seed)
    sampler.load(load_file(folder / "model.safetensors").items())
    return sampler


def prompts(number: int, length: int = 5) -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [Prompt(i, rng.integers(0, 64, length).astype(np.int32), "1") for i in range(number)]


def test_log_probs_are_those_of_transformers(models: dict[str, Path], tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 64, (4, 40))
    references = hf_log_probs(list(models.values()), ids.tolist(), tmp_path)
    for name, folder in models.items():
        found = make_sampler(folder).log_probs(torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(found, np.stack(references[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["exact", *PERTURBATIONS])
def test_log_mu_is_of_the_distribution_sampled_from(models: dict[str, Path], name: str) -> None:
    """With a cache, finished sequences left behind, and in any chunk: the same as one pass over the whole text."""
    if name == "noise":
        pytest.skip("another noise in every pass")
    sampler = make_sampler(models["plain"], PERTURBATIONS.get(name))
    chosen = [prompt.input_ids for prompt in prompts(6)]
    stops = [EOS_ID, *range(10, 16)]  # one in nine tokens: some end at once, some never
    found = sampler.generate(chosen, 4, 30, stops, temperature=1.0)
    lengths = [len(response.ids) for group in found for response in group]
    assert min(lengths) < 5 and max(lengths) == 30
    # A whole tensor's scale depends on what else is in it, so that one is only near.
    tolerance = {"bf16": 0.08, "fp8-tensor": 1.0}.get(name, 1e-5)
    for ids, group in zip(chosen, found, strict=True):
        for response in group:
            whole = np.concatenate([ids, response.ids])[None]
            log_probs = sampler.log_probs(torch.from_numpy(whole).long())[0, len(ids) - 1 : -1]
            again = log_probs.gather(1, torch.from_numpy(response.ids).long()[:, None])[:, 0].numpy()
            np.testing.assert_allclose(response.log_mu, again, atol=tolerance, rtol=0)
            assert (response.finish_reason == "stop") == (response.ids[-1] in stops)
            assert not np.isin(response.ids[:-1], stops).any()


def test_tokens_come_as_often_as_they_should(models: dict[str, Path]) -> None:
    sampler = make_sampler(models["plain"])
    (prompt,) = prompts(1)
    (group,) = sampler.generate([prompt.input_ids], 4000, 1, [], temperature=2.0)
    counts = np.bincount([int(response.ids[0]) for response in group], minlength=64)
    ids = torch.from_numpy(prompt.input_ids[None]).long()
    # log_probs are at temperature 1; log softmax does not mind what is added.
    expected = torch.softmax(sampler.log_probs(ids)[0, -1] / 2, 0).numpy() * 4000
    surprise = float(((counts - expected) ** 2 / expected).sum())
    assert surprise < 64 + 5 * np.sqrt(2 * 64)  # chi squared: mean 64, deviation 11


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_every_perturbation_shows(models: dict[str, Path], name: str) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (4, 40)))
    exact = make_sampler(models["plain"]).log_probs(ids)
    difference = (make_sampler(models["plain"], PERTURBATIONS[name]).log_probs(ids) - exact).abs()
    assert 1e-3 < difference.mean() < 1


def test_a_seed_gives_the_same_samples(models: dict[str, Path]) -> None:
    chosen = [prompt.input_ids for prompt in prompts(3)]
    first, again, other = (
        np.concatenate(
            [r.ids for g in make_sampler(models["plain"], seed=s).generate(chosen, 2, 9, [], 1.0) for r in g]
        )
        for s in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_cannot_be_sampled_is_refused(models: dict[str, Path]) -> None:
    sampler = make_sampler(models["plain"])
    with pytest.raises(UserError, match="one length"):
        sampler.generate([np.array([1], np.int32), np.array([1, 2], np.int32)], 1, 4, [], 1.0)
    weights = load_file(models["plain"] / "model.safetensors")
    sampler.load([(name, tensor * torch.nan) for name, tensor in weights.items()])
    with pytest.raises(UserError, match="diverged"):
        sampler.generate([np.array([1], np.int32)], 1, 4, [], 1.0)


def _against_the_trainer(folder: Path) -> float:
    policy = make_policy(folder, {}, temperature=1.3)
    exporter = HfExporter(policy.chunks, load_architecture(folder))
    sampler = Sampler(json.loads((folder / "config.json").read_text()), Perturbation(), 0)
    sampler.load(copy_weights(exporter))
    groups = sample_groups(sampler, prompts(8), 4, 20, [EOS_ID, *range(10, 16)], 1.3, 0)
    samples = [sample for group in groups for sample in group.samples]
    log_pi = policy.log_probs(samples, make_plan(samples, 256))
    return max(float(np.abs(sample.log_mu - own).max()) for sample, own in zip(samples, log_pi, strict=True))


@pytest.mark.parametrize("name", ["plain", "odd"])
def test_without_mismatch_log_mu_is_log_pi(models: dict[str, Path], name: str) -> None:
    (difference,) = run_ranks(1, _against_the_trainer, models[name])
    assert difference < 1e-5
