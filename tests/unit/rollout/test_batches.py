import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_groups import assert_same_groups, groups, make_group

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.batches import BatchSink, list_batches, load_batch, save_batch
from megatron_vespo.types import Prompt, Sample, SampleGroup

# One group of one sample, as version 1 wrote it. It must stay readable, or batches.VERSION must rise.
WRITTEN_BY_VERSION_1 = bytes.fromhex(
    "87a6666f726d6174bc6d65676174726f6e2d766573706f20726f6c6c6f7574206261746368a776657273696f6e01a4737465"
    "7003ae706f6c6963795f76657273696f6e08ab74656d7065726174757265cb3fe6666666666666aa766f6361625f73697a65"
    "40a667726f75707391929407c7110193a33c69349102c4080500000009000000a13481a56c6576656c02919801c7110193a3"
    "3c69349102c4080300000001000000c7110193a33c66349102c408000000bf0000a0bfc7110193a33c69349102c408060000"
    "0008000000a66c656e677468a3612062cb3ff0000000000000cbbfe0000000000000"
)


def save(path: Path, batch: list[SampleGroup], **changes: Any) -> Path:
    header: dict[str, Any] = {"step": 3, "policy_version": 8, "temperature": 0.7, "vocab_size": 64}
    save_batch(path, batch, **header | changes)
    return path


def small_batch() -> list[SampleGroup]:
    prompt = Prompt(7, np.array([5, 9], np.int32), "4", {"level": 2})
    log_mu, versions = np.array([-0.5, -1.25], np.float32), np.array([6, 8], np.int32)
    sample = Sample(prompt, 1, np.array([3, 1], np.int32), log_mu, versions, "length", "a b", 1.0, -0.5)
    return [SampleGroup(prompt, [sample])]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_batch(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@settings(deadline=None)  # a busy disk is no failure
@given(st.lists(groups(), max_size=3), st.floats(0, 2, exclude_min=True), st.integers(0, 2**40))
def test_round_trip_is_exact(original: list[SampleGroup], temperature: float, version: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "batch", original, temperature=temperature, policy_version=version)
        batch = load_batch(path)
    assert_same_groups(batch.groups, original)
    assert (batch.step, batch.policy_version, batch.temperature, batch.vocab_size) == (3, version, temperature, 64)


def test_an_empty_response_keeps_its_types(tmp_path: Path) -> None:
    original = [make_group(0, tokens=0)]
    sample = load_batch(save(tmp_path / "batch", original)).groups[0].samples[0]
    assert (sample.response_ids.dtype, sample.log_mu.dtype, sample.weight_versions.dtype) == ("i4", "f4", "i4")
    assert sample.response_ids.shape == sample.log_mu.shape == sample.weight_versions.shape == (0,)


def test_files_of_version_1_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(WRITTEN_BY_VERSION_1)
    assert_same_groups(load_batch(path).groups, small_batch())


def test_a_file_cut_anywhere_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path / "batch_000001.msgpack", small_batch()).read_bytes()
    path = tmp_path / "batch_000002.msgpack"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "truncated" in refusal(path)


def test_a_file_with_more_behind_it_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "batch", small_batch())
    path.write_bytes(path.read_bytes() + b"\0")
    assert "not a rollout batch" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 1, "reward": 0.5}\n',
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"groups": []}),
        msgspec.msgpack.encode({"format": "somebody's", "version": 1}),
        msgspec.msgpack.encode({"format": 1, "version": 1}),
        b"PK\x03\x04 a zip archive",
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch_000001.msgpack"
    path.write_bytes(content)
    assert "not a rollout batch" in refusal(path)


def change(path: Path, **changes: Any) -> None:
    content = msgspec.msgpack.decode(path.read_bytes())
    path.write_bytes(msgspec.msgpack.encode(content | changes))


def test_a_newer_format_is_named_before_its_content_is_looked_at(tmp_path: Path) -> None:
    path = save(tmp_path / "batch", small_batch())
    change(path, version=5, step="third", groups=None)
    assert "format version 5, while this Megatron-VESPO reads versions up to 4" in refusal(path)


@pytest.mark.parametrize("changes", [{"groups": [[1]]}, {"groups": [[[0, []], []]]}, {"step": "x"}, {"groups": None}])
def test_a_damaged_content_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = save(tmp_path / "batch", small_batch())
    change(path, **changes)
    assert "damaged" in refusal(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere" / "batch_000001.msgpack")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "batch_000001.msgpack", small_batch())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("batch_000001.msgpack", "batch_000002.msgpack"):
        with pytest.raises(UserError, match=f"{name}: the rollout batch cannot be written: .*No space left"):
            save(tmp_path / name, [make_group(0)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["batch_000001.msgpack"]


def test_batches_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["batch_999999.msgpack", "batch_1000000.msgpack", "batch_000012.msgpack", "batch_000002.msgpack"]
    others = [".batch_000001.msgpack.x1.tmp", "batch_000003.msgpack.bak", "step_000001.jsonl", "batch_x.msgpack"]
    for name in names + others:
        (tmp_path / name).touch()
    assert [path.name for path in list_batches(tmp_path)] == [names[3], names[2], names[0], names[1]]
    assert list_batches(tmp_path / "nowhere") == []


def test_a_run_saves_under_the_number_of_its_step(tmp_path: Path) -> None:
    sink = BatchSink(tmp_path / "rollouts", 0.8, 64)
    for step in (1, 2):
        sink.write(step, [make_group(step)], policy_version=4 * (step - 1))
    files = list_batches(tmp_path / "rollouts")
    assert [file.name for file in files] == ["batch_000001.msgpack", "batch_000002.msgpack"]
    second = load_batch(files[1])
    assert (second.step, second.policy_version, second.temperature, second.vocab_size) == (2, 4, 0.8, 64)
    assert_same_groups(second.groups, [make_group(2)])
