"""Published formats, made up in miniature with their columns; duplicates; evaluation problems in training sets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_vespo.data.overlap import HeldOut, normalise
from megatron_vespo.data.prepare import Rules, prepare
from megatron_vespo.data.published import FORMATS, after_hashes, read_published, whole
from megatron_vespo.errors import UserError

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its"
    ' own line after "Answer:".'
)


def user(text: str) -> list[dict[str, str]]:
    return [{"content": text, "role": "user"}]


def verl(text: str, answer: str, **more: Any) -> dict[str, Any]:
    reward = {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}
    return {
        "data_source": "math_dapo",
        "prompt": user(DAPO.format(text)),
        "ability": "MATH",
        "reward_model": reward,
    } | more


CASES = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
EURUS = {
    "data_source": "taco",
    "prompt": [{"content": "[ASSESS]", "role": "system"}, *user("Add two numbers.\n\nWrite Python code.")],
    "ability": "code",
    "reward_model": {"ground_truth": CASES, "style": "rule"},
    "extra_info": {"index": 5, "split": "train"},
}
AOPS = "https://artofproblemsolving.com/wiki/index.php/2024_AIME_I_Problems/Problem_7"

# (format, file, a row as published, problem, label, further metadata)
PUBLISHED: list[tuple[str, str, dict[str, Any], str, str, dict[str, Any]]] = [
    ("dapo_math_17k", "dapo-math-17k.parquet", verl("Find 1+1.", "2", extra_info={"index": "9a9b"}), "Find 1+1.", "2",
     {"id": "9a9b"}),
    ("dapo_math_17k", "train.parquet",
     {"prompt": "Find 1+1.", "solution": "2", "data_source": "math_dapo", "source_prompt": user("x"), "ability": "MATH",
      "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"index": "9a9b"}},
     "Find 1+1.", "2", {"id": "9a9b"}),
    ("deepscaler", "deepscaler.json", {"problem": "Find $x$.", "answer": "-\\frac{2}{3}", "solution": "s"}, "Find $x$.",
     "-\\frac{2}{3}", {"id": "deepscaler.json:1"}),
    ("math_500", "test.jsonl",
     {"problem": "Find $x$.", "solution": "Thus \\boxed{\\frac{1}{2}}.", "answer": "\\frac{1}{2}", "subject": "Algebra",
      "level": 3, "unique_id": "test/algebra/1.json"},
     "Find $x$.", "\\frac{1}{2}", {"id": "test/algebra/1.json", "difficulty": 3, "subject": "Algebra"}),
    ("aime_2024", "train.parquet",
     {"id": 60, "problem": "Find n.", "solution": "s", "answer": "025", "url": AOPS, "year": "2024"}, "Find n.", "25",
     {"id": AOPS, "difficulty": 7}),
    ("aime_2024", "aime_2024_problems.parquet",
     {"ID": "2024-II-4", "Problem": "Find n.", "Solution": "s", "Answer": 33}, "Find n.", "33",
     {"id": "2024-II-4", "difficulty": 4}),
    ("aime_2024", "test.parquet", {"id": 0, "problem": "Find n.", "solution": "\\boxed{204}", "url": AOPS}, "Find n.",
     "204", {"difficulty": 7}),
    ("aime_2024", "aime-2024.parquet", verl("Find n.", "204", extra_info={"index": 3, "raw_problem": "Find n."}),
     "Find n.", "204", {"id": "3"}),
    ("aime_2025", "test.jsonl", {"problem": "Find b.", "answer": "70", "id": "0"}, "Find b.", "70", {"id": "0"}),
    ("aime_2025", "aime2025-I.jsonl", {"question": "Find b.", "answer": "70"}, "Find b.", "70",
     {"id": "aime2025-I.jsonl:1"}),
    ("amc_2023", "test-00000-of-00001.parquet",
     {"id": 0, "question": "How far?", "answer": 27.0, "url": "https://x/2023_AMC_12A_Problems/Problem_1"}, "How far?",
     "27", {"difficulty": 1}),
    ("amc_2023", "train-00000-of-00001.parquet",
     {"id": 0, "problem": "How far?", "answer": 27.5, "url": "https://x/2023_AMC_12A_Problems/Problem_2"}, "How far?",
     "27.5", {"difficulty": 2}),
    ("gsm8k", "test-00000-of-00001.parquet", {"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
     "How many?", "1002", {}),
    ("eurus_code", "train-00000-of-00008.parquet", EURUS, "Add two numbers.\n\nWrite Python code.", CASES,
     {"id": "5", "data_source": "taco"}),
    ("eurus_code_validation", "validation-00000-of-00001.parquet", EURUS, "Add two numbers.\n\nWrite Python code.",
     CASES, {"id": "5", "data_source": "taco"}),
]  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def fail(where: str, why: str) -> None:
    raise AssertionError((where, why))


@pytest.mark.parametrize("name, file, row, problem, label, metadata", PUBLISHED)
def test_a_published_format_is_read(
    tmp_path: Path, name: str, file: str, row: dict[str, Any], problem: str, label: str, metadata: dict[str, Any]
) -> None:
    write(tmp_path / "data" / file, row)
    for path in (tmp_path, tmp_path / "data" / file):
        (found,) = read_published(name, path, "train", fail)
        assert (found.text, found.label) == (problem, label)
        assert ({"data_source": name} | metadata).items() <= found.metadata.items()


def test_every_format_has_a_fixture() -> None:
    assert {name for name, *_ in PUBLISHED} == set(FORMATS)


def test_rows_of_other_sets_are_passed_over(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", EURUS, EURUS | {"ability": "math"})
    assert len(list(read_published("eurus_code", file, "train", fail))) == 1
    rows = [
        {"problem": "a", "answer": 1.0, "url": f"https://x/{year}_AMC_12A_Problems/Problem_1"} for year in (2022, 2023)
    ]
    file = write(tmp_path / "b.jsonl", *rows)
    assert len(list(read_published("amc_2023", file, "test", fail))) == 1


def test_a_folder_with_splits_gives_the_one_that_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "main" / f"{split}-0.parquet", {"question": split, "answer": "#### 1"})
    (tmp_path / "dataset_infos.json").write_text("{}")
    for split in ("train", "test"):
        assert [problem.text for problem in read_published("gsm8k", tmp_path, split, fail)] == [split]
    splits = {"eurus_code": "train", "eurus_code_validation": "validation"}
    for split in splits.values():
        write(tmp_path / "eurus" / f"{split}-0.parquet", EURUS | {"prompt": user(split)})
    for name, split in splits.items():
        assert [problem.text for problem in read_published(name, tmp_path / "eurus", "train", fail)] == [split]


@pytest.mark.parametrize(
    "name, row, why",
    [
        ("gsm8k", {"question": "How many?", "answer": "2"}, "no '####' in the answer"),
        ("aime_2024", {"problem": "x", "solution": "\\boxed{2"}, "not closed"),
        ("math_500", {"problem": "x", "answer": ""}, "no answer"),
        ("math_500", {"problem": " ", "answer": "2"}, "no problem"),
        ("eurus_code", EURUS | {"reward_model": {"ground_truth": "{"}}, "not JSON"),
        ("eurus_code", EURUS | {"reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": []}'}}, "as many"),
    ],
)
def test_a_row_that_cannot_be_used_is_told(tmp_path: Path, name: str, row: dict[str, Any], why: str) -> None:
    told: list[str] = []
    file = write(tmp_path / "a.jsonl", row)
    assert list(read_published(name, file, "train", lambda where, what: told.append(f"{where} {what}"))) == []
    assert len(told) == 1 and told[0].startswith(f"{file}:1 ") and why in told[0]


def test_other_columns_name_what_is_needed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"query": "x"})
    with pytest.raises(UserError, match=r"a.jsonl:1: gsm8k needs a column question, there are query; published as"):
        list(read_published("gsm8k", file, "train", fail))
    with pytest.raises(UserError, match="unknown format 'gms8k'; known: dapo_math_17k"):
        list(read_published("gms8k", file, "train", fail))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="files in this folder"):
        list(read_published("gsm8k", tmp_path / "empty", "train", fail))


@pytest.mark.parametrize(
    "value, answer",
    [("$204$", "204"), ("so \\boxed{a_{1}} or \\boxed{b}", "b"), ("000", "0"), (7, "7"), (-3.0, "-3"), ("0.5", "0.5"),
     ("x=0", "x=0"), ("1.50", "1.50")],
)  # fmt: skip
def test_answers(value: Any, answer: str) -> None:
    assert whole(value) == answer
    assert after_hashes("so #### 3 and\n#### -1,000 ") == "-1000"


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("Find $x+1$.", "find  x + 1", True),
        ("Find $x+1$.", "Find $x-1$.", False),
        ("$\\dfrac{1}{2}$", "\\(\\frac{1}{2}\\)", True),
        ("\\left( a \\right) \\le \\text{cost}", "(a) \\leq cost", True),
        ("Find f(12)", "Find f(1 2)", False),
        ("求最大值", "求最小值", False),
        ("\uff11 + 1", "1+1", True),
    ],
)
def test_normalised_text(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


LONG = "Alice walks from the station to the river and back again each morning before she eats seven apples"
BOILERPLATE = "where m and n are relatively prime positive integers find the value of m plus n"


def test_held_out_problems_are_found_by_text_and_by_ngrams() -> None:
    held = HeldOut([("long", LONG), ("short", "Find x."), ("aime", f"A cube has volume twelve {BOILERPLATE}")])
    assert held.find(LONG.upper() + "!") == ("long", 1.0)
    assert held.find("find X") == ("short", 1.0)
    assert held.find("Find y.") is None
    found = held.find(f"Yesterday: {LONG.replace('seven apples', 'nine pears')}. How many?")
    assert found is not None and found[0] == "long" and 0.5 < found[1] < 1
    assert held.find(LONG[:60]) is None, "a few words in common are no copy"
    assert held.find(f"A sphere and a cone of one height have a ratio of volumes {BOILERPLATE}") is not None, (
        "stated limit: most n-grams of so short a problem are the usual ending"
    )
    assert HeldOut([("a", f"{LONG} {BOILERPLATE}")]).find(f"A sphere has area one {BOILERPLATE}") is None


def test_training_sets_lose_repetitions_contradictions_and_evaluation_problems(tmp_path: Path) -> None:
    texts = {
        "Find 1+1.": "2",
        "find $1 + 1$": "2",
        "Find 3*3.": "9",
        "FIND 3*3": "8",
        LONG + " today": "7",
        "Own.": "1",
    }
    dapo = write(tmp_path / "dapo.parquet", *[verl(text, answer) for text, answer in texts.items()] * 2)
    rows = [{"problem": text, "answer": "2"} for text in ("Find 1+1", "New.", "")]
    scaler = write(tmp_path / "deepscaler.json", *rows)
    aime = write(tmp_path / "aime.jsonl", *[{"problem": LONG, "answer": "7", "id": 3}] * 2)
    output = tmp_path / "out"
    outcome = prepare([("dapo_math_17k", dapo), ("deepscaler", scaler)], [("aime_2024", aime)], output)
    first = rows_in(output / "dapo_math_17k.jsonl")
    assert [row["label"] for row in first] == ["2", "1"]
    assert first[0]["prompt"] == [
        {
            "role": "user",
            "content": "Find 1+1.\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        }
    ]
    assert first[0]["metadata"]["data_source"] == "dapo_math_17k"
    assert [row["metadata"]["id"] for row in rows_in(output / "deepscaler.jsonl")] == ["deepscaler.json:2"]
    assert len(rows_in(output / "aime_2024.jsonl")) == 1
    assert outcome.rows["dapo_math_17k"] == {
        "read": 12, "kept": 2, "repeated": 8, "contradictory": 1, "in_evaluation": 1, "unusable": 0
    }  # fmt: skip
    assert outcome.rows["deepscaler"] | {"kept": 0} == {
        "read": 3, "kept": 0, "repeated": 1, "contradictory": 0, "in_evaluation": 0, "unusable": 1
    }  # fmt: skip
    for counts in outcome.rows.values():
        assert counts["read"] == sum(count for what, count in counts.items() if what != "read"), "nothing is lost"
    report = json.loads((output / "report.json").read_text())
    assert report["problems"] == outcome.rows and report["ngram"] == 8 and report["overlap"] == 0.5
    dropped = {row["reason"]: row for row in rows_in(output / "dropped.jsonl")}
    assert dropped["contradictory"]["answers"] == ["8", "9"]
    assert dropped["in_evaluation"]["same_as"] == "aime_2024/3" and dropped["in_evaluation"]["overlap"] == 1.0
    assert dropped["unusable"]["where"] == f"{scaler}:3"


def test_rules_may_differ(tmp_path: Path) -> None:
    train = write(tmp_path / "a.json", {"problem": LONG + " today", "answer": "7"})
    held = write(tmp_path / "b.jsonl", {"problem": LONG, "answer": "7"})
    rules = Rules({"math": "Q: {problem}", "code": "{problem}"}, overlap=1.1)
    outcome = prepare([("deepscaler", train)], [("math_500", held)], tmp_path / "out", rules)
    assert outcome.rows["deepscaler"]["kept"] == 1
    assert rows_in(tmp_path / "out" / "math_500.jsonl")[0]["prompt"][0]["content"] == f"Q: {LONG}"


def test_the_command(tmp_path: Path) -> None:
    for split, text in (("train", "How many?"), ("test", "How much?")):
        write(tmp_path / "gsm8k" / f"{split}-0.parquet", {"question": text, "answer": "#### 3"})
    write(tmp_path / "m.jsonl", {"problem": "how many", "answer": "3", "unique_id": "a"})
    command = [sys.executable, "tools/prepare_data.py", "--output", str(tmp_path / "out")]
    sets = ["--train", f"gsm8k={tmp_path / 'gsm8k'}", "--evaluation", f"math_500={tmp_path / 'm.jsonl'}"]
    done = subprocess.run([*command, *sets], capture_output=True, text=True, check=True)
    assert "gsm8k: 1 read, 1 in_evaluation" in done.stdout and "math_500: 1 read, 1 kept" in done.stdout
    wrong = subprocess.run([*command, "--train", "gsm8k=nowhere.jsonl"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "nowhere.jsonl: no such data file" in wrong.stderr
    wrong = subprocess.run([*command, "--train", "gsm8k"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "write FORMAT=PATH" in wrong.stderr
