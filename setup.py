# SPDX-License-Identifier: Apache-2.0
"""The one extension module; everything else is in pyproject.toml.

One abi3 module serves Python 3.11 and later, but for free-threaded builds, which have no stable ABI yet.
"""

import sysconfig
from glob import glob

import numpy
from setuptools import Extension, setup

LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "combiner._core",
            ["combiner/_core.c", "combiner/_xla.c", *sorted(glob("csrc/*.c"))],
            # XLA's one C header is in third_party, so that what is built anywhere serves JAX, needing nothing of it.
            include_dirs=["csrc", "third_party", numpy.get_include()],
            depends=[*glob("csrc/*.h"), "combiner/_xla.h", "third_party/xla/ffi/api/c_api.h"],
            define_macros=[
                ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
                ("BUILD_NUMPY_VERSION", f'"{numpy.__version__}"'),
                *([("Py_LIMITED_API", "0x030B0000")] if LIMITED else []),
            ],
            # The instruction sets beyond the baseline are chosen by pragmas in their own files. Only PyInit__core and
            # cmb_get_num_threads are exported.
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden"],
            libraries=["m", "pthread"],
            py_limited_api=LIMITED,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
