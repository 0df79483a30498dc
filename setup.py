"""Packaging. The folders kernels/ and weights/ are installed inside the minirea package, never as top-level names."""

from setuptools import setup

PLOT = ["matplotlib"]
EVAL = ["rouge", "rouge-score", "jieba"]  # metrics of LongBench, L-Eval and InfiniteBench
TEST = [
    *PLOT,
    *EVAL,
    "pytest>=8",
    "pytest-xdist",
    "hypothesis",
    "transformers>=5",
    "safetensors",
    "ruff",
    "mypy",
    "pre-commit",
    "protobuf",
    "tiktoken",
]

setup(
    name="minirea",
    version="0.1.0",
    description="A minimal transformer inference engine that reads a million tokens with ReAttention",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "minirea",
        "minirea.cli",
        "minirea.tokenizer",
        "minirea.explain",
        *(f"minirea.evaluation{room}" for room in ("", ".frame", ".text", ".tasks", ".benchmarks")),
        "minirea.kernels",
        "minirea.kernels.cpu",
        "minirea.kernels.fused",
        "minirea.kernels.steps",
        "minirea.weights",
    ],
    package_dir={"minirea.kernels": "kernels", "minirea.weights": "weights"},
    package_data={
        "minirea": ["py.typed"],
        "minirea.explain": ["page.html", "page.css", "page.js"],
        "minirea.weights": ["demo/*", "demo/prompts/*"],
        "minirea.kernels": ["*.md"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "sentencepiece",
        "tokenizers>=0.20",
        "numpy",
        "llvmlite>=0.45",  # compiles the kernels of a CPU
        "jinja2>=3.1.6",
        "tqdm",
    ],
    extras_require={"test": TEST, "plot": PLOT, "eval": EVAL},
    entry_points={"console_scripts": ["minirea = minirea.__main__:command"]},
)
