"""Write a Hugging Face folder as a Megatron torch_dist checkpoint, loadable at any parallelism. docs/checkpoints.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from checkpoint_tool import Bar, add_shared_options, run, size

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a conversion needs no GPU, and must not take memory of one in use


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("target", type=Path, help="folder of Megatron checkpoints to make")
    parser.add_argument("--iteration", type=int, help="write it as this iteration; default: a release")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--file-size", type=size, default="1GiB", help="size of the .distcp files; default: 1GiB")
    add_shared_options(parser)
    return parser


def convert(args: argparse.Namespace, bar: Bar) -> str:
    """Convert and verify as the arguments say."""
    from megatron_vespo.models.convert import DTYPES, hf_to_torch_dist, verify

    dtype = DTYPES.get(args.dtype)
    if not args.verify_only:
        hf_to_torch_dist(
            args.source,
            args.target,
            dtype=dtype,
            iteration=args.iteration,
            make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
            file_bytes=args.file_size,
            overwrite=args.overwrite,
            progress=bar,
        )
    if args.verify or args.verify_only:
        verify(args.source, args.target, dtype=dtype, written="megatron", progress=bar)
    return "verified" if args.verify_only else "written and verified" if args.verify else "written"


if __name__ == "__main__":
    sys.exit(run(make_parser(), convert))
