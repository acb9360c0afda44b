from __future__ import annotations

import json

import pytest

from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.layouts.layout import DEFAULT_LAYOUTS, Layout
from megatron_vespo.megatron_options import data_parallel_size

NAMES = {
    "1": (Layout(), 1),
    "tp2": (Layout(tp=2), 2),
    "TP2 x EP2": (Layout(tp=2, ep=2), 4),
    "tp2xep2": (Layout(tp=2, ep=2), 4),
    "tp2 ep2": (Layout(tp=2, ep=2), 4),
    "ep2-tp2": (Layout(tp=2, ep=2), 4),
    "pp2-vpp2": (Layout(pp=2, vpp=2), 2),
    "dp2-ep2": (Layout(dp=2, ep=2), 4),
    "pp2-ep2": (Layout(pp=2, ep=2), 4),
    "tp2-etp2": (Layout(tp=2, etp=2), 2),
    "etp2": (Layout(etp=2), 2),
    "tp2-pp2-etp4": (Layout(tp=2, pp=2, etp=4), 8),
    "tp2-ep2-etp2": (Layout(tp=2, ep=2, etp=2), 4),
    "dp3-etp2": (Layout(dp=3, etp=2), 4),
    "dp2-MB512": (Layout(dp=2, max_tokens=512), 2),
    "1-mbmin": (Layout(max_tokens=0), 1),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read(name: str) -> None:
    layout, ranks = NAMES[name]
    assert Layout.parse(name) == layout
    assert layout.ranks == ranks
    assert Layout.parse(layout.name) == layout


def test_the_name_has_one_form() -> None:
    assert Layout.parse("EP2 x TP2-mb9").name == "tp2-ep2-mb9"
    assert [Layout.parse(name).name for name in DEFAULT_LAYOUTS] == list(DEFAULT_LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_hold_the_layout(name: str) -> None:
    layout, ranks = NAMES[name]
    assert data_parallel_size(layout.megatron(), ranks) == ranks // (layout.tp * layout.pp)


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "''"),
        ("cp2", "'cp2' is not a size"),
        ("tp", "'tp'"),
        ("tp0", "'tp0'"),
        ("tpmin", "'tpmin'"),
        ("mb0", "'mb0'"),
        ("tp2-tp2", "tp appears twice"),
        ("vpp2", "needs pp2"),
        ("tp2--ep2", "''"),
        ("2", "'2'"),
    ],
)
def test_what_is_not_a_name(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Layout.parse(name)
    assert message in str(error.value) and f"layout '{name}'" in str(error.value)


def test_overrides_replace_the_layout_of_the_configuration(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "config.yaml"
    tree = {
        "run": {"name": "x"},
        "model": {"hf_path": "x"},
        "megatron": {"expert_model_parallel_size": 8, "sequence_parallel": True, "lr": 1.0},
        "data": {"train": "x"},
        "training": {"steps": 1},
    }
    path.write_text(json.dumps(tree))
    config = load_config(path, Layout.parse("pp2-vpp2-mbmin").overrides(longest=77))
    assert config.megatron == Layout.parse("pp2-vpp2").megatron() | {"lr": 1.0}
    assert config.megatron["expert_model_parallel_size"] == 1 and config.megatron["sequence_parallel"] is False
    assert config.training.max_tokens_per_microbatch == 77
    tensor = load_config(path, Layout.parse("tp2").overrides(longest=77))
    assert tensor.megatron["sequence_parallel"] is True
    assert tensor.megatron["virtual_pipeline_model_parallel_size"] is None
    assert tensor.training.max_tokens_per_microbatch == 4096, "as the configuration says"
    assert load_config(path, Layout.parse("mb5").overrides(77)).training.max_tokens_per_microbatch == 5
