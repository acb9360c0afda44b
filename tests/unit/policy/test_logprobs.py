"""Log-probabilities by tiles of logits equal torch's on all logits at once, gradients too, on one rank and on two."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import peak_bytes
from megatron_vespo import parallel
from megatron_vespo.policy import tiles
from megatron_vespo.policy.logprobs import TokenLogProbs, token_log_probs
from megatron_vespo.policy.tiles import TileSize
from tests.host_syncs import count_host_syncs
from tests.ranks import run_ranks

ROWS, HIDDEN, PADDED = 9, 6, 32
Sizes = tuple[int, int]
"""Elements and least width of a tile."""
WHOLE: Sizes = (2**20, 512)
BY_FIVE: Sizes = (5 * ROWS, 1)  # divides no slice
AT_LEAST_SEVEN: Sizes = (1, 7)


@dataclass(frozen=True)
class Case:
    vocab_size: int = 27
    temperature: float = 1.0
    dtype: torch.dtype = torch.float64
    sizes: Sizes = BY_FIVE
    trained: int = ROWS
    rows: int = ROWS
    entropy_gradient: bool = False


CASES = [
    Case(sizes=WHOLE),
    Case(),
    Case(sizes=(1, 1)),
    Case(temperature=0.7, sizes=AT_LEAST_SEVEN),
    Case(vocab_size=32, temperature=2.5),
    Case(vocab_size=13, temperature=0.7),  # of two slices, the second is all padding
    Case(vocab_size=16, trained=5),
    Case(trained=4, temperature=0.7),
    Case(trained=0),
    Case(trained=0, rows=0),
    Case(dtype=torch.float32, temperature=0.7),
    Case(dtype=torch.float32, trained=5, sizes=WHOLE),
    Case(dtype=torch.bfloat16, sizes=WHOLE),
    Case(dtype=torch.bfloat16, temperature=0.7, trained=5),
    Case(entropy_gradient=True, sizes=WHOLE),
    Case(entropy_gradient=True, temperature=0.7),
    Case(entropy_gradient=True, vocab_size=13, trained=5),
    Case(entropy_gradient=True, trained=0),
    Case(entropy_gradient=True, dtype=torch.float32, temperature=2.5),
    Case(entropy_gradient=True, dtype=torch.bfloat16, trained=5),
]


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [R, H], all of the weight [V, H], targets [R]."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[7] = weight[3]  # a tie wherever they win
    hidden[0] = 4 * weight[3]
    hidden[1] = 0  # all tie
    hidden[2] *= 300  # one entry has all the probability
    weight[case.vocab_size :] *= 40  # padding that would win
    targets = torch.tensor([7, 0, 9, 4, 5, 6, 12, 8, 1])
    return hidden[: case.rows].to(case.dtype), weight.to(case.dtype), targets[: case.rows]


def coefficients(case: Case) -> Tensor:
    return torch.arange(1, case.rows + 1, dtype=torch.float64)


def rank_slice(weight: Tensor) -> Tensor:
    return weight.chunk(parallel.tensor_parallel_size())[parallel.tensor_parallel_rank()]


def set_sizes(sizes: Sizes) -> None:
    tiles.SIZES["cpu"] = TileSize(*sizes)


def fill_new_memory_with_nan() -> None:
    """So that no result hangs on what memory happened to hold."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sizes], None]]:
    """A single rank without a process group, where memory is filled with NaN; gives what sets the size of tiles."""
    monkeypatch.setattr(parallel, "tensor_parallel_size", lambda: 1)
    monkeypatch.setattr(parallel, "tensor_parallel_rank", lambda: 0)
    monkeypatch.setattr(tiles, "SIZES", dict(tiles.SIZES))
    fill_new_memory_with_nan()
    yield set_sizes
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A product in bfloat16 takes a little memory of its own for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What this rank gets: results, and gradients of coefficients * log_pi."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    before = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    out = call(case, hidden, weight, targets)
    assert out.log_pi.requires_grad and not out.correct.requires_grad
    assert out.entropy.requires_grad == case.entropy_gradient
    total = (out.log_pi * coefficients(case).to(out.log_pi)).sum()
    if case.entropy_gradient:
        total = total + (out.entropy * coefficients(case).flip(0).to(out.log_pi)).sum()
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    for now, then in zip((hidden.detach(), weight.detach(), targets), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return {
        "log_pi": out.log_pi.detach(),
        "entropy": out.entropy.detach(),
        "correct": out.correct,
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def call(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenLogProbs:
    return token_log_probs(
        hidden,
        weight,
        targets,
        trained=case.trained,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        entropy_gradient=case.entropy_gradient,
    )


def expected(case: Case) -> dict[str, Tensor]:
    """The same in float64, of the whole vocabulary."""
    hidden, weight, targets = make_inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[: case.vocab_size].T / case.temperature
    log_p = logits.log_softmax(-1)
    log_pi = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = (log_pi * coefficients(case))[: case.trained].sum()
    if case.entropy_gradient:
        total = total + (entropy * coefficients(case).flip(0))[: case.trained].sum()
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "log_pi": log_pi.detach(),
        "entropy": entropy.detach(),
        "correct": logits.gather(1, targets[:, None])[:, 0] == logits.amax(1),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 2e-5), torch.bfloat16: (1e-2, 2e-2)}


def check(found: dict[str, Tensor], case: Case) -> None:
    wanted = expected(case)
    assert found.keys() == wanted.keys()
    relative, absolute = TOLERANCES[case.dtype]
    assert found["correct"].equal(wanted["correct"])
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert found["log_pi"].dtype == found["entropy"].dtype == exact
    assert found["hidden"].dtype == found["weight"].dtype == case.dtype
    assert not found["hidden"][case.trained :].any()
    for name in ("log_pi", "entropy"):
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=relative, atol=absolute)
    for name in ("hidden", "weight"):
        error = (found[name].double() - wanted[name]).norm()
        assert error <= relative * wanted[name].norm(), (name, error, wanted[name].norm())
    assert not found["weight"][case.vocab_size :].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_equals_torch(case: Case, alone: Callable[[Sizes], None]) -> None:
    alone(case.sizes)
    check(run(case, *make_inputs(case)), case)


