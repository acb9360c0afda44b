import msgspec
import pytest

from megatron_vespo import saving
from megatron_vespo.config import CheckpointSection
from megatron_vespo.errors import UserError
from megatron_vespo.policy.checkpoints import Loaded
from megatron_vespo.saving import Saver, restore
from megatron_vespo.types import Progress


class Recording:
    """Notes what is asked of checkpoints."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[int, dict[str, bytes]] = {}

    def save(self, step: int, files: dict[str, bytes]) -> None:
        self.calls.append(f"save {step}")
        self.files[step] = files

    def poll(self) -> None:
        self.calls.append("poll")

    def finish(self) -> None:
        self.calls.append("finish")

    def load(self, step: int | None) -> Loaded:
        assert step is not None
        return Loaded(step, self.files[step], True)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.parallel, "is_main", lambda: True)
    monkeypatch.setattr(saving.parallel, "any_rank", lambda flag: flag)


def run(steps: int, until: int, **settings: int) -> tuple[Recording, list[int], list[str]]:
    """Saves of a run of so many steps that is stopped after ``until``; Hugging Face folders; what it said."""
    checkpoints, folders, said = Recording(), list[int](), list[str]()
    saver = Saver(
        checkpoints,  # type: ignore[arg-type]
        CheckpointSection(**settings),
        steps,
        folders.append,
        lambda: b"data",
        lambda: False,
        said.append,
    )
    progress = Progress()
    while progress.step < until:
        progress.step += 1
        saver.after_step(progress)
    saver.leave(progress)
    return checkpoints, folders, said


def saves(checkpoints: Recording) -> list[str]:
    return [call for call in checkpoints.calls if call != "poll"]


def test_checkpoints_come_at_the_interval_and_at_the_end() -> None:
    checkpoints, folders, said = run(5, 5, interval=2)
    assert saves(checkpoints) == ["save 2", "save 4", "save 5", "finish"]
    assert folders == [5] and said == []
    assert checkpoints.calls.count("poll") == 5


def test_without_an_interval_only_a_run_that_is_stopped_saves() -> None:
    assert saves(run(5, 5)[0]) == ["finish"]
    checkpoints, folders, said = run(5, 3, hf_interval=2)
    assert saves(checkpoints) == ["save 3", "finish"] and folders == [2]
    assert said == ["stopped after step 3 of 5; go on with --resume auto"]


def test_what_is_saved_already_is_not_saved_again() -> None:
    assert saves(run(5, 4, interval=2)[0]) == ["save 2", "save 4", "finish"]


def test_a_run_stopped_before_its_first_step_has_nothing_to_save() -> None:
    assert saves(run(5, 0)[0]) == ["finish"]


def test_progress_and_data_come_back() -> None:
    checkpoints, _, _ = run(5, 3)
    checkpoints.files[3]["progress.json"] = msgspec.json.encode(Progress(3, 12, 1))
    assert restore(checkpoints, 3, print) == (Progress(3, 12, 1), b"data")  # type: ignore[arg-type]


def test_a_checkpoint_that_no_run_saved_is_named() -> None:
    checkpoints = Recording()
    checkpoints.files[7] = {}
    with pytest.raises(UserError, match="step 7 was not saved by a run"):
        restore(checkpoints, 7, print)  # type: ignore[arg-type]
