"""One HTML file that needs nothing else: style, plotting library, script and data are in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

# As its authors publish it: static/uPlot.ORIGIN. 51 KB, where plotly's bundle is 4.8 MB.
_LIBRARY, _LIBRARY_STYLE, _LIBRARY_LICENCE = "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"
# One after the other in one script.
_SCRIPTS = ("base.js", "charts.js", "samples.js", "page.js")


def make_html(content: Mapping[str, Any], refresh_seconds: float | None = None) -> str:
    """The page.

    Args:
        content: From ``content_of``.
        refresh_seconds: The page asks for ``content.json`` again after so long; None: never.
    """
    data = {**content, "refresh": refresh_seconds}
    return Template(_static("page.html")).substitute(
        style=_static(_LIBRARY_STYLE) + _static("page.css"),
        library=_static(_LIBRARY),
        licence=_static(_LIBRARY_LICENCE),
        script="".join(map(_static, _SCRIPTS)),
        data=script_data(data),
    )


def script_data(value: Any) -> str:
    """JSON that may stand in a script element, whatever strings are in it: ``</script>`` and ``<!--`` cannot appear."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half a surrogate pair, which JSON can spell, cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _static(name: str) -> str:
    return files("megatron_vespo.page").joinpath("static", name).read_text(encoding="utf-8")
