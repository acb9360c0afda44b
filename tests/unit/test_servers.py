"""Doing the same on several servers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_vespo.config import Config, ServerSection
from megatron_vespo.config_file import parse_config
from megatron_vespo.connect import _check_info
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.fleet import Member, State
from megatron_vespo.rollout.protocol import UNPUSHED, ServerInfo
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.weight_sync.servers import Servers


def make_servers(states: Sequence[State] = (State.SERVING,) * 3) -> Servers:
    """Servers where nothing listens."""
    members = [
        Member(url, SGLangControl(url), SGLangClient(url, vocab_size=1), state)
        for url, state in zip((f"http://127.0.0.1:{port}" for port in (1, 2, 3)), states, strict=True)
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


def test_who_is_lost_is_told_of_the_end_of_an_update_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = make_servers([State.SERVING, State.GONE, State.WAITING])
    release, told, done = threading.Event(), list[str](), list[str]()
    lost_is_told = threading.Event()

    def end_weight_update(control: SGLangControl) -> None:
        told.append(control.base_url[-1])
        if control.base_url.endswith("2"):  # it hangs
            lost_is_told.set()
            release.wait(20)
        elif control.base_url.endswith("3"):
            raise UserError("no update is open")
        done.append(control.base_url[-1])

    monkeypatch.setattr(SGLangControl, "end_weight_update", end_weight_update)
    servers.abandon_update()
    assert done == ["1"] and not release.is_set()
    assert lost_is_told.wait(20) and sorted(told) == ["1", "2", "3"]
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
