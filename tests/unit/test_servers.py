"""Doing the same on several servers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vespo.assemble import _check_loader
from megatron_vespo.config import ServerSection
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.weight_sync.servers import Servers


def make_servers() -> Servers:
    return Servers([SGLangControl(f"http://127.0.0.1:{port}") for port in (1, 2, 3)], [1, 2, 1])


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


@pytest.mark.parametrize(
    "section, needed", [({}, True), ({"transport": "delta", "verify": "none"}, True), ({"verify": "none"}, False)]
)
def test_a_server_without_our_loader_is_named(section: dict[str, Any], needed: bool) -> None:
    tree = {"run": {"name": "r"}, "model": {"hf_path": "m"}, "data": {"train": "d"}, "training": {"steps": 1}}
    config = parse_config(tree | {"weight_sync": section})
    controls = [SGLangControl("http://one:1"), SGLangControl("http://two:1")]
    infos = [SimpleNamespace(weight_loaders=(LOADER,)), SimpleNamespace(weight_loaders=())]
    connection: Any = SimpleNamespace(controls=controls, infos=infos)
    if not needed:
        _check_loader(config, connection)
        return
    with pytest.raises(UserError, match=f"http://two:1 was started without --custom-weight-loader {LOADER}"):
        _check_loader(config, connection)
