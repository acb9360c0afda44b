"""Names, manifest and order of the checkpoints in a folder; no torch is needed."""

import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from megatron_vespo.checkpoint_folder import (
    ChecksummedWriter,
    FileRecord,
    Manifest,
    begin,
    choose,
    complete,
    file_record,
    list_checkpoints,
    prune,
    read_manifest,
    way_out,
)
from megatron_vespo.errors import UserError

LAYOUT = {"ranks": 2}


def save(folder: Path, iteration: int) -> None:
    temporary = begin(folder, iteration)
    (temporary / "__0_0.distcp").write_bytes(b"tensors %d" % iteration)
    complete(folder, iteration, LAYOUT, {}, {"run_state": b"state"})


def test_only_complete_checkpoints_are_listed(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    for iteration in (10, 9, 12_345_678):
        save(tmp_path, iteration)
    (begin(tmp_path, 11) / "__0_0.distcp").touch()
    (tmp_path / "iter_0000012").mkdir()
    (tmp_path / "release").mkdir()
    assert list_checkpoints(tmp_path) == [9, 10, 12_345_678]


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = tmp_path / "iter_0000005"
    manifest = read_manifest(folder)
    assert manifest.layout == LAYOUT
    assert manifest.files.keys() == {"__0_0.distcp", "run/run_state"}
    assert manifest.run_files == ["run_state"]
    assert manifest.damage(folder, manifest.files) == ""
    assert manifest.files["run/run_state"] == FileRecord(5, zlib.crc32(b"state"))
    (folder / "__0_0.distcp").write_bytes(b"tensors 6")
    assert "__0_0.distcp is damaged" in manifest.damage(folder, manifest.files)


@pytest.mark.parametrize("name", ["/etc/passwd", "run/../../secret"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    Manifest({}, {name: FileRecord(1, 1)}).write(tmp_path)
    with pytest.raises(UserError, match="is no file of the checkpoint"):
        read_manifest(tmp_path)


def test_the_tracker_says_which_is_the_newest(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save(tmp_path, iteration)
    assert choose(tmp_path, None) == 15
    save(tmp_path, 6)  # the run went back to 5
    assert choose(tmp_path, None) == 6
    assert choose(tmp_path, 10) == 10
    assert way_out(tmp_path, 10).endswith("--resume 6")
    assert way_out(tmp_path, 5) == "there is none before it"
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert choose(tmp_path, None) == 15
    with pytest.raises(UserError, match="no checkpoint 7; there are 5, 6, 10, 15"):
        choose(tmp_path, 7)


def test_old_ones_go_and_later_ones_stay(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 9, 4):
        save(tmp_path, iteration)
    prune(tmp_path, 4, keep=2)
    assert list_checkpoints(tmp_path) == [3, 4, 9]


def test_a_checkpoint_is_replaced_and_leftovers_go(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (begin(tmp_path, 2) / "half").touch()
    (tmp_path / ".latest_checkpointed_iteration.txt.x.tmp").touch()
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_failed_write_is_kept_until_asked_for(tmp_path: Path) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    writer = ChecksummedWriter(Full())
    assert writer.write(b"abc") == writer.write(b"def") == 3
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    with (tmp_path / "file").open("wb") as file:
        writer = ChecksummedWriter(file)
        for part in (b"abc", memoryview(b"def")):
            writer.write(part)
        writer.check()
    assert writer.record == file_record(tmp_path / "file") != FileRecord(0, 0)


def test_it_needs_no_torch() -> None:
    code = "import sys, megatron_vespo.checkpoint_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
