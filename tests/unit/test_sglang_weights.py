"""Changes and fingerprints of weights, on both sides of the wire, without a server."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_vespo.sglang_weights import loader, wire
from megatron_vespo.sglang_weights.wire import WHOLE, Change, Request, find_change, fingerprints

INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.dtype.itemsize])


SHAPES = {"q": (4, 8), "k": (2, 8), "half": (4, 6), "transposed": (2, 5), "one": (1,)}


class Model(torch.nn.Module):
    """Loads as SGLang's models do: ``q`` and ``k`` are fused, ``half`` is this worker's half, ``lost`` is ignored."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(6, 8, dtype=dtype))
        self.half_ = torch.nn.Parameter(torch.zeros(4, 3, dtype=dtype))
        self.transposed = torch.nn.Parameter(torch.zeros(5, 2, dtype=dtype))
        self.one = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            match name:
                case "q":
                    self.qk.data.narrow(0, 0, 4).copy_(weight)
                case "k":
                    self.qk.data[4:].copy_(weight)
                case "half":
                    self.half_.data.copy_(weight.chunk(2, dim=1)[1])
                case "transposed":
                    self.transposed.data.copy_(weight.t().contiguous())
                case "one":
                    self.one.data.fill_(weight.item())


def values(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def send(model: Model, new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> list[Change]:
    """As the transport and the loader do it."""
    found = [find_change(name, tensor, old[name]) for name, tensor in new.items()]
    parts = [part for _, part, _ in found] + [gaps for _, _, gaps in found if gaps is not None]
    flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    changes = [change for change, _, _ in found]
    model.load_weights(loader._patches(flat, changes))
    return changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_written_where_they_belong(dtype: torch.dtype) -> None:
    model, full = Model(dtype), Model(dtype)
    old = values(0, dtype)
    model.load_weights(old.items())
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name in ("q", "k", "half", "transposed"):
        new[name].view(-1)[1::4] *= -1
    new["one"] += 1
    changes = send(model, new, old)
    assert all(0 < change.count < 10 for change in changes if change.name != "one")
    full.load_weights(new.items())
    for ours, theirs in zip(model.parameters(), full.parameters(), strict=True):
        assert torch.equal(bits(ours.data), bits(theirs.data))


def test_what_is_not_sent_is_not_written() -> None:
    """The server's own bits stay where the trainer saw no change, even if they are others."""
    model, old = Model(), values(0)
    model.load_weights(values(1).items())
    before = model.qk.detach().clone()
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["q"][1, 2] = 7.0
    send(model, new, old)
    assert model.qk[1, 2] == 7
    before[1, 2] = 7.0
    assert torch.equal(model.qk, before)


@settings(max_examples=60, deadline=None)
@example(3 * 65535 + 7, {3 * 65535 + 6}, True)  # farther from the last one than 16 bits can say
@example(2**16, {2**16 - 1}, True)
@given(st.integers(1, 3 * 65535 + 7), st.sets(st.integers(0, 3 * 65535 + 6), max_size=8), st.booleans())
def test_a_change_restores_every_bit(numel: int, positions: set[int], half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    old = torch.arange(numel).to(dtype)
    new = old.clone()
    for position in positions:
        if position < numel:
            bits(new)[position] ^= 1  # the smallest change there is; of 0 it makes a denormal
    change, sent, gaps = find_change("w", new, old)
    if gaps is None:
        assert change.count == WHOLE and torch.equal(bits(sent), bits(new))
        return
    assert change.count == len(sent) <= len(positions) + numel // 65535
    patch = wire.apply_gaps(change, sent, gaps)
    restored = torch.where(patch.isnan(), old, patch)
    assert torch.equal(bits(restored), bits(new))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0])
def test_special_values_arrive(special: float) -> None:
    old = torch.zeros(100)
    new = old.clone()
    new[3] = special
    change, sent, gaps = find_change("w", new, old)
    patch = sent if gaps is None else wire.apply_gaps(change, sent, gaps)
    restored = new if gaps is None else torch.where(patch.isnan(), old, patch)
    assert (change.count == WHOLE) == (special != special)
    assert torch.equal(bits(restored), bits(new))


def test_small_changes_are_sent_in_few_bytes_and_large_ones_whole() -> None:
    old = torch.zeros(10_000, dtype=torch.bfloat16)
    few, many = old.clone(), old.clone()
    few[::25] = 1
    many[::2] = 1
    change, _, _ = find_change("w", few, old)
    assert change.value_bytes + change.gap_bytes == 4 * 400
    assert find_change("w", many, old)[0].count == WHOLE


# --- fingerprints ---


def report(model: Model, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    changes = tuple(Change(name, shape, "", WHOLE) for name, shape in shapes.items())
    return loader._report(model, changes, torch.device("cpu"))


CHECKED = {name: shape for name, shape in SHAPES.items() if name != "one"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_server_reads_the_fingerprints_of_what_was_sent(dtype: torch.dtype) -> None:
    model, weights = Model(dtype), values(0, dtype)
    model.load_weights(weights.items())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    told = report(model, CHECKED)
    for was, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(was, parameter), "reading writes nothing"
    assert told[:, 2].tolist() == [wire.DTYPES.index(dtype)] * 4
    whole = [name for name in CHECKED if name != "half"]
    expected = fingerprints([(weights[name], None) for name in whole]).tolist()
    got = {name: (count, total) for name, (count, total, _) in zip(CHECKED, told.tolist(), strict=True)}
    assert [got[name] for name in whole] == [
        (weights[name].numel(), total) for name, total in zip(whole, expected, strict=True)
    ]
    # The other worker has the other half: their sums add up to the whole tensor's.
    positions = torch.arange(24).view(4, 6)[:, :3]
    other = fingerprints([(weights["half"][:, :3], positions)])
    assert got["half"][0] == 12
    assert other + got["half"][1] == fingerprints([(weights["half"], None)])


def test_a_tensor_that_the_model_ignores_shows() -> None:
    told = report(Model(), {"q": (4, 8), "lost": (3, 3)})
    assert told[:, 0].tolist() == [32, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 31), st.integers(0, 31))
def test_every_bit_counts(position: int, bit: int) -> None:
    weights = torch.arange(32, dtype=torch.float32)
    spoiled = weights.clone()
    mask = 1 << bit if bit < 31 else -(2**31)
    bits(spoiled)[position] ^= mask
    assert fingerprints([(weights, None)]) != fingerprints([(spoiled, None)])


def test_exchanged_elements_show() -> None:
    weights = torch.arange(12, dtype=torch.float32)
    swapped = weights[[1, 0, *range(2, 12)]]
    assert fingerprints([(weights, None)]) != fingerprints([(swapped, None)])


def test_fingerprints_do_not_depend_on_how_pieces_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [(torch.randn(n).to(d), None) for n in (1, 5, 700, 3) for d in (torch.float32, torch.bfloat16)]
    at_once = fingerprints(pieces)
    assert torch.equal(at_once, torch.cat([fingerprints([piece]) for piece in pieces]))
    monkeypatch.setattr(wire, "_GROUP_NUMEL", 64)
    assert torch.equal(at_once, fingerprints(pieces))


Loader = Callable[[torch.nn.Parameter, torch.Tensor], None]
FOREIGN: dict[str, Loader] = {
    "assigned": lambda parameter, weight: parameter.data.__setitem__(slice(None), weight),
    "added": lambda parameter, weight: parameter.data.add_(weight),
    "converted": lambda parameter, weight: parameter.data.copy_(weight.to(torch.bfloat16)),
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_loader_that_cannot_be_followed_is_told_and_writes_nothing(how: str) -> None:
    class Foreign(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for _, weight in weights:
                FOREIGN[how](self.half_, weight[:, :3])

    model = Foreign()
    told = report(model, {"half": (4, 6)})
    assert told[:, 0].tolist() == [loader.UNREADABLE]
    assert not model.half_.any()


def test_tensors_that_are_joined_before_they_are_written_are_told_apart() -> None:
    class Joined(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            found = dict(weights)
            self.qk.data.copy_(torch.cat([found["q"], found["k"]]))

    model, weights = Joined(), values(0)
    model.load_weights(weights.items())
    told = report(model, {"q": (4, 8), "k": (2, 8)})
    assert torch.equal(told[:, 1], fingerprints([(weights[name], None) for name in ("q", "k")]))


# --- requests ---


class Strict(pickle.Unpickler):
    """Knows nothing but torch.Tensor, as SGLang's knows little more."""

    def find_class(self, module: str, name: str) -> object:
        assert (module, name) == ("torch", "Tensor")
        return torch.Tensor


def test_a_request_arrives_as_it_was_sent() -> None:
    changes = (Change("a.b", (2, 3), "bfloat16", 4), Change("c", (5,), "float32", WHOLE))
    for request in (
        Request("patch", changes, "group"),
        Request("map", changes, memory={"GPU-1": [1, {"base64": "AA=="}]}),
        Request("fingerprint", changes, report="/folder/1_0"),
    ):
        ((text, tensor),) = Strict(io.BytesIO(base64.b64decode(request.encode(worker=3)))).load()
        assert Request.decode(text) == replace(request, report="/folder/1_0.3" if request.report else "")
    assert tensor.to("cpu").numel() == 0
