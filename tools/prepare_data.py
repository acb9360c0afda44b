"""Turn published maths and code sets, as they lie on disk, into prompt files; nothing is downloaded.

    tools/prepare_data.py --train dapo_math_17k=DAPO-Math-17k --evaluation aime_2024=aime_2024
        math_500=MATH-500/test.jsonl --output data/math

writes data/math/dapo_math_17k.jsonl, aime_2024.jsonl, math_500.jsonl, and what was dropped and why: report.json and
dropped.jsonl. Repeated problems are kept once, and training problems that are in an evaluation set are dropped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    from megatron_vespo.data.overlap import NGRAM, OVERLAP
    from megatron_vespo.data.prepare import INSTRUCTIONS
    from megatron_vespo.data.published import FORMATS

    formats = "\n".join(f"  {name:14} {form.published}" for name, form in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"FORMAT is one of these, published as:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("train", "evaluation"):
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar="FORMAT=PATH", help="file, or folder of a downloaded set"
        )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--instruction", default=INSTRUCTIONS["math"], help="prompt of a maths problem; default: %(default)r"
    )
    parser.add_argument("--ngram", type=int, default=NGRAM, help="tokens of an n-gram; default: %(default)s")
    parser.add_argument(
        "--overlap",
        type=float,
        default=OVERLAP,
        help="share of an evaluation problem's n-grams in a training problem from which it is dropped; default:"
        " %(default)s",
    )
    return parser


def main() -> int:
    """Prepare; the exit status."""
    from megatron_vespo.data.prepare import INSTRUCTIONS, Rules, prepare
    from megatron_vespo.errors import UserError

    parser = make_parser()
    args = parser.parse_args()
    sets: dict[str, list[tuple[str, Path]]] = {"train": [], "evaluation": []}
    for purpose, found in sets.items():
        for text in vars(args)[purpose]:
            name, separator, path = text.partition("=")
            if not separator:
                parser.error(f"--{purpose} {text}: write FORMAT=PATH")
            found.append((name, Path(path)))
    if not sets["train"] and not sets["evaluation"]:
        parser.error("name at least one set, with --train or --evaluation")
    if "{problem}" not in args.instruction:
        parser.error("--instruction needs {problem} in it")
    rules = Rules({**INSTRUCTIONS, "math": args.instruction}, args.ngram, args.overlap)
    try:
        outcome = prepare(sets["train"], sets["evaluation"], args.output, rules)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for name, counts in outcome.rows.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    print(f"written to {args.output}; what was dropped is in {args.output / 'dropped.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
