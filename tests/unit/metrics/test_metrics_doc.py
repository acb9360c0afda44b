from megatron_vespo.metrics.registry import METRICS
from tools.write_metrics_doc import SECTIONS, TARGET, render


def test_the_document_is_current() -> None:
    assert TARGET.read_text() == render(), "run: python tools/write_metrics_doc.py"


def test_every_metric_is_in_it_once() -> None:
    lines = render().splitlines()
    assert {name.split("/")[0] for name in METRICS} == set(SECTIONS)
    for name in METRICS:
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1, name
