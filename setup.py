from setuptools import find_packages, setup

setup(
    name="megatron-vespo",
    version="0.1.0",
    description="Reinforcement learning of mixture-of-experts language models with Megatron-Core, SGLang and VESPO",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_vespo", "megatron_vespo.*"]),
    package_data={"megatron_vespo.page": ["static/*"]},
    # Exact versions are in constraints.txt; here stands only what the code needs.
    install_requires=[
        "torch",
        "megatron-core==0.19.2",
        "transformers>=5",
        "safetensors",
        "sentencepiece",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "httpx",
        "aiohttp",
        "msgspec",
        "rich",
        "matplotlib",
        "math-verify[antlr4_13_2]",
        "tensorboard",
        "pyarrow",
    ],
    extras_require={
        "data": ["datasets", "reasoning-gym"],
        "gpu": ["transformer-engine[pytorch]"],
        "sglang": ["sglang==0.5.23"],
        "wandb": ["wandb"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "selenium",
            "mypy",
            "types-PyYAML",
            "types-psutil",
            "psutil",
        ],
    },
    entry_points={
        # SGLang loads this only when the environment says SGLANG_PLATFORM=megatron_vespo_cpu.
        "sglang.srt.platforms": ["megatron_vespo_cpu = megatron_vespo.sglang_cpu.platform:activate"],
    },
)
