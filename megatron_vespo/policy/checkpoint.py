"""Saving the policy as a Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_folder
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.hf_files import HfWriter, copy_companions


def save_hf(exporter: HfExporter, folder: Path, source: Path) -> None:
    """Write weights, config and tokenizer to ``folder``, and let ``latest`` beside it point there. A collective.

    The folder appears when it is complete. A failed save leaves the folders of earlier saves as they are.

    Args:
        exporter: Streams the weights.
        folder: Target.
        source: HF folder that config and tokenizer are copied from.

    Raises:
        UserError: Writing failed; on every rank.
    """
    failure: OSError | None = None
    with ExitStack() as stack:
        writer = None
        try:
            if parallel.is_main():
                folder.parent.mkdir(parents=True, exist_ok=True)
                temporary = stack.enter_context(atomic_folder(folder))
                copy_companions(source, temporary)
                writer = HfWriter(temporary)
        except OSError as error:
            failure = error
        for tensors in exporter.stream():  # to the end, whatever happens: the other ranks are sending
            if writer is not None and failure is None:
                try:
                    writer.add(tensors)
                except OSError as error:
                    failure = error

        def finish() -> None:
            try:
                if failure is not None:
                    raise failure
                assert writer is not None
                writer.finish()
                stack.close()
                _point_latest(folder)
            except OSError as error:
                raise UserError(f"saving {folder} failed: {error}; earlier checkpoints are untouched") from error

        parallel.on_main(finish)


def _point_latest(folder: Path) -> None:
    link = folder.with_name(".latest.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.with_name("latest"))
