import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.data.sft import SupervisedStream, read_supervised
from megatron_vespo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_vespo.errors import UserError
from tests.tiny_models import EOS_ID, make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_masks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(
        tmp_path,
        {"prompt": "1 + 2", "response": "3"},
        {"prompt": [{"role": "user", "content": "4"}], "response": "5"},
        {"text": "6 7"},
    )
    pair, chat, text = read_supervised(file, tokenizer, max_tokens=16)
    assert pair.input_ids.tolist() == [*tokenizer.encode("1 + 2 3"), EOS_ID]
    assert pair.loss_mask.tolist() == [False] * 3 + [True] * 2
    assert chat.loss_mask.tolist() == [False] * 5 + [True] * 2
    assert text.input_ids.tolist() == [*tokenizer.encode("6 7"), EOS_ID]
    assert text.loss_mask.tolist() == [False, True, True]


def test_the_stream_resumes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    examples = read_supervised(write(tmp_path, *({"text": str(i)} for i in range(5))), tokenizer, 4)
    stream = SupervisedStream(examples, seed=3)
    for _ in range(3):
        next(stream)
    resumed = SupervisedStream(examples, seed=3)
    resumed.load_state_dict(stream.state_dict())
    assert [next(resumed) for _ in range(7)] == [next(stream) for _ in range(7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "1"}, r"examples.jsonl:1: needs 'prompt' and 'response' .*it has prompt"),
        ({"prompt": 1, "response": "2"}, r"examples.jsonl:1: 'prompt' must be text, a list of messages"),
        ({"text": "1 2 3 4"}, r"examples.jsonl:1: the example has 5 tokens, the limit is 4"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_supervised(write(tmp_path, line), tokenizer, max_tokens=4)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no eos_token"):
        read_supervised(write(tmp_path, {"text": "1"}), load_tokenizer(tmp_path), 4)
