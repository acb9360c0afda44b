import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.rewards.protocol import Frames, Mark, decode_request, encode_request, frame
from megatron_vespo.types import SampleGroup
from tests.unit.rollout.sample_groups import assert_same_groups, groups


@given(st.lists(st.binary(max_size=9)), st.data())
def test_frames_arrive_whole_however_they_are_cut(contents: list[bytes], data: st.DataObject) -> None:
    stream, frames, received = b"".join(map(frame, contents)), Frames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += frames.feed(stream[:size])
        stream = stream[size:]
    assert received == contents


@given(groups(), st.integers(1, 2**60))
def test_a_request_holds_the_sample_whole(group: SampleGroup, number: int) -> None:
    for sample in group.samples:
        (content,) = Frames().feed(encode_request(number, sample))
        found = decode_request(content)
        assert found[0] == number
        original = SampleGroup(group.prompt, [sample])
        assert_same_groups([SampleGroup(found[1].prompt, [found[1]])], [original])


def test_a_mark_is_seen_through_shared_memory() -> None:
    descriptor = Mark.create_file()
    worker, pool = Mark(descriptor), Mark(descriptor)
    os.close(descriptor)
    assert pool.read()[0] == 0
    worker.begin(2**40)
    number, since = pool.read()
    assert number == 2**40
    worker.begin(2**40)
    assert pool.read()[1] > since
    worker.end()
    assert pool.read()[0] == 0
    pool.close()
    with pytest.raises(ValueError):
        pool.read()
