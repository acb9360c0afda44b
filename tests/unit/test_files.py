import os
from pathlib import Path

import pytest

from megatron_vespo.files import atomic_folder, atomic_write


def test_writes_text_and_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "grüß\n")
    atomic_write(str(tmp_path / "b.bin"), b"\x00\xff")
    atomic_write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "x")
        with atomic_folder(tmp_path / "f") as folder:
            (folder / "x").touch()
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o750


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a"
    atomic_write(target, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        atomic_write(tmp_path / "missing" / "a", "x")


def test_a_folder_appears_when_complete_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "f"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert [p.name for p in target.iterdir()] == [content]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "f"
    with atomic_folder(target) as folder:
        (folder / "x").touch()
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "y").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
