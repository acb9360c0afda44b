r"""Published data sets in their own formats, a table row each, made into rows of ours.

The columns are those of the files on the Hugging Face Hub as their cards describe them; where people published the same
set with other columns, the names are tried in order. No row here was checked against a download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vespo.data.rows import FILES, look_up, read_rows
from megatron_vespo.errors import UserError
from megatron_vespo.types import DATA_SOURCE


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem as any format gives it.

    Attributes:
        text: The problem alone, without instructions around it.
        label: Right answer, or test cases as JSON.
        metadata: data_source, id, and what the format knows: difficulty (a number), subject, url.
        where: Where it stood.
    """

    text: str
    label: str
    metadata: dict[str, Any]
    where: str


class Unusable(Exception):
    """A row without a problem or without an answer; says why."""


def whole(value: Any) -> str:
    r"""The answer as it is, or what its last ``\boxed{}`` holds; 27.0 and 025 are the integers."""
    text = str(value).strip()
    if "\\boxed{" in text:
        text = _last_boxed(text)
    text = text.removeprefix("$").removesuffix("$").strip()
    if re.fullmatch(r"-?\d+\.0+", text):
        text = text.split(".")[0]
    return str(int(text)) if re.fullmatch(r"0\d+", text) else text


def after_hashes(value: Any) -> str:
    """GSM8K: a worked solution, then ``#### 1,234``."""
    _, mark, answer = str(value).rpartition("####")
    if not mark:
        raise Unusable("no '####' in the answer")
    return answer.strip().replace(",", "")


def test_cases(value: Any) -> str:
    """Code: JSON with ``inputs`` and ``outputs`` of equal length, and sometimes ``fn_name``."""
    try:
        cases = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise Unusable("test cases are not JSON") from error
    if not isinstance(cases, dict) or not cases.get("inputs") or len(cases["inputs"]) != len(cases.get("outputs", [])):
        raise Unusable("test cases need inputs and as many outputs")
    return json.dumps(cases, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Format:
    """Where a published set holds what we need: for each a list of columns, the first that a row has is taken.

    Attributes:
        published: Who published it with which columns, for people.
        problem: Text, or messages, of which the user's are taken.
        answer: See ``take_answer``.
        id: The rows' own names.
        difficulty: The last number in it is the difficulty: a level, or the number of a contest's problem.
        keep: Columns that go to the metadata.
        take_answer: Makes the label.
        only: A column, and a pattern that it must hold; rows that do not are another set's.
        kind: What is asked for: a final answer (math) or a program (code).
        split: The one that this is, where a folder has others too.
    """

    published: str
    problem: tuple[str, ...]
    answer: tuple[str, ...]
    id: tuple[str, ...] = ("id",)
    difficulty: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    take_answer: Callable[[Any], str] = whole
    only: tuple[str, str] | None = None
    kind: str = "math"
    split: str | None = None


FORMATS: dict[str, Format] = {
    "dapo_math_17k": Format(
        "BytedTsinghua-SIA/DAPO-Math-17k (prompt, reward_model, extra_info; every problem about 100 times),"
        " open-r1/DAPO-Math-17k-Processed (prompt, solution, extra_info)",
        problem=("prompt",),
        answer=("reward_model.ground_truth", "solution"),
        id=("extra_info.index",),
    ),
    "deepscaler": Format(
        "agentica-org/DeepScaleR-Preview-Dataset (problem, answer, solution)",
        problem=("problem",),
        answer=("answer",),
    ),
    "math_500": Format(
        "HuggingFaceH4/MATH-500 (problem, solution, answer, subject, level, unique_id)",
        problem=("problem",),
        answer=("answer", "solution"),
        id=("unique_id",),
        difficulty=("level",),
        keep=("subject",),
    ),
    "aime_2024": Format(
        "HuggingFaceH4/aime_2024 (id, problem, solution, answer, url, year), Maxwell-Jia/AIME_2024 (ID, Problem,"
        r" Solution, Answer), math-ai/aime24 (id, problem, solution with \boxed{}), BytedTsinghua-SIA/AIME-2024 (as"
        " DAPO-Math-17k, every problem 32 times)",
        problem=("problem", "Problem", "prompt"),
        answer=("answer", "Answer", "reward_model.ground_truth", "solution"),
        id=("ID", "url", "id", "extra_info.index"),
        difficulty=("ID", "url"),
    ),
    "aime_2025": Format(
        "math-ai/aime25 (problem, answer, id), opencompass/AIME2025 (question, answer), yentinglin/aime_2025 (problem,"
        " answer, solution, url, year)",
        problem=("problem", "question"),
        answer=("answer", "solution"),
        id=("url", "id"),
        difficulty=("url",),
    ),
    "amc_2023": Format(
        "math-ai/amc23 and zwhe99/amc23 (id, question, answer, url), AI-MO/aimo-validation-amc (id, problem, answer,"
        " url; 2022 too)",
        problem=("question", "problem"),
        answer=("answer",),
        id=("url", "id"),
        difficulty=("url",),
        only=("url", "2023"),
    ),
    "gsm8k": Format(
        "openai/gsm8k, folder main or socratic (question, answer that ends in #### and the number)",
        problem=("question",),
        answer=("answer",),
        take_answer=after_hashes,
    ),
    "eurus_code": Format(
        "PRIME-RL/Eurus-2-RL-Data, the rows with ability code: sources apps, codecontests, codeforces, taco"
        " (data_source, prompt, ability, reward_model with test cases as JSON, extra_info)",
        problem=("prompt",),
        answer=("reward_model.ground_truth",),
        id=("extra_info.index",),
        keep=(DATA_SOURCE,),
        take_answer=test_cases,
        only=("ability", "^code$"),
        kind="code",
    ),
}

FORMATS["eurus_code_validation"] = replace(FORMATS["eurus_code"], split="validation")

# Instructions that publishers put around problems, and that would differ from set to set.
_PREFIXES = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.",
)
_SUFFIXES = ('Remember to put your answer on its own line after "Answer:".',)


