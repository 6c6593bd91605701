"""Packages, package data and extensions; everything else about the distribution stands in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Not setuptools' discovery: `kernels` at the root is also the import name of another distribution, and it would ship it
# under that name; here it is reached through the link dsd_fast/kernels -> ../kernels alone.
TOPS = ("dsd_fast", "dsd_fast/kernels")
FOLDERS = {Path(top) for top in TOPS} | {file.parent for top in TOPS for file in Path(top).rglob("*.py")}
PACKAGES = sorted(".".join(folder.parts) for folder in FOLDERS)

PACKAGE_DATA = {
    "dsd_fast": ["py.typed"],
    "dsd_fast.cli": ["*.css"],
    "dsd_fast.models.mini": ["weights/**/*"],
}

# The oldest LibTorch whose stable ABI the library uses; one binary runs with it and with all later ones.
STABLE_ABI = "0x020a000000000000"

# A sum of products may be one instruction: every compiler's default but clang's for loops.
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-g0"]

PLAIN = "dsd_fast: without the compiled operators; plain PyTorch runs in their place, slower."


class BuildOptional(build_ext):
    """Builds the compiled operators, or, where the compiler is missing or fails, leaves them out and says so once."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            print(f"{PLAIN} The compiler failed: {error}")
            # What an earlier build left is not what the sources say.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def extensions() -> list[Extension]:
    """The compiled operators. They need torch's headers, so a build without torch leaves them out, and says so."""
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        print(f"{PLAIN} Torch is not in the build environment: install it first, build with --no-build-isolation.")
        return []
    cpu = Extension(
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
        optional=True,
    )
    return [cpu]


setup(
    packages=PACKAGES,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOptional},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
