"""Compare parallel layouts on a rollout batch that a run saved, with a float64 reference in a single process.

Each layout makes one optimizer step on the whole batch, under torchrun's engine, from the weights of model.hf_path.
Loss, gradient norm, W and phi of every sample, metrics and the updated weights are held to the reference. Exit status 1
where a layout is off or fails. docs/layouts.md explains the table.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.layouts.layout import DEFAULT_LAYOUTS, Layout
from megatron_vespo.layouts.report import as_json, as_markdown, as_text
from megatron_vespo.layouts.run import compare_layouts
from megatron_vespo.layouts.settings import UPDATE_OVERRIDES


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Settings that the tool puts in place of the configuration's: {' '.join(UPDATE_OVERRIDES)}; a step of"
        " real training is too small to be compared in float32.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=Path, required=True, help="a file of a run's rollouts/ (rollout.save_batches)")
    parser.add_argument("--config", type=Path, required=True, help="configuration of the run")
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="LAYOUT",
        default=list(DEFAULT_LAYOUTS),
        help="such as 1 tp2 pp2-vpp2 dp2-ep2 tp2-etp2; -mb512 limits microbatches to 512 tokens, -mbmin to the longest"
        f" sample; default: {' '.join(DEFAULT_LAYOUTS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all differences and where they are")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a document")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="keep the ranks' logs; default: only after a failure"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of the configuration")
    return parser


def main() -> int:
    """Compare, print and write.

    Returns:
        Exit status: 0 where all layouts agree, 1 otherwise.
    """
    options = make_parser().parse_intermixed_args()
    # --layouts takes all that follows it; what holds an equals sign is no layout.
    names = [name for name in options.layouts if "=" not in name]
    overrides = [*options.overrides, *(name for name in options.layouts if "=" in name)]
    folder = options.logs or Path(tempfile.mkdtemp(prefix="layouts-"))
    try:
        layouts = list(dict.fromkeys(Layout.parse(name) for name in names))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--logs: {folder} is not empty; choose another folder")
        comparison = compare_layouts(options.config, options.batch, layouts, overrides, folder, say=_say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if not any(folder.glob("*")):  # nothing was started
            folder.rmdir()
        return 1
    print("\n" + as_text(comparison), flush=True)
    for path, text in ((options.json, as_json), (options.markdown, as_markdown)):
        if path is not None:
            atomic_write(path, text(comparison))
    if options.logs is None and comparison.agrees:
        shutil.rmtree(folder)
    return 0 if comparison.agrees else 1


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
