"""The Dockerfile: what it copies is there, its versions are the package's, and what can run without an engine runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.environment.checks import MEGATRON, SGLANG
from tools import pin_image, selftest

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
RUNS = [rest for word, rest in DOCKERFILE if word == "RUN"]


def pins(path: str) -> dict[str, str]:
    lines = (line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))  # type: ignore[misc]


def copied() -> list[str]:
    return [source for word, rest in DOCKERFILE if word == "COPY" for source in rest.split()[:-1]]


def test_what_is_copied_is_there_and_sent_to_the_engine() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert len(copied()) > 5
    for source in copied():
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept, source
    for name in kept:
        assert (ROOT / name).exists(), name


def test_the_image_gets_what_the_package_needs() -> None:
    """The package itself is installed there without what it depends on."""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    arguments = {
        word.arg: word.value for node in ast.walk(setup) if isinstance(node, ast.Call) for word in node.keywords
    }
    needed = {re.split(r"[\[=>]", text)[0] for text in ast.literal_eval(arguments["install_requires"])}  # type: ignore[arg-type]
    listed = (ROOT / "docker/requirements-trainer.txt").read_text(encoding="utf-8").splitlines()
    assert needed - {re.split(r"[=>]", line)[0] for line in listed} == {
        "torch",
        "megatron-core",
    }  # the Dockerfile's own


def test_versions_are_those_of_the_package() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in DOCKERFILE if word == "ARG")
    constraints = pins("constraints.txt")
    assert arguments["MEGATRON_CORE"] == MEGATRON and arguments["SGLANG"] == SGLANG
    assert arguments["UV"] == constraints["uv"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", arguments["BASE"])
    assert DOCKERFILE[1] == ("FROM", "${BASE}")
    for name, version in pins("docker/requirements-trainer.txt").items():
        assert constraints[name] == version, name
    server = pins("docker/constraints-sglang.txt")
    assert server["sglang"] == SGLANG
    # Both sides must read the same model folder in the same way.
    for name in ("torch", "transformers"):
        assert server[name] == constraints[name]


def test_the_trainer_gets_what_the_package_needs_and_no_other_torch() -> None:
    needed = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert needed is not None
    names = {re.split(r"[=<>]", name)[0] for name in re.findall(r'"([^"]+)"', needed[1])}
    lines = (ROOT / "docker" / "requirements-trainer.txt").read_text().splitlines()
    listed = {re.split(r"[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    assert names - {"torch", "megatron-core"} <= listed
    assert not {"torch", "torchvision", "triton", "transformer-engine", "megatron-core"} & listed
    assert any(f"--no-deps {package}" in run for run in RUNS for package in ['"megatron-core=='])


def test_no_package_index_is_named() -> None:
    for path in ("Dockerfile", *copied()):
        if (ROOT / path).is_file():
            assert not re.search(r"index-url|https?://\S*(pypi|simple)", (ROOT / path).read_text()), path


def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("run", RUNS)
def test_commands_are_shell(run: str) -> None:
    subprocess.run(["bash", "-n", "-c", run], check=True)


def test_the_self_test_is_called_as_it_understands() -> None:
    [command] = [run for run in RUNS if "selftest.py" in run]
    options = selftest.make_parser().parse_args(command.split("selftest.py")[1].split())
    assert options.server_python == "/opt/sglang/bin/python" and options.transformer_engine
    assert any(f"> {options.image_constraints}" in run for run in RUNS)
    assert any(f"venv {Path(options.server_python).parents[1]}" in run for run in RUNS)


def test_what_is_built_for_cuda_keeps_its_version() -> None:
    listed = [
        "# ours",
        "packaging==23.2",
        "PyYAML==6.0.1 # a reason",
        "torch==2.0",
        "",
        "scipy>=1.10; python_version>'3'",
    ]
    installed = [
        ("torch", "2.13.0a0+9186a08b2c.nv26.07"),
        ("transformer_engine", "2.17.0+1234"),
        ("flash_attn", "2.7.4"),
        ("nvidia-dali-cuda130", "2.0"),
        ("transformers", "4.57.0"),
        ("scipy", "1.16"),
    ]
    assert pin_image.constraints(listed, installed) == [
        "flash-attn===2.7.4",
        "nvidia-dali-cuda130===2.0",
        "PyYAML==6.0.1",
        "scipy>=1.10; python_version>'3'",
        "torch===2.13.0a0+9186a08b2c.nv26.07",
        "transformer-engine===2.17.0+1234",
    ]


def test_the_pins_of_this_environment_are_kept(tmp_path: Path) -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "tools" / "pin_image.py"], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "c.txt").write_text(printed, encoding="utf-8")
    assert "torch===" in printed and "packages as they were" in selftest.kept(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("torch===1.0\napex===2\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"torch 2.*, was 1.0; apex None, was 2"):
        selftest.kept(tmp_path / "c.txt")


def test_what_is_missing_fails_the_self_test() -> None:
    with pytest.raises(ModuleNotFoundError):
        selftest.optional("no_such_package.part", needed=True)
    assert selftest.optional("no_such_package.part", needed=False) == "not there"
    with pytest.raises(RuntimeError, match="/bin/false"):
        selftest.server("/bin/false")
    with pytest.raises(RuntimeError, match=r"rollout\.server\.python: /bin/false does not run"):
        selftest.configuration(ROOT / "examples" / "digits_cpu" / "rl.yaml", "/bin/false")
