"""The GPU's arithmetic on tiles, without a GPU: Triton's interpreter runs it, and its compiler makes an H100's code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.policy import logprobs, tiles
from tests.unit.policy.test_logprobs import (
    BROKEN,
    BY_FIVE,
    CASES,
    ROWS,
    Case,
    call,
    check,
    fill_new_memory_with_nan,
    make_inputs,
    run,
    set_sizes,
)

pytest.importorskip("triton", reason="Triton is not installed")


def test_interpreted_kernels_compute_what_torch_does() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.policy.test_tile_kernels"]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_an_h100_with_wide_loads_and_without_spills(dtype: str, entropy: bool) -> None:
    from megatron_vespo.policy import tile_kernels as kernels

    row, tile, number = "*fp32", f"*{dtype}", "i32"
    pointers = {"products": tile, "columns": "*i64"}
    for kernel, signature, constants in [
        (
            kernels.sum_kernel,
            pointers | {"sums": row, "rows": number, "width": number},
            {"BLOCK": kernels.SUM_BLOCK},
        ),
        (
            kernels.gradient_kernel,
            pointers | dict.fromkeys(("log_sum_exp", "scale", "entropy", "entropy_scale"), row) | {"width": number},
            {"OF_ENTROPY": entropy, "BLOCK": kernels.GRADIENT_BLOCK},
        ),
    ]:
        constants |= {"INVERSE": 1 / 0.7, "EXACT": kernels.tl.float32}
        code = compiled(kernel, signature, constants)
        assert ".version" in code.asm["ptx"] and len(code.asm["cubin"]) > 1000
        assert "ld.global.v4.b32" in code.asm["ptx"], "loads of less than 16 bytes"
        assert "ld.local" not in code.asm["ptx"]


def compiled(kernel: object, signature: dict[str, str], constants: dict[str, object]):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_vespo.policy.tile_kernels import WARPS

    # What Triton finds of its arguments at a call: memory at a multiple of 16 bytes, and so the width of a tile.
    names = list(signature)
    aligned = [names.index(name) for name in names if signature[name].startswith("*") or name == "width"]
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})


def interpret() -> None:
    """Let CPU tensors take the GPU's way."""
    from megatron_vespo.policy import tile_kernels as kernels

    kernels.SUM_BLOCK = kernels.GRADIENT_BLOCK = 4  # a row of a tile takes several then, the last not full

    class Interpreted(kernels.FusedTiles):
        """torch has a product of two dtypes on GPUs only."""

        def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
            total.add_(left.to(total.dtype) @ right.to(total.dtype))

    logprobs.tiles_of = Interpreted
    parallel.tensor_parallel_size, parallel.tensor_parallel_rank = lambda: 1, lambda: 0
    fill_new_memory_with_nan()


def results_and_gradients() -> None:
    for case in CASES:
        set_sizes(case.sizes)
        check(run(case, *make_inputs(case)), case)


def broken_logits() -> None:
    """As test_logprobs has them."""
    set_sizes(BY_FIVE)
    case = Case(dtype=torch.float32)
    for value, factor in BROKEN.values():
        for entry in (0, 11, 26):
            hidden, weight, targets = make_inputs(case)
            hidden[:, 0] = 0
            sound = call(case, hidden, weight, targets)
            hidden[4, 0], weight[entry, 0] = value, factor
            found = call(case, hidden, weight, targets)
            rows = [row for row in range(ROWS) if row != 4]
            assert found.log_pi[4].isnan() and found.entropy[4].isnan(), (value, entry)
            assert found.log_pi[rows].equal(sound.log_pi[rows])
            assert found.entropy[rows].equal(sound.entropy[rows])


if __name__ == "__main__":
    interpret()
    results_and_gradients()
    broken_logits()
    assert tiles.SIZES["cpu"] != tiles.TileSize(2**20, 2048), "no case was run"
