from pathlib import Path
from typing import Any

import pytest
from scripted import Status, serve

from megatron_vespo.config import ServerSection
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.addresses import ask_router, read_addresses, server_addresses


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text("http://a:1  # the first\n\n# none\nhttp://b:2\nhttp://a:1\n")
    addresses = server_addresses(ServerSection(url_file=str(path)), (), None)
    assert addresses() == ["http://a:1", "http://b:2"]
    path.write_text("http://b:2\n")
    assert addresses() == ["http://b:2"]


@pytest.mark.parametrize(("content", "message"), [("b:2\n", "'b:2' is no address"), (None, "cannot be read")])
def test_a_bad_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "servers.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"rollout.server.url_file: {path}.*{message}"):
        read_addresses(path)


def test_a_router_names_its_workers() -> None:
    workers: list[Any] = [{"url": "http://a:1", "is_healthy": True}, {"url": "http://b:2"}]
    with serve(lambda body: {}, known=lambda path: {"workers": workers}) as url:
        assert server_addresses(ServerSection(router=url), (), None)() == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize("answer", [{"data": []}, Status(404, ""), Status(200, "no json"), Status(200, "[1]")])
def test_what_is_no_router_is_named(answer: Any) -> None:
    with serve(lambda body: {}, known=lambda path: answer) as url, pytest.raises(UserError) as caught:
        ask_router(url)
    assert str(caught.value).startswith("rollout.server.router: ")
    assert str(caught.value).endswith("give the address of an sglang-router")


def test_servers_are_named_in_one_way() -> None:
    with pytest.raises(ValueError, match="url and router: say in one way"):
        ServerSection(url="http://a:1", router="http://b:2")
