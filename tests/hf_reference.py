"""Log-probabilities by Hugging Face transformers, in a process that never imports Megatron.

Run as a script: ``hf_reference.py OUT FOLDER...`` reads ``sequences.json`` beside OUT.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def hf_log_probs(
    folders: Sequence[Path], sequences: Sequence[Sequence[int]], scratch: Path
) -> dict[str, list[np.ndarray]]:
    """log softmax over the whole vocabulary of every position, [length, vocabulary], by the folder's name.

    Each sequence is a batch of its own. Beside that each model's config.json, as transformers saves it, is left in
    ``scratch / "saved" / name``.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "sequences.json").write_text(json.dumps([list(map(int, sequence)) for sequence in sequences]))
    out = scratch / "log_probs.npz"
    subprocess.run([sys.executable, __file__, str(out), *map(str, folders)], check=True)
    with np.load(out) as arrays:
        return {
            folder.name: [arrays[f"{folder.name}/{number}"] for number in range(len(sequences))] for folder in folders
        }


def log_probs_in_this_process(
    folder: Path, sequences: Sequence[Sequence[int]], saved: Path | None = None
) -> list[np.ndarray]:
    """The same by transformers here, for one folder; its config is saved to the folder ``saved``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if saved is not None:
        model.config.save_pretrained(saved)
    with torch.no_grad():
        return [model(torch.tensor([list(s)])).logits[0].log_softmax(-1).numpy() for s in sequences]


def routed_experts_in_this_process(folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Experts that transformers chooses at every position, for each sequence [length, layers, experts a token]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    experts = model.config.num_experts_per_tok
    found = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([list(map(int, sequence))]), output_router_logits=True).router_logits
        found.append(torch.stack([layer.topk(experts, -1).indices for layer in logits], 1).numpy())
    return found


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    sequences = json.loads((out.parent / "sequences.json").read_text())
    arrays = {
        f"{folder.name}/{number}": values
        for folder in folders
        for number, values in enumerate(
            log_probs_in_this_process(folder, sequences, out.parent / "saved" / folder.name)
        )
    }
    assert not any(name.startswith("megatron") for name in sys.modules)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
