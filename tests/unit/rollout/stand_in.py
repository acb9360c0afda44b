"""Servers whose process is a few lines that answer /ready, since SGLang needs a minute to start."""

import json
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = """#!{python} -S
import http.server, pathlib, sys
if pathlib.Path("{broken}").exists():
    sys.exit("broken on purpose")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def make_tree(folder: Path, count: int, **server: Any) -> dict[str, Any]:
    """A configuration with ``count`` such servers; none of them starts while there is a file ``folder/broken``."""
    (folder / "config.json").write_text("{}")
    python = folder / "python"
    python.write_text(SCRIPT.format(python=sys.executable, broken=folder / "broken"))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return {
        "run": {"name": "r", "folder": str(folder / "runs"), "seed": 5},
        "model": {"hf_path": str(folder)},
        "data": {"train": "d"},
        "training": {"steps": 1},
        "placement": {"servers_per_node": count},
        "sglang": {"tp_size": 2},
        "rollout": {"server": {"python": str(python), "startup_timeout": 20.0, **server}},
    }


def write_tree(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "c.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
