"""The pieces of deterministic inference on a CPU."""

from __future__ import annotations

import struct

import torch

from megatron_vespo.rollout.generation import sample_seed
from megatron_vespo.rollout.protocol import generate_request
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.sglang_cpu.determinism import mm_in_blocks, murmur_hash32


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words, as its author published it."""
    mask = 0xFFFFFFFF
    state = 0
    for (word,) in struct.iter_unpack("<I", data):
        word = word * 0xCC9E2D51 & mask
        word = (word << 15 | word >> 17) & mask
        state ^= word * 0x1B873593 & mask
        state = (state << 13 | state >> 19) & mask
        state = (state * 5 + 0xE6546B64) & mask
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16


def test_the_hash_is_murmurs() -> None:
    seeds, positions = [0, 1, 2**63 - 1, 0x123456789ABCDEF0], [0, 5, 2**31 - 1, 77]
    columns = [0, 1, 151_935]
    got = murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns))
    assert got.dtype == torch.uint32
    want = [[murmur3(struct.pack("<QII", s, p, c)) for c in columns] for s, p in zip(seeds, positions, strict=True)]
    assert got.tolist() == want


def test_a_row_of_a_product_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(100, 64), torch.randn(48, 64).t()
    whole = mm_in_blocks(left, right)
    torch.testing.assert_close(whole, left @ right)
    for rows in (1, 2, 7, 16, 17, 99):
        assert torch.equal(mm_in_blocks(left[5 : 5 + rows].contiguous(), right), whole[5 : 5 + rows])


def test_every_sample_of_a_run_has_a_seed_of_its_own() -> None:
    seeds = {sample_seed(run, prompt, sample) for run in range(3) for prompt in range(20) for sample in range(8)}
    assert len(seeds) == 3 * 20 * 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


def test_a_seed_travels_with_the_request() -> None:
    sampling = SamplingParams(4)
    seeded, plain = (generate_request([1], sampling, 4, seed).body for seed in (7, None))
    assert seeded is not None and seeded["sampling_params"]["sampling_seed"] == 7
    assert plain is not None and "sampling_seed" not in plain["sampling_params"]
