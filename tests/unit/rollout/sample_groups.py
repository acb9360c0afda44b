"""Sample groups of all kinds, and when two of them are the same."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from megatron_vespo.types import Prompt, Sample, SampleGroup

# The default alphabet takes seconds to build.
text = st.text("aZ09 \n\0é界😀")
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=8,
)


@st.composite
def groups(draw: st.DrawFn) -> SampleGroup:
    prompt = Prompt(
        draw(st.integers(0, 2**40)),
        np.asarray(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1)), np.int32),
        draw(text),
        draw(st.dictionaries(text, json_like)),
    )
    samples = []
    for index in range(draw(st.integers(0, 3))):
        length = draw(st.integers(0, 5))
        inserted = draw(st.booleans())
        log_mu = draw(st.lists(st.floats(width=32), min_size=length, max_size=length))
        ids = np.arange(length, dtype=np.int32)
        samples.append(
            Sample(
                prompt,
                index,
                ids,
                np.asarray(log_mu, np.float32),
                ids * 2,
                "stop",
                draw(text),
                draw(st.floats(allow_nan=False)),
                draw(st.floats(allow_nan=False)),
                reward_terms=draw(st.dictionaries(st.sampled_from(["math", "form"]), st.floats(allow_nan=False))),
                routed_experts=draw(
                    st.sampled_from([None, np.arange(length * 6, dtype=np.int16).reshape(length, 3, 2)])
                ),
                inserted_ids=np.array([7, 8], np.int32) if inserted else None,
                inserted_before=np.array([0, length], np.int32) if inserted else None,
            )
        )
    return SampleGroup(prompt, samples)


def make_group(index: int, *, size: int = 2, version: int = 0, tokens: int = 3) -> SampleGroup:
    """A group whose every number says where it belongs."""
    prompt = Prompt(index, np.array([index + 1, 2], np.int32), f"label {index}", {"level": index})
    ids = np.arange(tokens, dtype=np.int32)
    versions = np.full(tokens, version, np.int32)
    samples = [
        Sample(prompt, i, ids + i, np.full(tokens, -0.25 * (i + 1), np.float32), versions, "stop", f"text {i}", i, -i)
        for i in range(size)
    ]
    return SampleGroup(prompt, samples)


def assert_same_array(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()
    assert actual.flags.writeable


def assert_same_groups(actual: Sequence[SampleGroup], expected: Sequence[SampleGroup]) -> None:
    assert len(actual) == len(expected)
    for after, before in zip(actual, expected, strict=True):
        assert (after.prompt.index, after.prompt.label, after.prompt.metadata) == (
            before.prompt.index,
            before.prompt.label,
            before.prompt.metadata,
        )
        assert_same_array(after.prompt.input_ids, before.prompt.input_ids)
        for a, b in zip(after.samples, before.samples, strict=True):
            assert a.prompt is after.prompt
            assert (a.index, a.finish_reason, a.text, a.reward, a.advantage) == (
                b.index,
                b.finish_reason,
                b.text,
                b.reward,
                b.advantage,
            )
            assert_same_array(a.response_ids, b.response_ids)
            assert_same_array(a.log_mu, b.log_mu)
            assert_same_array(a.weight_versions, b.weight_versions)
            assert a.reward_terms == b.reward_terms
            assert a.sequence_ids.tolist() == b.sequence_ids.tolist()
            assert (a.inserted_ids is None) == (b.inserted_ids is None)
            assert (a.routed_experts is None) == (b.routed_experts is None)
            if a.routed_experts is not None and b.routed_experts is not None:
                assert_same_array(a.routed_experts, b.routed_experts)
