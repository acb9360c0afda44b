"""Megatron-VESPO: reinforcement learning of mixture-of-experts language models.

SGLang samples, verifiable rewards score, Megatron-Core trains, and the VESPO loss (arXiv 2602.10693) keeps training
stable when samples are stale or come from an engine whose log-probabilities differ from the trainer's.
"""

__version__ = "0.1.0"
