"""FP8 emulation rounds to what e4m3 with these scales can hold, and to nothing else."""

import pytest
import torch

from examples.staleness_lab.fake_fp8 import BLOCK, E4M3_MAX, Fp8, straight_through

RECIPES = [Fp8(granularity, scale) for granularity in ("tensor", "block") for scale in ("fp32", "ue8m0")]


def wide(*shape: int) -> torch.Tensor:
    """Values of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def by_hand(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """One block, rounded with one scale: three bits behind the leading one, subnormals below 2^-6."""
    scale = x.abs().max() / E4M3_MAX
    if power_of_two:
        scale = 2 ** torch.log2(scale).ceil()
    scaled = x / scale
    exponent = torch.log2(scaled.abs().clamp(min=2.0**-20)).floor().clamp(min=-6)
    step = 2 ** (exponent - 3)
    return torch.round(scaled / step) * step * scale  # torch.round goes to even, as the cast does


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_weight_is_rounded_as_by_hand(recipe: Fp8) -> None:
    weight = wide(200, 300)  # neither is a multiple of 128
    size = BLOCK if recipe.granularity == "block" else 300
    expected = torch.empty_like(weight)
    for row in range(0, 200, size):
        for column in range(0, 300, size):
            tile = weight[row : row + size, column : column + size]
            expected[row : row + size, column : column + size] = by_hand(tile, recipe.scale == "ue8m0")
    torch.testing.assert_close(recipe.weight(weight), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_activations_share_scales_as_they_should(recipe: Fp8) -> None:
    x = wide(2, 3, 300)
    if recipe.granularity == "tensor":
        expected = by_hand(x, recipe.scale == "ue8m0")
    else:
        parts = [
            [by_hand(part, recipe.scale == "ue8m0") for part in token.split(BLOCK)] for token in x.reshape(-1, 300)
        ]
        expected = torch.stack([torch.cat(token) for token in parts]).view_as(x)
    torch.testing.assert_close(recipe.activation(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_experts_have_their_own_scales(recipe: Fp8) -> None:
    experts = wide(3, 40, 50) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    torch.testing.assert_close(recipe.weight(experts), torch.stack([recipe.weight(expert) for expert in experts]))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_edges(recipe: Fp8) -> None:
    assert torch.equal(recipe.weight(torch.zeros(4, 4)), torch.zeros(4, 4))
    assert recipe.activation(torch.zeros(0, 4)).shape == (0, 4)
    for factor in (1e-30, 1.0, 3e37):  # the largest value of a block never becomes NaN
        assert recipe.weight(wide(130, 130) / wide(130, 130).abs().max() * factor).isfinite().all()
    x = wide(5, 7)
    once = recipe.activation(x)
    assert torch.equal(recipe.activation(once), once)
    assert not torch.equal(once, x)
    assert recipe.activation(x.bfloat16()).dtype == torch.bfloat16


def test_finer_scales_are_closer_and_powers_of_two_are_not() -> None:
    """What the recipes are for: a block is spoilt by an outlier of its own only; ue8m0 wastes up to a bit of range."""
    weight = wide(256, 256)
    weight[0, 0] = 1e6
    error = {recipe: (recipe.weight(weight) - weight)[128:].abs().mean() for recipe in RECIPES}
    assert error[Fp8("block", "fp32")] < error[Fp8("tensor", "fp32")] / 10
    assert torch.equal(Fp8("block", "ue8m0").weight(wide(8, 8)), Fp8("block", "ue8m0").weight(wide(8, 8) * 4) / 4)


def test_the_gradient_goes_straight_through() -> None:
    x = wide(4, 4).requires_grad_()
    rounded = straight_through(x, Fp8().weight(x.detach()))
    assert torch.equal(rounded, Fp8().weight(x.detach()))
    (rounded**2).sum().backward()
    assert torch.equal(x.grad, 2 * rounded)
