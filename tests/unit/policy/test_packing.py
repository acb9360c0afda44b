import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.policy.packing import PackedBatch, pack, packed_length
from megatron_vespo.types import Prompt, Sample

CPU = torch.device("cpu")


def sample(prompt: list[int], response: list[int], index: int = 0, advantage: float = 0.0) -> Sample:
    log_mu = -np.arange(1, len(response) + 1, dtype=np.float32) - index
    return Sample(
        Prompt(index, np.array(prompt, dtype=np.int32)),
        0,
        np.array(response, dtype=np.int32),
        log_mu,
        np.zeros(len(response), dtype=np.int32),
        "stop",
        advantage=advantage,
    )


def borders(batch: PackedBatch) -> list[int]:
    assert batch.packed_seq_params.cu_seqlens_q.dtype == torch.int32
    assert torch.equal(batch.packed_seq_params.cu_seqlens_q, batch.packed_seq_params.cu_seqlens_kv)
    return batch.packed_seq_params.cu_seqlens_q.tolist()


def test_the_worked_example() -> None:
    samples = [sample([5, 9], [8, 1], 0, 0.5), sample([7], [3], 1, -2.0)]
    batch = pack(samples, [0, 1], alignment=6, device=CPU)
    assert batch.tokens.tolist() == [5, 9, 8, 7, 0, 0]
    assert batch.targets.tolist() == [9, 8, 1, 3, 0, 0]
    assert batch.mask.tolist() == [False, True, True, True, False, False]
    assert batch.sample_index.tolist() == [0, 0, 0, 1, -1, -1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.log_mu.tolist() == [0, -1, -2, -2, 0, 0]
    assert batch.advantages.tolist() == [0.5, -2.0]
    assert batch.names == ("0/0", "1/0")
    assert borders(batch) == [0, 3, 4, 6]
    assert batch.packed_seq_params.max_seqlen_q == batch.packed_seq_params.max_seqlen_kv == 3
    assert batch.packed_seq_params.qkv_format == "thd"


def test_indices_are_those_of_the_minibatch() -> None:
    samples = [sample([1], [2], number) for number in range(5)]
    batch = pack(samples, [3, 1], alignment=1, device=CPU)
    assert batch.indices.tolist() == [3, 1]
    assert batch.names == ("3/0", "1/0")
    assert borders(batch) == [0, 1, 2]


def test_an_empty_response_keeps_its_place_and_has_no_targets() -> None:
    for prompt, length in (([4, 5, 6], 2), ([4], 1)):
        empty = sample(prompt, [])
        assert packed_length(empty) == length
        batch = pack([empty, sample([1], [2], 1)], [0, 1], alignment=1, device=CPU)
        assert batch.tokens.tolist() == [*prompt[:length], 1]
        assert batch.mask.tolist() == [False] * length + [True]
        assert batch.num_samples == 2


def test_a_microbatch_without_samples_is_all_padding() -> None:
    batch = pack([sample([1], [2])], [], alignment=4, device=CPU)
    assert batch.num_samples == 0
    assert batch.tokens.tolist() == [0] * 4
    assert not batch.mask.any()
    assert batch.sample_index.tolist() == [-1] * 4
    assert borders(batch) == [0, 4]


tokens = st.integers(0, 1000)
responses = st.lists(tokens, max_size=6)
prompts = st.lists(tokens, min_size=1, max_size=6)


@given(st.lists(st.tuples(prompts, responses), max_size=6), st.sampled_from([1, 2, 3, 16]), st.randoms())
def test_every_response_token_is_a_target_once(
    texts: list[tuple[list[int], list[int]]], alignment: int, random: "np.random.Generator"
) -> None:
    samples = [sample(prompt, response, number) for number, (prompt, response) in enumerate(texts)]
    order = list(range(len(samples)))
    random.shuffle(order)
    batch = pack(samples, order, alignment=alignment, device=CPU)
    total = len(batch.tokens)
    assert total % alignment == 0
    assert max(sum(map(packed_length, samples)), 1) <= total < max(sum(map(packed_length, samples)), 1) + alignment
    for number, index in enumerate(order):
        here = batch.sample_index == number
        prompt, response = texts[index]
        assert int(here.sum()) == packed_length(samples[index])
        assert batch.targets[here & batch.mask].tolist() == response
        assert batch.log_mu[here & batch.mask].tolist() == samples[index].log_mu.tolist()
        text = prompt + response
        assert batch.tokens[here].tolist() == text[: max(len(text) - 1, 1)]
        assert batch.targets[here].tolist() == (text[1:] or [0])
        assert batch.positions[here].tolist() == list(range(packed_length(samples[index])))
    assert not batch.mask[batch.sample_index < 0].any()
    assert batch.log_mu[~batch.mask].abs().sum() == 0
    # Segments begin exactly where positions restart.
    assert borders(batch) == [*(batch.positions == 0).nonzero().flatten().tolist(), total]
