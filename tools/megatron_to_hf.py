"""Write a Megatron torch_dist checkpoint of any parallelism as a Hugging Face folder. docs/checkpoints.md."""

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
    parser.add_argument("source", type=Path, help="folder of Megatron checkpoints, or one of them")
    parser.add_argument("target", type=Path, help="Hugging Face folder to make")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder with config.json and tokenizer")
    parser.add_argument("--max-shard-size", type=size, default="5GB", help="of the safetensors files; default: 5GB")
    add_shared_options(parser)
    return parser


def convert(args: argparse.Namespace, bar: Bar) -> str:
    """Convert and verify as the arguments say."""
    from megatron_vespo.models.convert import DTYPES, torch_dist_to_hf, verify

    dtype = DTYPES.get(args.dtype)
    if not args.verify_only:
        torch_dist_to_hf(
            args.source,
            args.target,
            args.hf,
            dtype=dtype,
            shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            progress=bar,
        )
    if args.verify or args.verify_only:
        verify(args.target, args.source, dtype=dtype, written="hf", progress=bar)
    return "verified" if args.verify_only else "written and verified" if args.verify else "written"


if __name__ == "__main__":
    sys.exit(run(make_parser(), convert))
