"""What pyproject.toml cannot say: the folder mapping of triton_kernels, and the compiled part.

The compiled part is optional. Without a C++ compiler the package installs as pure Python and every
op runs on its torch backend. One build switch decides otherwise:

    INTERLACE_EXTENSION=auto      build it if possible (default)
    INTERLACE_EXTENSION=require   fail the installation if it cannot be built
    INTERLACE_EXTENSION=skip      do not try
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MODE = os.environ.get("INTERLACE_EXTENSION", "auto")
if MODE not in ("auto", "require", "skip"):
    sys.exit(f"INTERLACE_EXTENSION is {MODE!r}; expected 'auto', 'require' or 'skip'")


def _paths(pattern: str) -> list[str]:
    # setuptools wants paths relative to setup.py
    return sorted(path.as_posix() for path in Path().glob(pattern))


def _extensions() -> list[Extension]:
    if MODE == "skip":
        return []
    # a build requirement, so present under build isolation; absent only with --no-build-isolation
    try:
        import pybind11
    except ModuleNotFoundError:
        if MODE == "require":
            raise
        _say_skipped("pybind11 is not installed")
        return []
    extension = Extension(
        "interlace._C",
        sources=["csrc/bindings.cpp", *_paths("csrc/cpu/*.cpp")],
        depends=_paths("csrc/**/*.h"),
        include_dirs=["csrc", pybind11.get_include()],
        # no -march=native: the kernels choose their instruction set when they run.
        # no -ffast-math: NaN and infinity have to travel through
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
        language="c++",
        optional=MODE == "auto",
    )
    return [extension]


def _say_skipped(reason: str) -> None:
    sys.stderr.write(
        f"interlace: installing without compiled kernels ({reason}); "
        "every op runs on its torch backend\n"
    )


class BuildExtension(build_ext):
    """Builds the compiled part; says in one line when it cannot."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or say why not."""
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            if MODE == "require":
                raise
            _say_skipped(f"{ext.name} did not compile: {error}")


setup(
    packages=[
        *find_packages(include=["interlace", "interlace.*"]),
        "interlace.triton_kernels",
    ],
    package_dir={"interlace": "interlace", "interlace.triton_kernels": "triton_kernels"},
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildExtension},
)
