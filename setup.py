"""Packages, package data and extensions; everything else about the distribution stands in pyproject.toml."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

# Listed by hand. `kernels` at the root is also the import name of another distribution, so discovery, which would
# ship it under that name, must not run; here it is reached through the link dsd_fast/kernels -> ../kernels alone.
PACKAGES = [
    "dsd_fast",
    "dsd_fast.bench",
    "dsd_fast.bench.suites",
    "dsd_fast.bench.suites.feature_quality",
    "dsd_fast.bench.suites.mini_card",
    "dsd_fast.cli",
    "dsd_fast.cli.demo",
    "dsd_fast.cli.evaluate",
    "dsd_fast.cli.features",
    "dsd_fast.cli.fit",
    "dsd_fast.cli.gate",
    "dsd_fast.cli.info",
    "dsd_fast.cli.match",
    "dsd_fast.compat",
    "dsd_fast.diffusion",
    "dsd_fast.features",
    "dsd_fast.features.gate",
    "dsd_fast.images",
    "dsd_fast.jobs",
    "dsd_fast.kernels",
    "dsd_fast.kernels.add_layer_norm",
    "dsd_fast.kernels.common",
    "dsd_fast.kernels.cross_attention_score",
    "dsd_fast.kernels.geglu",
    "dsd_fast.kernels.group_norm_silu",
    "dsd_fast.kernels.noise_latents",
    "dsd_fast.kernels.pack_features",
    "dsd_fast.kernels.token_maps",
    "dsd_fast.matching",
    "dsd_fast.matching.datasets",
    "dsd_fast.matching.fitting",
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

# sm_80 runs on all of Ampere and Ada, sm_90 on Hopper; what is newer compiles the PTX when it loads.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]


def extensions() -> list[Extension]:
    """The compiled libraries. They need torch's headers, so a build without torch leaves them out, and says so."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        print("dsd_fast: torch is not in the build environment; the operators will run as plain PyTorch. Install torch")
        print("dsd_fast: first and build with --no-build-isolation to get the compiled ones.")
        return []
    cuda = _cuda(cpp_extension)
    return [_cpu(cpp_extension)] if cuda is None else [_cpu(cpp_extension), cuda]


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


def _cuda(cpp_extension: Any) -> Extension | None:
    """The CUDA library, where torch is one for CUDA and nvcc is of the same major version; None elsewhere."""
    import torch

    if os.environ.get("DSD_FAST_BUILD_CUDA") == "0":
        print("dsd_fast: without the CUDA library, as DSD_FAST_BUILD_CUDA=0 asks")
        return None
    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        print("dsd_fast: without the CUDA library: it needs a torch for CUDA, and nvcc")
        return None
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc.exists() else ""
    release = re.search(r"release (\d+)\.", told)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = f"nvcc {release[1]}" if release else "no nvcc"
        print(f"dsd_fast: without the CUDA library: torch is for CUDA {torch.version.cuda}, {nvcc.parent} has {found}")
        return None
    return cpp_extension.CUDAExtension(
        "dsd_fast._cuda",
        sources=sorted(str(file) for kind in ("cu", "cpp") for file in Path("csrc").glob(f"*/cuda/*.{kind}")),
        depends=sorted(str(file) for kind in ("h", "cuh") for file in Path("csrc").glob(f"*/cuda/**/*.{kind}")),
        include_dirs=[str(Path("csrc").resolve())],  # the compiler runs in another folder
        # USE_CUDA shows the CUDA part of the stable ABI's C functions.
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


def _commands(libraries: list[Extension]) -> dict[str, Any]:
    """Torch's own build command where there is CUDA, which it calls nvcc for; the ordinary one builds the rest."""
    if not any(library.name == "dsd_fast._cuda" for library in libraries):
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


LIBRARIES = extensions()

setup(
    packages=PACKAGES,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    ext_modules=LIBRARIES,
    cmdclass=_commands(LIBRARIES),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
