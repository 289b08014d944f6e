"""Which packages there are; metadata and lint settings live in pyproject.toml."""

from setuptools import find_packages, setup

NAMES = ("tokenring", "moe", "sparse_attn", "token_reduction", "launch")

setup(
    packages=find_packages(include=[pattern for name in NAMES for pattern in (name, f"{name}.*")]),
    package_data={name: ["py.typed"] for name in NAMES} | {"moe": ["py.typed", "hardware/*.json"]},
)
