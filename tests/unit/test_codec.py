from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo import codec
from megatron_vespo.errors import UserError
from megatron_vespo.types import Prompt, Sample, SampleGroup
from tests.unit.rollout.sample_groups import assert_same_groups, groups


@given(st.lists(groups(), max_size=3))
def test_round_trip_is_exact(original: list[SampleGroup]) -> None:
    assert_same_groups(codec.decode_groups(codec.encode_groups(original)), original)


def test_rows_of_older_versions_stay_readable() -> None:
    arrays = np.array([3], np.int32), np.array([-0.5], np.float32), np.array([6], np.int32)
    sample = Sample(Prompt(0, np.array([1], np.int32)), 1, *arrays, "stop", "a", 1.0, 0.5)
    (group,) = codec.to_rows([SampleGroup(sample.prompt, [sample])])
    for fewer in range(6):
        (read,) = codec.from_rows([[group[0], [group[1][0][: len(group[1][0]) - fewer]]]])
        assert (read.samples[0].advantage, read.samples[0].routed_experts) == (0.5, None)
    with pytest.raises(ValueError, match="zip"):
        codec.from_rows([[group[0], [group[1][0][:-6]]]])


def test_every_field_travels() -> None:
    assert [*codec._PROMPT_FIELDS] == [field.name for field in fields(Prompt)]
    trainers_own = {"log_old", "log_ref"}  # set on every rank once the samples are there
    assert {"prompt", *codec._SAMPLE_FIELDS} | trainers_own == {field.name for field in fields(Sample)}
    assert [field.name for field in fields(SampleGroup)] == ["prompt", "samples"]


def test_metadata_that_cannot_travel_is_named() -> None:
    group = SampleGroup(Prompt(0, np.array([1], np.int32), metadata={"checker": object()}), [])
    with pytest.raises(UserError, match=r"metadata holds <object .*of type object"):
        codec.encode_groups([group])
