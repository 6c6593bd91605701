"""Packages, package data and extensions; everything else about the distribution stands in pyproject.toml."""

from setuptools import setup

# Listed by hand. `kernels` at the root is also the import name of another distribution, so discovery, which would
# ship it under that name, must not run; here it is reached through the link dsd_fast/kernels -> ../kernels alone.
PACKAGES = [
    "dsd_fast",
    "dsd_fast.bench",
    "dsd_fast.bench.suites",
    "dsd_fast.bench.suites.mini_card",
    "dsd_fast.cli",
    "dsd_fast.compat",
    "dsd_fast.diffusion",
    "dsd_fast.images",
    "dsd_fast.jobs",
    "dsd_fast.kernels",
    "dsd_fast.kernels.common",
    "dsd_fast.kernels.cross_attention_score",
    "dsd_fast.kernels.token_maps",
    "dsd_fast.matching",
    "dsd_fast.metrics",
    "dsd_fast.models",
    "dsd_fast.models.mini",
    "dsd_fast.reference",
    "dsd_fast.unet",
]

PACKAGE_DATA = {
    "dsd_fast": ["py.typed"],
    "dsd_fast.cli": ["*.css"],
    "dsd_fast.models.mini": ["weights/**/*"],
}

setup(packages=PACKAGES, package_data=PACKAGE_DATA, include_package_data=False)
