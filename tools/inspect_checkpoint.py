"""Say what a folder holds, Hugging Face or Megatron torch_dist: weights, dtypes, sizes, files. Reads no weights."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every tensor; default: those of the same kind together")
    return parser


def main() -> int:
    """Print the description; the exit status."""
    parser = make_parser()
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    from megatron_vespo.errors import UserError
    from megatron_vespo.models.describe import describe

    try:
        print(describe(args.folder, every_tensor=args.all))
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
