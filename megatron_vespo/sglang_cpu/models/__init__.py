"""A short model registry for SGLang (``SGLANG_EXTERNAL_MODEL_PACKAGE``).

SGLang imports about 200 model files at start-up to learn which architectures it knows; with this package it imports
these first, and all others only for an architecture that is not among them. Each file re-exports SGLang's own class.
"""

# Read by rollout.server without importing the modules, which import torch. {architecture: module here}
FAST_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
