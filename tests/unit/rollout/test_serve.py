"""``serve`` as a user runs it: in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest
from stand_in import make_tree, wait_for, write_tree

from megatron_vespo.rollout.addresses import read_addresses

ROOT = Path(__file__).parents[3]


def serve(folder: Path, tree: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_vespo.serve", str(write_tree(folder, tree)), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def serving(folder: Path, tree: dict[str, Any], *options: str) -> Iterator[subprocess.Popen[str]]:
    """It is ready; killed at the end if it still runs."""
    with serve(folder, tree, *options) as process:
        try:
            read_until(process.stdout, "ready: ")
            yield process
        finally:
            process.kill()


def read_until(stream: IO[str] | None, words: str) -> str:
    assert stream is not None
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"{words!r} was never said")


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def refusal(folder: Path, tree: dict[str, Any], *options: str) -> str:
    with serve(folder, tree, *options) as process:
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    return error


def test_addresses_are_written_once_all_are_ready_and_the_file_is_the_trainers(tmp_path: Path) -> None:
    file = tmp_path / "urls.txt"
    with serving(tmp_path, make_tree(tmp_path, 2, url_file=str(file))) as process:
        urls = read_addresses(file)
        assert len(urls) == 2 and all(answers(url) for url in urls)
        guards = psutil.Process(process.pid).children()
        os.kill(guards[0].pid, signal.SIGKILL)
        read_until(process.stdout, "is back")
        assert read_addresses(file) == urls and all(answers(url) for url in urls)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not any(answers(url) for url in urls)
    assert sorted(path.name for path in (tmp_path / "runs" / "r.servers").iterdir()) == [
        f"sglang_{socket.gethostname()}_{k}.log" for k in range(2)
    ]


def test_in_a_folder_every_host_has_a_file_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "urls"
    with serving(tmp_path, make_tree(tmp_path, 1), "--url-file", f"{folder}/") as process:
        (folder / "another.txt").write_text("http://another:1\n")
        urls = read_addresses(folder)
        assert urls[0] == "http://another:1" and len(urls) == 2 and answers(urls[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert read_addresses(folder) == ["http://another:1"]


def test_it_ends_once_no_server_is_left(tmp_path: Path) -> None:
    with serving(tmp_path, make_tree(tmp_path, 1, max_restarts=0), "--url-file", str(tmp_path / "urls")) as process:
        os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)
        assert process.wait(20) == 1
        assert process.stderr is not None and process.stderr.read() == "error: no server is left\n"


def test_what_is_wrong_is_told_before_anything_starts(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, 1)
    assert "--url-file: missing" in refusal(tmp_path, tree)
    file = ["--url-file", str(tmp_path / "urls")]
    assert "sglang.ep_size=3 does not divide" in refusal(tmp_path, tree | {"sglang": {"ep_size": 3}}, *file)
    open_to_all = make_tree(tmp_path, 1, host="0.0.0.0", url_file=file[1])
    assert "rollout.server.api_key_env: missing" in refusal(tmp_path, open_to_all)
    (tmp_path / "broken").touch()
    assert "broken on purpose" in refusal(tmp_path, tree, *file)
    assert not Path(file[1]).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_they_are_ready_is_heard(tmp_path: Path, number: signal.Signals) -> None:
    tree = make_tree(tmp_path, 1)
    Path(tree["rollout"]["server"]["python"]).write_text(f"#!{sys.executable} -S\nimport time\ntime.sleep(60)\n")
    with serve(tmp_path, tree, "--url-file", str(tmp_path / "urls")) as process:
        read_until(process.stdout, "starting")
        wait_for(lambda: bool(psutil.Process(process.pid).children()))
        process.send_signal(number)
        assert process.wait(20) == 0
