"""What pyproject.toml cannot say: the folder mapping of triton_kernels, and the compiled part.

The compiled part, interlace._C, is optional. Without a C++ compiler the package installs as pure
Python and every op runs on its torch backend; without nvcc it holds the CPU kernels alone. Two
build switches decide otherwise:

    INTERLACE_EXTENSION=auto      build it if possible (default)
    INTERLACE_EXTENSION=require   fail the installation if it cannot be built
    INTERLACE_EXTENSION=skip      do not try

    INTERLACE_BUILD_CUDA=auto     with the CUDA kernels where nvcc is found (default)
    INTERLACE_BUILD_CUDA=1        fail the installation if they cannot be built
    INTERLACE_BUILD_CUDA=0        without them

CXX, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME and MAX_JOBS are obeyed as usual.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

# machine code for these, and PTX of the newest that nvcc knows for what comes after: so none with
# features of one generation alone ("90a"), which no later one takes
ARCHITECTURES = ("80", "89", "90", "100", "120")


def _switch(name: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name, "auto")
    if value not in values:
        listed = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
        sys.exit(f"{name} is {value!r}; expected {listed}")
    return value


EXTENSION = _switch("INTERLACE_EXTENSION", ("auto", "require", "skip"))
CUDA = _switch("INTERLACE_BUILD_CUDA", ("auto", "1", "0"))
if EXTENSION == "skip" and CUDA == "1":
    sys.exit("INTERLACE_EXTENSION=skip builds nothing, but INTERLACE_BUILD_CUDA=1 asks for CUDA")


def _say(text: str) -> None:
    sys.stderr.write(f"interlace: {text}\n")


def _sources(pattern: str) -> list[str]:
    # setuptools wants paths relative to setup.py
    return sorted(path.as_posix() for path in Path().glob(pattern))


def _find_nvcc() -> Path | None:
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None and os.environ.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return Path(found) if found else None


class Toolkit:
    """A CUDA toolkit: its compiler, the code it can generate, its static runtime."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        # nvcc may be a wrapper somewhere else; it knows best where it looks
        command = [str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        top = next(
            (
                line.removeprefix("#$ TOP=")
                for line in told.splitlines()
                if line.startswith("#$ TOP=")
            ),
            None,
        )
        self.root = Path(top or nvcc.parent.parent).resolve()
        self.libraries = next(
            (
                self.root / name
                for name in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib")
                if (self.root / name / "libcudart_static.a").exists()
            ),
            None,
        )

    def why_not(self) -> str | None:
        """Say why it cannot be used; None if it can."""
        if self.libraries is None:
            return f"{self.root} has no libcudart_static.a"
        if not self.architectures():
            return f"{self.nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}"
        return None

    def architectures(self) -> list[str]:
        """Those of ARCHITECTURES that it can generate code for."""
        command = [str(self.nvcc), "--list-gpu-code"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return [each for each in ARCHITECTURES if f"sm_{each}" in listed]

    def flags(self) -> list[str]:
        """Flags that select what code is generated."""
        known = self.architectures()
        flags = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in known]
        return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def _toolkit() -> Toolkit | None:
    if CUDA == "0":
        return None
    nvcc = _find_nvcc()
    toolkit = Toolkit(nvcc) if nvcc else None
    reason = toolkit.why_not() if toolkit else "nvcc is not on PATH"
    if reason is None:
        return toolkit
    if CUDA == "1":
        sys.exit(f"INTERLACE_BUILD_CUDA=1, but {reason}")
    _say(f"installing without CUDA kernels ({reason})")
    return None


def _quoted(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildExtension(build_ext):
    """Builds the compiled part with ninja, in parallel; says in one line when it cannot."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or say why not."""
        toolkit = _toolkit()
        try:
            try:
                self._build(ext, toolkit)
            except CCompilerError as error:
                if toolkit is None or CUDA == "1":
                    raise
                _say(f"installing without CUDA kernels ({error})")
                self._build(ext, None)
        except (CCompilerError, ModuleNotFoundError) as error:
            if EXTENSION == "require" or CUDA == "1":
                raise
            _say(
                f"installing without compiled kernels ({error}); every op runs on its torch backend"
            )

    def _build(self, ext: Extension, toolkit: Toolkit | None) -> None:
        # build requirements, so present under build isolation; absent only without it
        import ninja
        import pybind11

        folder = Path(self.build_temp).resolve() / ("cpu" if toolkit is None else "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [
            "csrc",
            pybind11.get_include(),
            sysconfig.get_path("include"),
            sysconfig.get_path("platinclude"),
        ]
        (folder / "build.ninja").write_text(_rules(ext, toolkit, folder, target, includes))
        jobs = os.environ.get("MAX_JOBS")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]
        command += ["-j", jobs] if jobs else []
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(result.stdout + result.stderr)
        if result.returncode != 0:
            raise CCompilerError(f"{ext.name} did not compile")


def _rules(
    ext: Extension, toolkit: Toolkit | None, folder: Path, target: Path, includes: list[str]
) -> str:
    """The text of build.ninja."""
    apple = sys.platform == "darwin"
    include = " ".join(f"-I{_quoted(Path(path).resolve())}" for path in dict.fromkeys(includes))
    # no -march=native: the kernels choose their instruction set when they run.
    # no -ffast-math: NaN and infinity have to travel through
    cxx = "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -pthread -Wno-psabi"
    shared = "-bundle -undefined dynamic_lookup" if apple else "-shared -pthread -ldl"
    env = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
    jobs = os.environ.get("MAX_JOBS")
    lines = [
        f"cxx = {os.environ.get('CXX') or 'c++'}",
        f"cxxflags = {cxx} {include} {env['CXXFLAGS']}",
        f"ldflags = {shared} {env['LDFLAGS']}",
    ]
    compile_rule = ["  deps = gcc", "  depfile = $out.d"]
    objects = dict.fromkeys(ext.sources, "cxx")
    if toolkit is not None:
        objects |= dict.fromkeys(_sources("csrc/cuda/*.cu"), "nvcc")
        # its value is what `interlace doctor` says
        built = ", ".join(f"sm_{each}" for each in toolkit.architectures())
        lines[1] += f" '-DINTERLACE_CUDA=\"{built}\"' -I{_quoted(toolkit.root / 'include')}"
        lines[2] += f" -L{_quoted(toolkit.libraries)} -lcudart_static -ldl -lrt"
        host = "-fPIC,-fvisibility=hidden,-pthread"
        lines += [
            f"nvcc = {_quoted(toolkit.nvcc)}",
            # as many architectures of a file at once as there are processors
            f"nvccflags = -std=c++17 -O3 -Xcompiler={host} -cudart=static --threads={jobs or 0} "
            f"-diag-suppress=177 {include} {' '.join(toolkit.flags())}",
            "rule nvcc",
            "  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out",
            *compile_rule,
        ]
    lines += [
        "rule cxx",
        "  command = $cxx $cxxflags -MD -MF $out.d -c $in -o $out",
        *compile_rule,
        "rule link",
        "  command = $cxx $in -o $out $ldflags",
    ]
    built = []
    for source, rule in objects.items():
        built.append(_quoted(folder / f"{source.replace('/', '.')}.o"))
        lines.append(f"build {built[-1]}: {rule} {_quoted(Path(source).resolve())}")
    lines.append(f"build {_quoted(target)}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


# package -> source folder, for those that lie beside `interlace`
BESIDE = {"interlace.triton_kernels": "triton_kernels", "interlace.microbenchmarks": "bench/micro"}

setup(
    packages=[
        *find_packages(include=["interlace", "interlace.*"]),
        *BESIDE,
        "interlace.microbenchmarks.cases",
    ],
    package_dir={"interlace": "interlace", **BESIDE},
    ext_modules=[]
    if EXTENSION == "skip"
    else [
        Extension(
            "interlace._C",
            sources=["csrc/bindings.cpp", *_sources("csrc/cpu/*.cpp")],
            depends=[*_sources("csrc/**/*.h"), *_sources("csrc/**/*.cu*")],
            optional=EXTENSION == "auto",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
