"""From the configuration to prompts: formats, spellings, templates, sources, curricula, over-long prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megatron_vespo.config import DataSection, RewardSection
from megatron_vespo.config_file import dump_config, load_config, parse_config
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.rows import is_hub_name, read_rows
from megatron_vespo.data.sources import make_stages, read_evaluation, read_texts, read_training
from megatron_vespo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.terms import load_terms, terms_of
from megatron_vespo.types import Sample
from tests.tiny_models import make_tiny_tokenizer

VERL = {
    "data_source": "math",
    "prompt": [{"role": "user", "content": "1 + 2"}],
    "ability": "MATH",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7, "level": 2},
}
SLIME = {"prompt": [{"role": "user", "content": "1 + 2"}], "label": "3", "metadata": {"level": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def section(**data: Any) -> DataSection:
    tree = {"run": {"name": "x"}, "model": {"hf_path": "m"}, "training": {"steps": 1}, "data": data}
    return parse_config(tree).data


def write(path: Path, *rows: dict[str, Any]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(dataset: PromptDataset, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(record.input_ids.tolist()) for record in dataset.records]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_formats_hold_verls_and_slimes_rows(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    for row, source in ((VERL, {"data_source": "math"}), (SLIME, {"level": 2})):
        (record,) = read_training(section(train=write(tmp_path / name, row)), tokenizer, 16).records
        assert tokenizer.decode(record.input_ids.tolist()) == "user : 1 + 2 assistant :"
        assert record.label == "3"
        assert source.items() <= record.metadata.items()
    (record,) = read_training(section(train=write(tmp_path / name, VERL)), tokenizer, 16).records
    assert record.metadata["extra_info"] == {"index": 7, "level": 2}


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(read_rows(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:2", {"a": 2})]


def test_parquet_rows_are_numbered_and_messages_lose_keys_they_do_not_have(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    long = [{"role": "user", "content": "1", "name": "w40"}, {"role": "assistant", "content": "2"}]
    rows = [{"prompt": long} for _ in range(1500)] + [{"prompt": None}]
    file = write(tmp_path / "a.parquet", *rows)
    with pytest.raises(UserError, match=r"a\.parquet:1501: 'prompt' must be"):
        read_training(section(train=file), tokenizer, 16)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_is_read_as_the_data_set_that_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    home = tmp_path / "set"
    (home / "main").mkdir(parents=True)
    for split in ("train", "test"):
        write(home / "main" / f"{split}-00000-of-00001.parquet", {"question": "1 +", "answer": split})
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    (home / "README.md").write_text(card + "  - split: test\n    path: main/test-*\n---\n")
    keys = {"prompt": "question", "label": "answer"}
    data = section(
        train={"path": str(home), "subset": "main", "keys": keys},
        evaluation={"held": {"path": str(home), "keys": keys}, "seen": {"path": str(home), "split": "train"}},
        keys={"prompt": "question"},
    )
    (record,) = read_training(data, tokenizer, 16).records
    assert record.label == "train" and record.metadata == {"data_source": "train"}
    sets = read_evaluation(data, tokenizer, lambda name: 16)
    assert sets["held"].records[0].label == "test", "evaluation reads the split test, if there are several"
    assert sets["seen"].records[0].metadata == {"answer": "train", "data_source": "seen"}
    with pytest.raises(UserError, match=r"(?s)set: .*dev"):
        list(read_rows(home, split="dev"))


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    file = write(tmp_path / "a.jsonl", {"prompt": "1"})
    one = datasets.load_dataset("json", data_files=file, split="train")
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(tmp_path / "two")
    assert [row for _, row in read_rows(tmp_path / "one")] == [{"prompt": "1"}]
    assert [row for _, row in read_rows(tmp_path / "two", split="b")] == [{"prompt": "1"}]
    with pytest.raises(UserError, match=r"two: no split 'train', it has a, b"):
        list(read_rows(tmp_path / "two"))


def test_names_on_the_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("openai/gsm8k") and is_hub_name("HuggingFaceH4/MATH-500")
    assert not is_hub_name("data/a.jsonl") and not is_hub_name("train") and not is_hub_name("/a/b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_name("a/b")


def test_keys_move_columns_and_look_into_objects(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"q": "1 + 2", "meta": {"answer": 3}, "Level": "Level 4", "other": 1}
    keys = {"prompt": "q", "label": "meta.answer", "difficulty": "Level"}
    (record,) = read_training(section(train=write(tmp_path / "a.jsonl", row), keys=keys), tokenizer, 16).records
    assert record.label == "3"
    mine = {"meta": {"answer": 3}, "difficulty": "Level 4", "other": 1}
    assert record.metadata == {**mine, "data_source": "train"}
    with pytest.raises(UserError, match=r"a.jsonl:1: no 'nothing', which data.keys takes as 'label'"):
        read_training(section(train=str(tmp_path / "a.jsonl"), keys={**keys, "label": "nothing"}), tokenizer, 16)


def test_a_structured_label_is_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cases = {"inputs": ["1"], "outputs": ["2"]}
    file = write(tmp_path / "a.jsonl", {"prompt": "1", "reward_model": {"ground_truth": cases}})
    (record,) = read_training(section(train=file), tokenizer, 16).records
    assert json.loads(record.label) == cases


def test_chats_get_system_prompt_and_template_variables(tmp_path: Path, folder: Path) -> None:
    template = (folder / "tokenizer_config.json").read_text()
    home = tmp_path / "model"
    home.mkdir()
    settings = json.loads(template)
    settings["chat_template"] += "{% if enable_thinking is defined and not enable_thinking %}w63 {% endif %}"
    (home / "tokenizer_config.json").write_text(json.dumps(settings))
    (home / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(home)
    own = [{"role": "system", "content": "9"}, {"role": "user", "content": "2"}]
    file = write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": own})
    data = section(train=file, chat=True, system_prompt="sum", template_kwargs={"enable_thinking": False})
    assert texts(read_training(data, tokenizer, 32), tokenizer) == [
        "system : sum user : 1 assistant : w63",
        "system : 9 user : 2 assistant : w63",
    ]
    data = section(train={"path": file, "chat": False, "system_prompt": "of"}, chat=True, system_prompt="sum")
    assert texts(read_training(data, tokenizer, 32), tokenizer)[0] == "1"


def test_long_prompts_are_refused_with_their_number_or_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "a.jsonl", *({"prompt": "1 " * n} for n in (1, 5, 2, 6)))
    with pytest.raises(UserError, match=r"a.jsonl:2: the prompt has 5 tokens, the limit is 4; 2 of 4 prompts are"):
        read_training(section(train=file), tokenizer, 4)
    told: list[str] = []
    data = section(train={"own": file}, evaluation={"held": file}, long_prompts="drop")
    assert len(read_training(data, tokenizer, 4, announce=told.append)) == 2
    assert told == ["own: left out 2 of 4 prompts, longer than 4 tokens"]
    assert len(read_evaluation(data, tokenizer, lambda name: 5, told.append)["held"]) == 3
    assert told[1] == "held: left out 1 of 4 prompts, longer than 5 tokens"
    with pytest.raises(UserError, match="4 of 4 prompts are longer"):
        read_training(data, tokenizer, 0)


def test_sources_are_mixed_by_weight_and_without_weights_by_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    few = write(tmp_path / "few.jsonl", {"prompt": "1", "metadata": {"data_source": "own"}}, {"prompt": "2"})
    many = write(tmp_path / "many.jsonl", *({"prompt": f"{n}"} for n in range(3, 9)))

    def drawn(data: DataSection, count: int) -> list[str]:
        dataset = read_training(data, tokenizer, 4)
        stream = PromptStream(dataset, 0, stages=make_stages(dataset, data.curriculum))
        return [next(stream).data_source for _ in range(count)]

    by_size = drawn(section(train={"few": few, "many": many}), 8)
    assert sorted(by_size) == ["few"] + ["many"] * 6 + ["own"], "one epoch of each"
    weights = {"few": {"path": few, "weight": 3}, "many": {"path": many, "weight": 1}}
    by_weight = drawn(section(train=weights), 16)
    assert by_weight.count("many") == 4 and by_weight.count("own") == by_weight.count("few") == 6


def test_rewards_are_chosen_by_where_a_prompt_is_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    mixed = write(tmp_path / "a.parquet", {"prompt": "1", "data_source": "talk"}, {"prompt": "2", "data_source": None})
    sums = {"reasoning_gym": {"task": "chain_sum", "size": 1}}
    data = section(
        train={"math": mixed, "sums": sums, "talk": write(tmp_path / "b.jsonl", {"prompt": "3", "label": "x"})},
        evaluation={"aime24": write(tmp_path / "c.jsonl", {"prompt": "4"})},
    )
    terms = [
        {"function": "exact_match", "sources": ["math", "aime*", "sums"]},
        {"function": "truncated", "sources": ["talk"]},
    ]
    reward = load_terms(terms_of(RewardSection.model_validate({"terms": terms}))).function

    def terms_by_source(dataset: PromptDataset) -> list[tuple[str, str]]:
        ids, nothing = np.array([1], np.int32), np.zeros(1, np.float32)
        samples = [Sample(prompt, 0, ids, nothing, ids, "stop") for prompt in dataset.prompts()]
        return [(sample.prompt.data_source, *reward(sample).terms) for sample in samples]

    math, talk = ("math", "exact_match"), ("talk", "truncated")
    assert terms_by_source(read_training(data, tokenizer, 64)) == [talk, math, ("sums", "exact_match"), talk]
    (held,) = read_evaluation(data, tokenizer, lambda name: 64).values()
    assert terms_by_source(held) == [("aime24", "exact_match")]
    with pytest.raises(RewardFailure, match=r"no term of reward.terms has data_source 'train'"):
        terms_by_source(read_training(section(train=str(tmp_path / "b.jsonl")), tokenizer, 64))


def test_a_curriculum_draws_what_its_stages_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    levels = [{"prompt": f"{n}", "extra_info": {"level": n}} for n in range(1, 7)]
    file = write(tmp_path / "a.jsonl", *levels, {"prompt": "9"})
    stages = [{"prompts": 6, "at_most": 2}, {"prompts": 5, "at_least": 3, "at_most": 4.5}, {}]
    data = section(train=file, curriculum={"field": "extra_info.level", "stages": stages})
    dataset = read_training(data, tokenizer, 4)
    stream = PromptStream(dataset, 1, stages=make_stages(dataset, data.curriculum))
    drawn = [tokenizer.decode(next(stream).input_ids.tolist()) for _ in range(25)]
    assert [set(drawn[:3]), set(drawn[3:6])] == [{"1", "2", "9"}] * 2
    assert set(drawn[6:9]) == {"3", "4", "9"} and set(drawn[11:18]) == set("1234569")
    other = PromptStream(dataset, 1)
    with pytest.raises(UserError, match="stages"):
        other.load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    "curriculum, message",
    [
        ({"field": "leval", "stages": [{}]}, "no training prompt has 'leval' in its metadata"),
        ({"field": "name", "stages": [{}]}, "'name' of a training prompt is 'x', which is no number"),
        ({"field": "level", "stages": [{"at_least": 3}]}, "no training prompt belongs to stage 1; level is 2 to 2"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, curriculum: dict[str, Any], message: str
) -> None:
    data = section(train=write(tmp_path / "a.jsonl", {"prompt": "1", "level": 2, "name": "x"}), curriculum=curriculum)
    with pytest.raises(UserError, match=message):
        make_stages(read_training(data, tokenizer, 4), data.curriculum)


def test_a_resumed_stream_notices_changed_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved = PromptStream(
        read_training(section(train=write(tmp_path / "a.jsonl", {"prompt": "1"})), tokenizer, 4), 0
    ).state_dict()
    changed = read_training(section(train=write(tmp_path / "a.jsonl", {"prompt": "2"})), tokenizer, 4)
    with pytest.raises(UserError, match="digest"):
        PromptStream(changed, 0).load_state_dict(saved)


def test_a_function_gives_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    module = tmp_path / "mine.py"
    module.write_text("def rows(n): return ({'prompt': str(i)} for i in range(n))\ndef none(): return []\nwrong = 3\n")
    data = section(train={"function": f"{module}:rows", "arguments": {"n": 3}})
    assert texts(read_training(data, tokenizer, 4), tokenizer) == ["0", "1", "2"]
    for name, message in (("none", "returned no rows"), ("wrong", "is a int, not a function"), ("no", "has no 'no'")):
        with pytest.raises(UserError, match=message):
            read_training(section(train={"function": f"{module}:{name}"}), tokenizer, 4)


def test_texts_come_from_several_sources_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = write(tmp_path / "a.parquet", {"q": "1", "a": "2"})
    more = write(tmp_path / "b.jsonl", {"text": "3 4 5 6 7"}, {"text": "3"})
    train = {"a": {"path": pairs, "keys": {"prompt": "q", "response": "a"}, "weight": 1}}
    data = section(train={**train, "b": {"path": more, "weight": 2}}, long_prompts="drop")
    told: list[str] = []
    examples, (stage,) = read_texts(data, tokenizer, 5, told.append)
    assert [len(example.input_ids) for example in examples] == [3, 2]
    assert [m.tolist() for m in stage.members] == [[0], [1]] and list(stage.weights) == [1, 2]
    assert told == ["b: left out 1 of 2 texts, longer than 5 tokens"]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"train": {"a": {"path": "a", "wieght": 1}}}, "data.train.a.wieght: unknown key; did you mean 'weight'"),
        ({"train": {"a": {"path": "a", "weight": 0}}}, "data.train.a.weight: Input should be greater than 0"),
        ({"train": {"a": {"path": "a", "weight": 1}, "b": "b"}}, "give every source a weight, or none"),
        ({"train": {"a": {"weight": 1}}}, "data.train.a: a source needs exactly one of path, reasoning_gym, function"),
        ({"train": {"path": "a", "function": "b"}}, "it has path and function"),
        ({"train": [1]}, r"data.train: Input should be a valid string, not \[1\]"),
        ({"train": "a", "curriculum": {"stages": [{}, {}]}}, "every stage but the last needs `prompts`"),
        ({"train": "a", "curriculum": {"stages": [{"prompts": 3}]}}, "the last has none"),
        ({"train": {"reasoning_gym": {"size": 1}}}, "data.train.reasoning_gym.task: missing"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        section(**data)


def test_sources_survive_the_resolved_configuration(tmp_path: Path) -> None:
    tree = {"run": {"name": "x"}, "model": {"hf_path": "m"}, "training": {"steps": 1}}
    sources = {"a": "a.jsonl", "b": {"reasoning_gym": {"task": "gcd", "size": 3, "config": {"max_value": 9}}}}
    config = parse_config({**tree, "data": {"train": sources, "evaluation": {"c": "c.jsonl"}}})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert load_config(file, ["data.train.b.reasoning_gym.size=9"]).data.train_sources["b"].reasoning_gym.size == 9  # type: ignore[union-attr]
    assert config.data.evaluation == {"c": "c.jsonl"}
