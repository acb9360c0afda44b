"""What became of the prompts of a run, from what it left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo import codec
from megatron_vespo.checkpoint_folder import RUN_FILES, iteration_name, list_checkpoints
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.batches import list_batches, load_batch


@dataclass(frozen=True)
class Fault:
    """One thing done to the run.

    Attributes:
        what: In words.
        step: Last finished step when it was done.
        answer: How the run answered, in words.
        seconds: From then to the next finished step; None where it was none of the run's business.
    """

    what: str
    step: int
    answer: str
    seconds: float | None


@dataclass(frozen=True)
class Account:
    """Prompts and samples of the whole run, attempts that were given up left out.

    Attributes:
        submitted: Prompts drawn.
        trained: Prompts trained on.
        waiting: Prompts in flight or in the buffer as the run ended.
        lost: Prompts drawn and neither trained on nor waiting.
        duplicated: Prompts trained on more than once.
        unscored: Samples trained without an advantage since their reward failed.
        steps: Steps finished.
        staleness: Largest staleness, in updates.
        accuracy: Held-out accuracy before and after.
        losses: Servers lost.
    """

    submitted: int
    trained: int
    waiting: int
    lost: int
    duplicated: int
    unscored: int
    steps: int
    staleness: int
    accuracy: tuple[float, float]
    losses: int


def account_of(run: Path) -> Account:
    """Count in the saved batches, the last checkpoint and the metrics of a run that saved after its last step."""
    batches = [load_batch(path) for path in list_batches(run / "rollouts")]
    trained = Counter(group.prompt.index for batch in batches for group in batch.groups)
    last = list_checkpoints(run / "checkpoints")[-1]
    data = (run / "checkpoints" / iteration_name(last) / RUN_FILES / "data.msgpack").read_bytes()
    state = codec.unpack(data, dict)
    submitted, waiting = state["prompts"]["position"], {row[3][0][0] for row in state["held"]}
    records = read_metrics(run / "metrics.jsonl")
    accuracy = records.series("eval/heldout/accuracy")[1]
    samples = [sample for batch in batches for group in batch.groups for sample in group.samples]
    return Account(
        submitted=submitted,
        trained=len(trained),
        waiting=len(waiting),
        lost=len(set(range(submitted)) - set(trained) - waiting),
        duplicated=sum(count > 1 for count in trained.values()) + len(waiting & set(trained)),
        unscored=sum(bool(sample.reward_error) for sample in samples),
        steps=records.steps[-1],
        staleness=int(max(records.series("rollout/staleness_max")[1])),
        accuracy=(accuracy[0], accuracy[-1]),
        losses=int(sum(records.series("perf/server_losses")[1])),
    )


def failures_of(account: Account, steps: int, staleness_bound: int, goal: float, unscored: int) -> list[str]:
    """What is not as it should be; ``unscored`` is the number of samples whose reward was made to fail."""
    checks = {
        f"{account.lost} prompts were lost": account.lost == 0,
        f"{account.duplicated} prompts were trained on twice": account.duplicated == 0,
        f"{account.unscored} samples could not be scored, not {unscored}": account.unscored == unscored,
        f"{account.steps} of {steps} steps": account.steps == steps,
        f"staleness {account.staleness} is beyond {staleness_bound}": account.staleness <= staleness_bound,
        f"held-out accuracy {account.accuracy[1]:.3f} is below {goal}": account.accuracy[1] >= goal,
    }
    return [text for text, fine in checks.items() if not fine]


def write_up(faults: Sequence[Fault], account: Account | None, seconds: float, failures: Sequence[str]) -> str:
    """The report, in Markdown; no account where the run did not come to its end."""
    lines = ["# Chaos", "", "| what was done | after step | answer | next step after |", "| --- | --- | --- | --- |"]
    for fault in faults:
        after = "" if fault.seconds is None else f"{fault.seconds:.0f} s"
        lines.append(f"| {fault.what} | {fault.step} | {fault.answer} | {after} |")
    figures = {**(_figures(account) if account else {}), "wall time": f"{seconds:.0f} s"}
    lines += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in figures.items())]
    lines += ["", *(f"FAILED: {failure}" for failure in failures)] if failures else ["", "Nothing was lost."]
    return "\n".join(lines) + "\n"


def _figures(account: Account) -> dict[str, int | str]:
    before, after = account.accuracy
    return {
        "prompts submitted": account.submitted,
        "prompts trained": account.trained,
        "prompts waiting at the end": account.waiting,
        "prompts lost": account.lost,
        "prompts duplicated": account.duplicated,
        "samples that could not be scored": account.unscored,
        "servers lost": account.losses,
        "steps": account.steps,
        "largest staleness": account.staleness,
        "held-out accuracy": f"{before:.3f} before, {after:.3f} after",
    }