class Collectives(TorchDispatchMode):
    """Names of the collectives within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def run_cases_on_a_rank() -> list[dict[str, Tensor]]:
    fill_new_memory_with_nan()
    results = []
    for case in CASES:
        set_sizes(case.sizes)
        hidden, weight, targets = make_inputs(case)
        with Collectives() as collectives:
            results.append(run(case, hidden, rank_slice(weight), targets))
        assert len(collectives.names) == (case.rows > 0), collectives.names
    set_sizes(BY_FIVE)
    hidden, weight, targets = make_inputs(CASES[0])
    with count_host_syncs() as syncs:
        token_log_probs(
            hidden.requires_grad_(), rank_slice(weight), targets, trained=5, vocab_size=27, temperature=0.7
        ).log_pi.sum().backward()
    assert not syncs.events
    return results


def test_two_ranks_equal_torch_with_one_collective_and_no_waiting() -> None:
    for case, *ranks in zip(CASES, *run_ranks(2, run_cases_on_a_rank, tensor_model_parallel_size=2), strict=True):
        whole = dict(ranks[0])
        for name in ("log_pi", "entropy", "correct"):
            assert ranks[0][name].equal(ranks[1][name]), "ranks differ"
        whole["hidden"] = ranks[0]["hidden"] + ranks[1]["hidden"]
        whole["weight"] = torch.cat([rank["weight"] for rank in ranks])
        check(whole, case)


def test_the_reference_has_something_to_say() -> None:
    wanted = expected(CASES[0])
    assert wanted["correct"].any() and not wanted["correct"].all()
    assert wanted["entropy"].min() < 1e-3 and wanted["entropy"].max() > 3
    assert expected(Case(trained=5))["hidden"][5:].abs().sum() == 0
    hidden, weight, _ = make_inputs(CASES[0])
    assert bool((hidden[3:] @ weight.T).argmax(1).ge(CASES[0].vocab_size).all()), "padding does not win"


def test_gradients_are_those_of_finite_differences(alone: Callable[[Sizes], None]) -> None:
    case = Case(trained=5, temperature=0.7)
    alone(case.sizes)
    hidden, weight, targets = make_inputs(case)
    hidden[2] /= 300

    def trained_log_pi(hidden: Tensor, weight: Tensor) -> Tensor:
        return call(case, hidden, weight, targets).log_pi[: case.trained]

    torch.autograd.gradcheck(trained_log_pi, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_backward_pass_does_not_touch_untrained_rows(alone: Callable[[Sizes], None]) -> None:
    case = Case(trained=5)
    alone(case.sizes)
    hidden, weight, targets = make_inputs(case)
    hidden[case.trained :] = torch.nan  # times a coefficient of zero, it would be NaN in the weight's gradient
    found = run(case, hidden, weight, targets)
    assert found["log_pi"].isnan().tolist() == [False] * 5 + [True] * 4
    wanted = expected(case)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(found[name], wanted[name])


def test_untrained_rows_have_no_graph(alone: Callable[[Sizes], None]) -> None:
    hidden, weight, targets = make_inputs(CASES[0])
    hidden.requires_grad_()
    out = token_log_probs(hidden, weight, targets, trained=5, vocab_size=27, temperature=1.0)
    out.log_pi[5:].sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_forward_only(alone: Callable[[Sizes], None]) -> None:
    case = CASES[0]
    hidden, weight, targets = make_inputs(case)
    with torch.no_grad():
        out = call(case, hidden.requires_grad_(), weight, targets)
    assert not out.log_pi.requires_grad
    torch.testing.assert_close(out.log_pi, expected(case)["log_pi"])
    torch.testing.assert_close(out.entropy, expected(case)["entropy"])


BROKEN = {"NaN": (torch.nan, 1.0), "inf": (1e30, 1e30), "-inf": (1e30, -1e30)}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("sizes", [WHOLE, BY_FIVE, (1, 1)], ids=["whole", "by five", "by one"])
@pytest.mark.parametrize("entry", [0, 11, 26])
def test_a_broken_logit_makes_its_row_nan_and_no_other(
    name: str, sizes: Sizes, entry: int, alone: Callable[[Sizes], None]
) -> None:
    case = Case(dtype=torch.float32, sizes=sizes)
    alone(sizes)
    hidden, weight, targets = make_inputs(case)
    hidden[:, 0] = 0
    sound = call(case, hidden, weight, targets)
    hidden[4, 0], weight[entry, 0] = BROKEN[name]
    found = call(case, hidden, weight, targets)
    rows = [row for row in range(ROWS) if row != 4]
    assert found.log_pi[4].isnan() and found.entropy[4].isnan()
    assert found.log_pi[rows].equal(sound.log_pi[rows])
    assert found.entropy[rows].equal(sound.entropy[rows])


def broken_logits_on_a_rank() -> list[TokenLogProbs]:
    case = Case(dtype=torch.float32)
    set_sizes(BY_FIVE)
    results = []
    for hidden_value, weight_value in BROKEN.values():
        hidden, weight, targets = make_inputs(case)
        hidden[:, 0] = 0
        hidden[4, 0], weight[20, 0] = hidden_value, weight_value
        results.append(call(case, hidden, rank_slice(weight), targets))
    return results


def test_a_broken_logit_of_one_rank_is_known_to_all() -> None:
    for results in run_ranks(2, broken_logits_on_a_rank, tensor_model_parallel_size=2):
        for out in results:
            assert out.log_pi.isnan().tolist() == [row == 4 for row in range(ROWS)]


def test_large_logits_do_not_overflow(alone: Callable[[Sizes], None]) -> None:
    alone(BY_FIVE)
    hidden, weight = torch.full((2, 1), 1e4), torch.arange(-13.0, 14.0)[:, None]
    weight = torch.cat([weight, -weight])
    out = token_log_probs(hidden, weight, torch.tensor([26, 0]), trained=2, vocab_size=54, temperature=1.0)
    torch.testing.assert_close(out.log_pi, torch.tensor([-0.6931472, -2.6e5 - 0.6931472]))
    torch.testing.assert_close(out.entropy, torch.tensor([0.6931472] * 2))


@pytest.mark.parametrize("target", [-1, 27, 31, 100])
def test_what_is_no_entry_has_probability_zero(target: int, alone: Callable[[Sizes], None]) -> None:
    case = Case(vocab_size=27)
    alone(case.sizes)
    hidden, weight, targets = make_inputs(case)
    targets[3] = target
    found = call(case, hidden, weight, targets).log_pi
    assert found[3] == -torch.inf
    assert (found > -torch.inf).sum() == ROWS - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_tiles_do_not_lose_digits(dtype: torch.dtype, alone: Callable[[Sizes], None]) -> None:
    """A thousand tiles, added up in bfloat16, would be wrong several times over."""
    rows, entries = 4, 4096
    alone((4 * rows, 1))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, 8, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(entries, 8, generator=generator) / 4 + 1).to(dtype)
    targets = torch.arange(rows)
    out = token_log_probs(hidden, weight, targets, trained=rows, vocab_size=entries, temperature=1.0)
    (gradient,) = torch.autograd.grad(out.log_pi.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    log_pi = (exact @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])
    (wanted,) = torch.autograd.grad(log_pi.sum(), exact)
    assert (gradient.double() - wanted).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [0, 5, ROWS])
def test_nothing_waits_for_the_device(dtype: torch.dtype, trained: int, alone: Callable[[Sizes], None]) -> None:
    case = Case(dtype=dtype, trained=trained, temperature=0.7)
    alone(case.sizes)
    hidden, weight, targets = make_inputs(case)
    hidden.requires_grad_(), weight.requires_grad_()
    with count_host_syncs() as syncs:
        call(case, hidden, weight, targets).log_pi.sum().backward()
    assert not syncs.events


@pytest.mark.parametrize(
    ("dtype", "backward", "bytes_of_a_logit"),
    [(torch.float32, False, 8), (torch.bfloat16, False, 10), (torch.float32, True, 8), (torch.bfloat16, True, 12)],
)
def test_no_more_logits_than_a_tile_are_in_memory(
    dtype: torch.dtype, backward: bool, bytes_of_a_logit: int, alone: Callable[[Sizes], None], one_thread: None
) -> None:
    """As the module says. The hidden states have the size of a tile here; there are 32 tiles.

    Half a tile more is allowed in bfloat16: on some CPUs (with AMX) a product packs what it reads.
    """
    rows, entries, width = 192, 16384, 512
    alone((rows * width, 1))
    hidden = torch.randn(rows, width, dtype=dtype).requires_grad_(backward)
    weight = torch.randn(entries, width, dtype=dtype).requires_grad_(backward)
    targets = torch.randint(entries, (rows,))

    def work() -> None:
        out = token_log_probs(hidden, weight, targets, trained=rows, vocab_size=entries, temperature=0.7)
        if backward:
            out.log_pi.sum().backward()

    work()
    hidden.grad = weight.grad = None
    wanted = bytes_of_a_logit * rows * width
    peak = peak_bytes(work, result_bytes=weight.nbytes)
    assert wanted <= peak < (1.15 if dtype == torch.float32 else 1.65) * wanted
