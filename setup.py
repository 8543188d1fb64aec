# SPDX-License-Identifier: Apache-2.0
"""The one extension module; everything else is in pyproject.toml.

One abi3 module serves Python 3.11 and later, but for free-threaded builds, which have no stable ABI yet. It is compiled
by GCC 12 or later, or clang.
"""

import os
import re
import shutil
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
# Python's own flags ask for debug information, nine tenths of the module's size. Whoever wants it sets CFLAGS=-g.
DEBUG = [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]
VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
# The module, where it is compiled already: for another system, by systems/systems.mk.
MODULE = os.environ.get("COMBINER_MODULE", "")
# Where the repository is, such as https://host/owner/name: the release workflow knows, and says it.
REPOSITORY = os.environ.get("COMBINER_REPOSITORY", "")


def readme() -> str:
    """README.md for a package index, which knows no relative links: they lead to the release's files."""
    files = {"!": f"{REPOSITORY}/raw/v{VERSION}/", "": f"{REPOSITORY}/blob/v{VERSION}/"}
    text = Path("README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    return re.sub(
        r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)",
        lambda link: f"{link[1]}{link[2]}({files[link[1]]}{link[3]})",
        text,
    )


def urls() -> dict[str, str]:
    """The project's pages, as far as they are known."""
    known = {"Paper": "https://arxiv.org/abs/2107.05768"}
    if REPOSITORY:
        known |= {
            "Source": REPOSITORY,
            "Documentation": f"{REPOSITORY}/tree/v{VERSION}/docs",
            "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
            "Issues": f"{REPOSITORY}/issues",
        }
    return known


class ParallelBuild(build_ext):
    """Compiles the files of a module side by side; setuptools' own `parallel` is about several modules."""

    def build_extension(self, extension: Extension) -> None:
        if MODULE:
            folder = Path(self.get_ext_fullpath(extension.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(MODULE, folder)
            return
        if os.name != "posix":
            raise SystemExit("combiner's module for Windows is compiled by clang, on Linux: `make windows-wheel`")
        jobs = self.parallel or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        compile_files = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options) -> list[str]:
            print(f"compiling {len(sources)} C files, {jobs} at a time: about a minute of processor time", flush=True)
            with ThreadPoolExecutor(jobs) as pool:
                return list(chain(*pool.map(lambda source: compile_files([source], **options), sources)))

        self.compiler.compile = compile_side_by_side
        try:
            super().build_extension(extension)
        finally:
            self.compiler.compile = compile_files


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=urls(),
    ext_modules=[
        Extension(
            "combiner._core",
            sorted([*glob("combiner/binding/*.c"), *glob("csrc/*/*.c")]),
            # XLA's one C header is in third_party, so that what is built anywhere serves JAX, needing nothing of it.
            include_dirs=["csrc", "third_party", numpy.get_include()],
            depends=[
                *glob("csrc/*.h"),
                *glob("csrc/*/*.h"),
                *glob("combiner/binding/*.h"),
                *glob("third_party/xla/*/*/*.h"),
            ],
            define_macros=[
                ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
                ("BUILD_NUMPY_VERSION", f'"{numpy.__version__}"'),
                *([("Py_LIMITED_API", "0x030B0000")] if LIMITED else []),
            ],
            # The instruction sets beyond the baseline are chosen by pragmas in their own files. Only PyInit__core and
            # cmb_get_num_threads are exported.
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", *DEBUG],
            libraries=["m", "pthread"],
            py_limited_api=LIMITED,
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
