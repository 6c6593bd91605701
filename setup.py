"""Packages, package data and extensions; everything else about the distribution stands in pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import Extension, setup

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

# The oldest LibTorch whose stable ABI the libraries use; one binary runs with it and with all later ones.
STABLE_ABI = "0x020a000000000000"

# A sum of products may be one instruction: every compiler's default but clang's for loops.
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-g0"]


def extensions() -> list[Extension]:
    """The compiled libraries. They need torch's headers, so a build without torch leaves them out, and says so."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        print("dsd_fast: torch is not in the build environment; the operators will run as plain PyTorch. Install torch")
        print("dsd_fast: first and build with --no-build-isolation to get the compiled ones.")
        return []
    return [_cpu(cpp_extension)]


def _cpu(cpp_extension: Any) -> Extension:
    return Extension(
        "dsd_fast._cpu",
        sources=sorted(map(str, Path("csrc").glob("*/cpu/*.cpp"))),
        depends=sorted(map(str, Path("csrc").glob("*/cpu/*.h"))),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,
        language="c++",
    )


setup(
    packages=PACKAGES,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
