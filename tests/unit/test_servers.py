"""Doing the same on several servers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from megatron_vespo.config import Config, ServerSection
from megatron_vespo.config_file import parse_config
from megatron_vespo.connect import _check_info
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.fleet import Member
from megatron_vespo.rollout.protocol import UNPUSHED, ServerInfo
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.weight_sync.servers import Servers


def make_servers() -> Servers:
    """Servers where nothing listens."""
    members = [
        Member(url, SGLangControl(url), SGLangClient(url, vocab_size=1))
        for url in (f"http://127.0.0.1:{port}" for port in (1, 2, 3))
    ]
    servers = Servers()
    servers.choose(members)
    return servers


def test_all_servers_are_asked_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=10)

    def call(control: SGLangControl) -> str:
        together.wait()
        return control.base_url[-1]

    assert make_servers().each(call) == ["1", "2", "3"]


def test_a_failure_is_raised_while_others_still_wait() -> None:
    release = threading.Event()

    def call(control: SGLangControl) -> None:
        if control.base_url.endswith("2"):
            raise UserError("refused")
        release.wait(10)

    with pytest.raises(UserError, match="refused"):
        make_servers().each(call)
    assert not release.is_set()
    release.set()


def test_an_address_may_be_one_or_several() -> None:
    assert ServerSection().urls == []
    assert ServerSection(url="http://a:1").urls == ["http://a:1"]
    assert ServerSection(url=["http://a:1", "http://b:1"]).urls == ["http://a:1", "http://b:1"]
    for url, message in ([], "an empty list"), (["http://a:1", "http://a:1/"], "names a server twice"):
        with pytest.raises(ValueError, match=message):
            ServerSection(url=url)


def make_config(**sections: Any) -> Config:
    tree = {"run": {"name": "r"}, "model": {"hf_path": "m"}, "data": {"train": "d"}, "training": {"steps": 1}}
    return parse_config(tree | sections)


def make_info(loaders: tuple[str, ...] = (), version: str = UNPUSHED) -> ServerInfo:
    return ServerInfo(64, 58, 62, version, "m", "0.5.23", 1, loaders, False)


@pytest.mark.parametrize(
    "section, needed", [({}, True), ({"transport": "delta", "verify": "none"}, True), ({"verify": "none"}, False)]
)
def test_a_server_without_our_loader_is_named(section: dict[str, Any], needed: bool) -> None:
    check = _check_info(make_config(weight_sync=section), only_evaluates=False)
    check("http://one:1", make_info((LOADER,)))
    if not needed:
        check("http://two:1", make_info())
        return
    with pytest.raises(UserError, match=f"http://two:1 was started without --custom-weight-loader {LOADER}"):
        check("http://two:1", make_info())


def test_without_a_trainer_a_server_must_have_its_own_weights() -> None:
    check = _check_info(make_config(objective="rollout"), only_evaluates=False)
    check("http://one:1", make_info())
    with pytest.raises(UserError, match="http://one:1 serves weight version 7, which a trainer pushed"):
        check("http://one:1", make_info(version="7"))
