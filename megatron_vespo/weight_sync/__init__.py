from megatron_vespo import platform

platform.prepare()  # the modules of this package import megatron.core
