LOADER = "megatron_vespo.sglang_weights.loader.load"
"""Name under which SGLang imports our loader: its argument ``--custom-weight-loader``. No torch here."""
