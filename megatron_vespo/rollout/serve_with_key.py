"""Starts SGLang with an API key from the environment: ``python -m megatron_vespo.rollout.serve_with_key ARGUMENTS``.

SGLang takes keys on its command line, which every user of the machine can read, or from a file; and it writes all its
arguments into its log. Only the owner of a process can read its environment. Runs where SGLang lives; standard library
only.
"""

import logging
import os
import runpy
import sys

KEY_VARIABLE = "MEGATRON_VESPO_SERVER_KEY"


def main() -> None:
    """Become ``sglang.launch_server``."""
    key = os.environ.pop(KEY_VARIABLE)
    make_record = logging.getLogRecordFactory()

    def make_record_without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        message = record.getMessage()
        if key in message:
            record.msg, record.args = message.replace(key, "<key>"), ()
        return record

    logging.setLogRecordFactory(make_record_without_key)
    sys.argv.append(f"--api-key={key}")  # in one piece: a key may begin with a dash
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
