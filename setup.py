"""Builds the native module through CMake and maps ``kernels/<family>`` to ``rlhf_fast.kernels.<family>``.

Everything else about the package is in pyproject.toml. Environment variables, all optional:

    RLHF_FAST_CUDA        AUTO (default: CUDA kernels if nvcc is found), ON (nvcc must be there) or OFF
    RLHF_FAST_CUDA_ARCHS  e.g. "90" or "80-real;90": fewer architectures compile faster
    MAX_JOBS              compiler processes at a time
    CMAKE_ARGS            handed to CMake
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The path of nvcc if the CUDA kernels are to be built, else None; says which, and why, on one line."""
    want = os.environ.get("RLHF_FAST_CUDA", "AUTO").upper()
    if want not in ("AUTO", "ON", "OFF", "1", "0"):
        sys.exit(f"rlhf_fast: RLHF_FAST_CUDA={want} is not one of AUTO, ON, OFF")
    if want in ("OFF", "0"):
        print("rlhf_fast: CUDA kernels OFF (RLHF_FAST_CUDA=OFF)", flush=True)
        return None
    # here and not in CMake, whose find_program looks in places that the user never named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for nvcc in candidates:
        if nvcc and os.access(nvcc, os.X_OK):
            print(f"rlhf_fast: CUDA kernels ON ({nvcc})", flush=True)
            return nvcc
    if want in ("ON", "1"):
        sys.exit("rlhf_fast: RLHF_FAST_CUDA=ON, but there is no nvcc in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda")
    print("rlhf_fast: CUDA kernels OFF (no nvcc found); the CPU and Triton kernels are complete without", flush=True)
    return None


def is_stale(cache: Path) -> bool:
    """Whether a CMake cache names tools that are gone: pip's isolated builds leave paths into a deleted folder."""
    if not cache.exists():
        return False
    entries = dict(line.partition("=")[::2] for line in cache.read_text().splitlines() if "=" in line)
    tools = ("CMAKE_COMMAND:INTERNAL", "CMAKE_MAKE_PROGRAM:FILEPATH", "pybind11_DIR:PATH")
    moved = entries.get("CMAKE_HOME_DIRECTORY:INTERNAL", str(ROOT)) != str(ROOT)
    return moved or any(tool in entries and not os.path.exists(entries[tool]) for tool in tools)


def cmake_arguments(debug: bool) -> list[str]:
    import pybind11

    nvcc = find_nvcc()
    arguments = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DRLHF_FAST_CUDA={'ON' if nvcc else 'OFF'}",
    ]
    if nvcc:
        arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if architectures := os.environ.get("RLHF_FAST_CUDA_ARCHS"):
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
    if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ:
        arguments += ["-G", "Ninja"]
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        if is_stale(build / "CMakeCache.txt"):
            shutil.rmtree(build)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), *cmake_arguments(self.debug)])
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        staged = build / "staged"
        subprocess.check_call(["cmake", "--install", str(build), "--prefix", str(staged)])
        # the file name carries the Python version and platform; in an editable build the target is the source tree
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = staged.glob("_C*")
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)  # at once: a process that has the old module loaded keeps it


if __name__ == "__main__":
    families = find_packages("kernels")
    setup(
        packages=find_packages(include=["rlhf_fast", "rlhf_fast.*"])
        + [f"rlhf_fast.kernels.{name}" for name in families],
        package_dir={f"rlhf_fast.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in families},
        package_data={
            "rlhf_fast": [
                "recipes/*.yaml",
                "rewards/rubrics/*.txt",
                "feedback/constitutions/*.yaml",
                "rewards/suites/*.jsonl",
                "feedback/people/page/*",
            ]
        },
        ext_modules=[Extension("rlhf_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        zip_safe=False,
    )
