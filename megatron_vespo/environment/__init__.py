"""Checks of the environment: each node's before anything is started, all nodes' together once they have met.

``check_node`` needs no torch; what is compared across ranks is in ``ranks``. docs/environment.md lists what is checked.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable

from megatron_vespo.config import Config
from megatron_vespo.environment.checks import Finding, examine
from megatron_vespo.environment.facts import read_facts
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.placement import Node

# Set by whoever has checked this node for its ranks.
_CHECKED = "MEGATRON_VESPO_NODE_CHECKED"


def check_before_ranks(config: Config, ranks: int) -> None:
    """Check the only node of a job before its ranks are started, which then need not; warnings are printed.

    Args:
        config: Configuration.
        ranks: Trainer ranks to come.

    Raises:
        UserError: All that is wrong with this node.
    """
    warn(_checked(examine(read_facts(config, Node(ranks=ranks)), config)))
    os.environ[_CHECKED] = "1"


def check_node(config: Config) -> list[str]:
    """Check this node, by its first rank.

    Returns:
        Warnings, which ``ranks.check_ranks`` prints for all nodes; none where this is another rank or the launcher has
        checked.

    Raises:
        UserError: All that is wrong with this node.
    """
    if os.environ["LOCAL_RANK"] != "0" or _CHECKED in os.environ:
        return []
    return _checked(examine(read_facts(config, Node.from_environment()), config))


def warn(warnings: Iterable[str]) -> None:
    """Tell the console and the log."""
    for message in warnings:
        print(f"warning: {message}", file=sys.stderr, flush=True)  # noqa: T201
        logging.getLogger(__name__).warning(message)


def _checked(findings: list[Finding]) -> list[str]:
    """The warnings; raises the errors."""
    errors = [finding.message for finding in findings if finding.severity == "error"]
    warnings = [finding.message for finding in findings if finding.severity == "warning"]
    if errors:
        # Nothing else will tell of them.
        warn(warnings)
        raise UserError("\n  ".join(errors))
    return warnings
