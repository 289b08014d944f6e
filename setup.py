"""Explicit package list; metadata and lint settings live in pyproject.toml."""

from setuptools import setup

PACKAGES = [
    "tokenring",
    "tokenring.links",
    "tokenring.schedules",
    "tokenring.simulation",
    "tokenring.kernels",
    "tokenring.integrations",
    "moe",
    "sparse_attn",
    "token_reduction",
    "token_reduction.reducers",
    "launch",
    "launch.engines",
    "launch.models",
]

setup(packages=PACKAGES, package_data={name: ["py.typed"] for name in PACKAGES if "." not in name})
