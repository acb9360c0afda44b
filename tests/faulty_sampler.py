"""A sampler with a fault: Hugging Face transformers, in a process that never imports Megatron.

Run as a script: ``faulty_sampler.py OUT`` reads the jobs from ``jobs.json`` beside OUT.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.types import Prompt, Sample


@dataclass(frozen=True)
class Job:
    """Responses of one sampler.

    Attributes:
        folders: The weights, and those that take their place in the middle of each response, if there are two.
        versions: What they are called.
        temperature: Of the sampler.
        top_p: Of the sampler.
        renormalized: Whether its log-probabilities are those after top-p.
        half: Whether they are rounded to bfloat16.
        flush: Whether keys and values are computed anew when the weights change.
        number: Responses.
        length: Tokens of each.
    """

    folders: tuple[str, ...]
    versions: tuple[int, ...] = (0,)
    temperature: float = 1.0
    top_p: float = 1.0
    renormalized: bool = False
    half: bool = False
    flush: bool = False
    number: int = 64
    length: int = 96


def sample_from(jobs: Sequence[Job], scratch: Path) -> list[list[Sample]]:
    """The samples of each job."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    out = scratch / "samples.npz"
    subprocess.run([sys.executable, "-m", "tests.faulty_sampler", str(out)], check=True, cwd=Path(__file__).parents[1])
    with np.load(out) as arrays:
        return [_as_samples({name: arrays[f"{name}/{i}"] for name in _ARRAYS}) for i in range(len(jobs))]


_ARRAYS = ("prompts", "ids", "log_mu", "versions")


def _as_samples(arrays: dict[str, np.ndarray]) -> list[Sample]:
    rng = np.random.default_rng(7)
    return [
        Sample(Prompt(index, prompt), 0, ids, log_mu, versions, "length", advantage=float(rng.choice([-1, 1])))
        for index, (prompt, ids, log_mu, versions) in enumerate(zip(*arrays.values(), strict=True))
    ]


def changed_weights(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a checkpoint whose tensors are ``change(name, tensor, all tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    changed = {name: change(name, tensor, tensors).contiguous() for name, tensor in tensors.items()}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    return out


def permute_experts(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each expert gets the weights of the next one; the router knows nothing of it."""
    head, found, tail = name.partition(".experts.")
    if not found:
        return tensor
    number, _, rest = tail.partition(".")
    following = f"{head}.experts.{int(number) + 1}.{rest}"
    return tensors.get(following, tensors[f"{head}.experts.0.{rest}"])


def through_fp8(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Linear weights as FP8 holds them, one scale a tensor."""
    if tensor.dim() != 2 or "embed" in name or "lm_head" in name:
        return tensor
    scale = tensor.abs().max() / 448
    return (tensor / scale).to(torch.float8_e4m3fn).float() * scale


def drift(amount: float) -> Any:
    """All weights moved in one random direction; by how much of their size."""

    def change(name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return tensor + amount * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)

    return change


@torch.no_grad()
def _generate(job: Job) -> dict[str, np.ndarray]:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in job.folders]
    rng = torch.Generator().manual_seed(11)
    sequence = torch.randint(3, models[0].config.vocab_size, (job.number, 4), generator=rng)
    prompts, log_mu, versions = sequence, [], []
    model, version, cache, fed = models[0], job.versions[0], None, 0
    for step in range(job.length):
        if len(models) == 2 and step == job.length // 2:
            model, version = models[1], job.versions[1]
            if job.flush:
                cache, fed = None, 0
        output = model(sequence[:, fed:], past_key_values=cache, use_cache=True)
        cache, fed = output.past_key_values, sequence.shape[1]
        log_probs = (output.logits[:, -1].float() / job.temperature).log_softmax(-1)
        drawn_from = _cut(log_probs, job.top_p)
        token = torch.multinomial(drawn_from.exp(), 1, generator=rng)
        log_mu.append((drawn_from if job.renormalized else log_probs).gather(1, token)[:, 0])
        versions.append(np.full(job.number, version, np.int32))
        sequence = torch.cat([sequence, token], 1)
    reported = torch.stack(log_mu, 1)
    reported = reported.bfloat16().float() if job.half else reported
    return {
        "prompts": prompts.numpy().astype(np.int32),
        "ids": sequence[:, 4:].numpy().astype(np.int32),
        "log_mu": reported.numpy(),
        "versions": np.stack(versions, 1),
    }


def _cut(log_probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The likeliest tokens that have together at least this probability, renormalised."""
    if top_p == 1:
        return log_probs
    ordered, places = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, places, before < top_p)
    return log_probs.masked_fill(~kept, -torch.inf).log_softmax(-1)


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    jobs = [Job(**job) for job in json.loads((out.parent / "jobs.json").read_text())]
    arrays = {f"{name}/{i}": array for i, job in enumerate(jobs) for name, array in _generate(job).items()}
    assert not any(name.startswith("megatron.") for name in sys.modules)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
