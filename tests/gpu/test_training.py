"""Updates, checkpoints, and memory that goes to the host and comes back, with Transformer Engine's Adam and layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vespo.policy.offload import ALL_PARTS
from megatron_vespo.policy.policy import Policy
from tests.checkpoints import State, checkpoints_of, differences, state_of
from tests.gpu.place import BF16, FP8, Place, Precision, make_model, nearly_on_policy, samples, vespo

PRECISIONS = [BF16, *(precision for precision in FP8 if precision.scope == "experts")]
NO_CLIPPING = {"clip_grad": 0.0, "lr": 1e-3, "adam_eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def update(policy: Policy) -> float:
    """One update; the gradient's norm."""
    plan = [list(range(len(samples())))]
    some = nearly_on_policy(samples(), policy.log_probs(samples(), plan))
    policy.forward_backward(some, plan, vespo(some))
    result = policy.optim_step()
    assert not result.skipped
    return result.grad_norm


def step_by_hand(place: Place, folder: Path) -> list[float]:
    """Largest difference, for each of the optimizer's tensors, from AdamW's first step in float64."""
    policy = place.policy(folder, BF16, **NO_CLIPPING)
    places = [
        (part.optimizer, group, parameter)
        for part in policy._optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    before = [parameter.detach().double() for _, _, parameter in places]
    assert update(policy) > 0
    wrong = []
    for (optimizer, group, parameter), old in zip(places, before, strict=True):
        state, (first, second) = optimizer.state[parameter], group["betas"]
        moment, square = state["exp_avg"].double() / (1 - first), state["exp_avg_sq"].double() / (1 - second)
        torch.testing.assert_close(moment**2, square, rtol=1e-4, atol=1e-20)
        decayed = old * (1 - group["lr"] * group["weight_decay"])
        wanted = decayed - group["lr"] * moment / (square.sqrt() + NO_CLIPPING["adam_eps"])
        wrong.append(float((parameter.detach().double() - wanted).abs().max()))
        assert not moment.any() or float((old - wanted).abs().max()) > 1e-4
    return wrong


def test_an_update_is_adamw(place: Place, model: Path) -> None:
    wrong = place.run(step_by_hand, place, model)
    assert len(wrong) > 10 and max(wrong) < 1e-6


def save(place: Place, folder: Path, precision: Precision, checkpoint: Path) -> tuple[State, State, float]:
    """State when it was saved and after one more update, and that one's gradient norm."""
    policy = place.policy(folder, precision)
    for _ in range(2):
        update(policy)
    checkpoints_of(policy, checkpoint).save(2, {"run_state": b"two"})
    saved = on_host(state_of(policy))
    norm = update(policy)
    return saved, on_host(state_of(policy)), norm


def load(place: Place, folder: Path, precision: Precision, checkpoint: Path) -> tuple[State, State, float]:
    """The same from the checkpoint."""
    policy = place.policy(folder, precision)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.fill_(7)
    assert checkpoints_of(policy, checkpoint).load(None).files == {"run_state": b"two"}
    loaded = on_host(state_of(policy))
    norm = update(policy)
    return loaded, on_host(state_of(policy)), norm


def on_host(state: State) -> State:
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_checkpoint_holds_everything(place: Place, model: Path, precision: Precision, tmp_path: Path) -> None:
    saved, _, norm = place.run(save, place, model, precision, tmp_path)
    loaded, _, again = place.run(load, place, model, precision, tmp_path)
    assert differences(loaded, saved) == []
    # Sums of a GPU need not be in the same order twice, and amaxes of the delayed recipe are of other batches.
    assert again == pytest.approx(norm, rel=0.05)


def go_and_come_back(place: Place, folder: Path) -> tuple[list[str], int, int, int]:
    """What differs afterwards, bytes of the device that were given up and that came back, and the model's weights."""
    policy = place.policy(folder)
    update(policy)
    before = on_host(state_of(policy))
    held = _held()
    policy.memory.keep(frozenset())
    away = _held()
    policy.memory.bring(ALL_PARTS)
    back = _held()
    differ = differences(on_host(state_of(policy)), before)
    assert update(policy) > 0
    return differ, held - away, back - away, sum(parameter.numel() for parameter in policy.chunks[0].parameters())


def _held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def test_memory_that_was_given_up_comes_back_with_its_content(place: Place, model: Path) -> None:
    differ, given, taken, weights = place.run(go_and_come_back, place, model)
    assert differ == [] and taken == pytest.approx(given, rel=0.1)
    if not place.rehearsal:
        # In bytes a weight: 2, its gradient 4, the master weight 4, moments 8.
        assert given > 17 * weights
