import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.order import EndlessOrder
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_vespo.errors import UserError
from tests.tiny_models import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_all_spellings_of_a_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(
        tmp_path,
        {"prompt": "1 + 2", "label": 3, "level": "easy", "metadata": {"from": "book"}},
        {"prompt": [{"role": "user", "content": "1 + 2"}], "reward_model": {"ground_truth": "3", "style": "rule"}},
        "",
        {"prompt": [4, 5]},
    )
    text, chat, ids = PromptDataset.from_jsonl(file, tokenizer, max_prompt_tokens=16).prompts()
    assert text.input_ids.tolist() == tokenizer.encode("1 + 2") and text.label == "3"
    assert text.metadata == {"level": "easy", "from": "book"}
    assert tokenizer.decode(chat.input_ids.tolist()) == "user : 1 + 2 assistant :" and chat.label == "3"
    assert chat.metadata["reward_model"]["style"] == "rule"
    assert ids.input_ids.tolist() == [4, 5] and ids.label == "" and ids.index == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts.jsonl:2: not valid JSON"),
        ("[1]", r"prompts.jsonl:2: a line must be a JSON object"),
        ({"question": "1"}, r"prompts.jsonl:2: no 'prompt'; the line has question"),
        ({"prompt": ""}, r"prompts.jsonl:2: the prompt is empty"),
        ({"prompt": 3}, r"prompts.jsonl:2: 'prompt' must be text, a list of messages or a list of token ids"),
        ({"prompt": [1, 64]}, r"prompts.jsonl:2: .*outside the vocabulary of 64"),
        ({"prompt": "1", "metadata": 3}, r"prompts.jsonl:2: 'metadata' must be an object"),
        (
            {"prompt": "1 2 3 4 5"},
            r"prompts.jsonl:2: the prompt has 5 tokens, the limit is 4; 1 of 2 prompts are longer: raise the limit",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptDataset.from_jsonl(write(tmp_path, {"prompt": "1"}, line), tokenizer, max_prompt_tokens=4)


def test_a_bad_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such data file"):
        PromptDataset.from_jsonl(tmp_path / "none.jsonl", tokenizer, 4)
    with pytest.raises(UserError, match="is empty"):
        PromptDataset.from_jsonl(write(tmp_path), tokenizer, 4)
    (tmp_path / "data.parquet").touch()
    with pytest.raises(UserError, match="not a readable parquet file"):
        PromptDataset.from_jsonl(tmp_path / "data.parquet", tokenizer, 4)
    (tmp_path / "data.csv").touch()
    with pytest.raises(UserError, match=r"must be a \.jsonl file"):
        PromptDataset.from_jsonl(tmp_path / "data.csv", tokenizer, 4)


@given(size=st.integers(1, 9), seed=st.integers(0, 5), cut=st.integers(0, 30), shuffle=st.booleans())
def test_a_resumed_order_goes_on_as_if_uninterrupted(size: int, seed: int, cut: int, shuffle: bool) -> None:
    whole = EndlessOrder(size, seed, shuffle)
    drawn = [whole.draw() for _ in range(40)]
    assert [position for position, _ in drawn] == list(range(40))
    for epoch in range(40 // size):
        indices = [index for _, index in drawn[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))
        assert shuffle or indices == list(range(size))
    resumed = EndlessOrder(size, seed, shuffle)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(cut))))
    assert [resumed.draw() for _ in range(40 - cut)] == drawn[cut:]


def test_epochs_have_their_own_order() -> None:
    order = EndlessOrder(20, seed=0)
    first, second = ([order.draw()[1] for _ in range(20)] for _ in range(2))
    assert first != second and first != list(range(20))


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"size 5 -> 6, seed 1 -> 2"):
        EndlessOrder(6, seed=2).load_state_dict(EndlessOrder(5, seed=1).state_dict())


def test_the_stream_counts_its_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = PromptDataset.from_jsonl(write(tmp_path, {"prompt": "1"}, {"prompt": "2"}), tokenizer, 4)
    stream = PromptStream(dataset, seed=0)
    prompts = [next(stream) for _ in range(5)]
    assert [prompt.index for prompt in prompts] == list(range(5)) and stream.position == 5
    prompts[0].metadata["changed"] = True
    assert all("changed" not in record.metadata for record in dataset.records)
