"""What SGLang says of the experts it chose, against transformers."""

import asyncio
from pathlib import Path

import numpy as np

from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.conftest import VOCAB_SIZE
from tests.hf_reference import routed_experts_in_this_process
from tests.tiny_models import make_tiny_qwen3_moe

LAYERS, CHOSEN = 3, 2
# Some share a prefix, which SGLang computes once.
PROMPTS = [[5, 9, 2, 7], [5, 9, 2, 7], [5, 9, 2, 7, 11, 12], [8], [30, 31, 32]]


def test_experts_are_of_the_pass_that_gave_each_token(tmp_path: Path) -> None:
    model = make_tiny_qwen3_moe(
        tmp_path / "model", vocab_size=VOCAB_SIZE, num_layers=LAYERS, num_experts=6, num_experts_per_tok=CHOSEN
    )
    args = {"enable_return_routed_experts": True}
    with SGLangServer(model, tmp_path / "server.log", args=args) as server:
        server.wait_ready()

        async def use() -> list[tuple[list[int], np.ndarray]]:
            client = SGLangClient(server.url, vocab_size=VOCAB_SIZE, unpushed_version=0, routing=(LAYERS, CHOSEN))
            try:
                assert (await client.info()).returns_routed_experts
                sampling = SamplingParams(20, ignore_eos=True)
                responses = await asyncio.gather(*[client.generate(prompt, sampling) for prompt in PROMPTS])
            finally:
                await client.close()
            found = []
            for prompt, response in zip(PROMPTS, responses, strict=True):
                assert response.routed_experts is not None
                found.append(([*prompt, *response.response_ids.tolist()], response.routed_experts))
            return found

        found = asyncio.run(use())
    expected = routed_experts_in_this_process(model, [text for text, _ in found])
    for (text, ours), theirs in zip(found, expected, strict=True):
        assert ours.shape == (20, LAYERS, CHOSEN)
        first = len(text) - 20 - 1
        np.testing.assert_array_equal(np.sort(ours, -1), np.sort(theirs[first : first + 20], -1))
        assert (np.sort(ours, -1) != np.sort(theirs[first + 1 : first + 21], -1)).any()
