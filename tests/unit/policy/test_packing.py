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


def trained(sample: Sample) -> bool:
    return sample.advantage != 0


def test_the_worked_example() -> None:
    samples = [sample([7], [3], 0), sample([5, 9], [8, 1], 1, 0.5)]
    batch = pack(samples, [0, 1], trains=trained, alignment=6, device=CPU)
    assert batch.tokens.tolist() == [5, 9, 8, 7, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.padding.tolist() == [False] * 4 + [True] * 2
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [8, 1, 3]
    assert batch.log_mu.tolist() == [-2, -3, -1]
    assert batch.sample_index.tolist() == [0, 0, 1]
    assert batch.trained_rows == 2
    assert batch.advantages.tolist() == [0.5, 0]
    assert batch.indices.tolist() == [1, 0]
    assert borders(batch) == [0, 3, 4, 6]
    assert batch.packed_seq_params.max_seqlen_q == batch.packed_seq_params.max_seqlen_kv == 3
    assert batch.packed_seq_params.qkv_format == "thd"


def test_indices_are_those_of_the_minibatch() -> None:
    samples = [sample([1], [2], number) for number in range(5)]
    batch = pack(samples, [3, 1], trains=trained, alignment=1, device=CPU)
    assert batch.indices.tolist() == [3, 1]
    assert borders(batch) == [0, 1, 2]


def test_an_empty_response_keeps_its_place_and_has_no_rows() -> None:
    for prompt, length in (([4, 5, 6], 2), ([4], 1)):
        empty = sample(prompt, [])
        assert packed_length(empty) == length
        batch = pack([empty, sample([1], [2], 1)], [0, 1], trains=trained, alignment=1, device=CPU)
        assert batch.tokens.tolist() == [*prompt[:length], 1]
        assert batch.rows.tolist() == [length]
        assert batch.sample_index.tolist() == [1]
        assert batch.num_samples == 2


def test_a_microbatch_without_samples_has_no_rows_but_a_token() -> None:
    batch = pack([sample([1], [2])], [], trains=trained, alignment=4, device=CPU)
    assert batch.num_samples == 0
    assert batch.tokens.tolist() == [0] * 4
    for rows in (batch.rows, batch.targets, batch.log_mu, batch.sample_index):
        assert len(rows) == 0
    assert batch.log_mu.dtype == torch.float32 and batch.rows.dtype == batch.targets.dtype == torch.int64
    assert not batch.padding.any(), "a load-balancing loss over no token would be 0/0"
    assert borders(batch) == [0, 4]


tokens = st.integers(0, 1000)
responses = st.lists(tokens, max_size=6)
prompts = st.lists(tokens, min_size=1, max_size=6)


@given(
    st.lists(st.tuples(prompts, responses, st.sampled_from([0.0, 1.0, -1.0])), max_size=6),
    st.sampled_from([1, 2, 3, 16]),
    st.randoms(),
)
def test_every_response_token_is_a_target_once(
    texts: list[tuple[list[int], list[int], float]], alignment: int, random: "np.random.Generator"
) -> None:
    samples = [sample(prompt, response, number, a) for number, (prompt, response, a) in enumerate(texts)]
    order = list(range(len(samples)))
    random.shuffle(order)
    batch = pack(samples, order, trains=trained, alignment=alignment, device=CPU)
    total, filled = len(batch.tokens), sum(map(packed_length, samples))
    assert total % alignment == 0
    assert max(filled, 1) <= total < max(filled, 1) + alignment
    assert sorted(batch.indices.tolist()) == list(range(len(samples)))
    # Segments begin exactly where positions restart.
    edges = borders(batch)
    assert edges == [*(batch.positions == 0).nonzero().flatten().tolist(), total]
    for number, index in enumerate(batch.indices.tolist()):
        prompt, response, advantage = texts[index]
        mine = batch.sample_index == number
        start, stop = edges[number], edges[number + 1]
        text = prompt + response
        assert batch.tokens[start:stop].tolist() == text[: max(len(text) - 1, 1)]
        assert batch.targets[mine].tolist() == response
        assert batch.log_mu[mine].tolist() == samples[index].log_mu.tolist()
        # A row's own token and those before it are what the target is predicted from.
        assert batch.rows[mine].tolist() == list(range(stop - len(response), stop))
        assert all((mine.nonzero().flatten() < batch.trained_rows) == (advantage != 0))
        assert float(batch.advantages[number]) == advantage
    assert batch.padding.sum() == (total - filled if samples else 0)
    assert not batch.padding[:filled].any()
    assert batch.sample_index.tolist() == sorted(batch.sample_index.tolist())