def read_published(name: str, path: Path, split: str, unusable: Callable[[str, str], None]) -> Iterator[Problem]:
    """The problems of a published set.

    Args:
        name: Of a row of ``FORMATS``.
        path: A file, or the folder that the set was downloaded to.
        split: In a folder with files of several splits, the one to read.
        unusable: Told where a row stands that has no problem or answer, and what is wrong with it.

    Raises:
        UserError: No such format, no files, or files with none of the columns.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    form = FORMATS[name]
    for file in find_files(path, form.split or split):
        for where, row in read_rows(file):
            if form.only is not None and not _is_of(row, *form.only):
                continue
            if all(look_up(row, column) is None for column in form.problem):
                raise UserError(
                    f"{where}: {name} needs a column {' or '.join(form.problem)}, there are {', '.join(row)};"
                    f" published as {form.published}"
                )
            try:
                yield _problem(name, form, where, row)
            except Unusable as error:
                unusable(where, str(error))


def find_files(path: Path, split: str) -> list[Path]:
    """The data files at a path, in order; of a folder those whose names begin with the split, if any do.

    Raises:
        UserError: There are none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in FILES and file.name != "dataset_infos.json")
    named = [file for file in files if file.name.startswith(split)]
    if not files:
        raise UserError(f"{path}: no {', '.join(FILES)} files in this folder")
    return named or files


def _is_of(row: Mapping[str, Any], column: str, pattern: str) -> bool:
    value = look_up(row, column)
    # Smaller sets that hold nothing else need not say what they are.
    return value is None or re.search(pattern, str(value)) is not None


def _problem(name: str, form: Format, where: str, row: dict[str, Any]) -> Problem:
    text = _without_instructions(_text_of(_first(row, form.problem)))
    answer = _first(row, form.answer)
    if not text or answer is None:
        raise Unusable("no problem" if not text else f"no answer in {' or '.join(form.answer)}")
    label = form.take_answer(answer)
    if not label:
        raise Unusable("the answer is empty")
    metadata: dict[str, Any] = {DATA_SOURCE: name}
    own = _first(row, form.id)
    metadata["id"] = where.rpartition("/")[2] if own is None else str(own)
    numbers = re.findall(r"\d+", str(_first(row, form.difficulty) or ""))
    if numbers:
        metadata["difficulty"] = int(numbers[-1])
    metadata |= {column: row[column] for column in form.keep if row.get(column) is not None}
    return Problem(text, label, metadata, where)


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    values = (look_up(row, column) for column in columns)
    return next((value for value in values if value is not None and value != ""), None)


def _text_of(value: Any) -> str:
    if isinstance(value, list):  # messages; the system's are the publisher's own
        return "\n\n".join(str(message["content"]) for message in value if message.get("role") == "user").strip()
    return str(value or "").strip()


def _without_instructions(text: str) -> str:
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix).lstrip()
    for suffix in _SUFFIXES:
        text = text.removesuffix(suffix).rstrip()
    return text


def _last_boxed(text: str) -> str:
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    raise Unusable("\\boxed{ is not closed")
