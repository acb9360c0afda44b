"""The parallel plan: what Megatron or SGLang would refuse only once they build the model, or would do badly.

Everything follows from the configuration, the architecture and the number of ranks. No torch here; the architecture
comes as ``Facts``, which whoever has read the ``config.json`` makes.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.plan.servers import find_server_problems
from megatron_vespo.plan.sizes import Facts, Parallelism, Problem
from megatron_vespo.plan.trainer import find_length_problems, find_trainer_problems


def check_plan(config: Config, facts: Facts, ranks: int, ranks_per_node: int) -> list[str]:
    """Check that model, samples and servers fit the ranks.

    Args:
        config: Configuration.
        facts: The model.
        ranks: Ranks of the job.
        ranks_per_node: Ranks on each node.

    Returns:
        Warnings.

    Raises:
        UserError: Everything that is wrong, a line each.
    """
    problems = list(find_problems(config, facts, ranks, ranks_per_node))
    fatal = [problem.text for problem in problems if problem.fatal]
    if fatal:
        raise UserError("\n".join(fatal))
    return [problem.text for problem in problems]


def find_problems(config: Config, facts: Facts, ranks: int, ranks_per_node: int) -> Iterator[Problem]:
    """As :func:`check_plan`, one after the other."""
    if config.objective != "rollout":
        yield from find_trainer_problems(config, facts, Parallelism.of(config.megatron, ranks, ranks_per_node))
    if config.samples_from_server:
        yield from find_length_problems(config, facts)
        if config.rollout.server.is_own:
            yield from find_server_problems(config, facts, ranks_per_node)
