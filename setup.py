"""Builds `lumi._csrc` from csrc/ and installs kernels/ and configs/ as `lumi.kernels` and `lumi.configs`."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# No -march=native: a wheel must run on other machines than the one that built it. Threads are std::thread, hence -pthread.
if sys.platform == "win32":
    compile_args, link_args = ["/O2"], []
elif sys.platform == "darwin":
    compile_args, link_args = ["-O3"], []
else:
    compile_args, link_args = ["-O3", "-pthread"], ["-pthread"]

setup(
    packages=["lumi", "lumi.corpus", "lumi.evaluation", "lumi.kernels", "lumi.configs"],
    package_dir={"lumi.kernels": "kernels", "lumi.configs": "configs"},
    package_data={"lumi.configs": ["**/*.json"]},
    ext_modules=[
        Pybind11Extension(
            "lumi._csrc",
            sorted(path.as_posix() for path in Path("csrc").glob("*.cpp")),
            depends=sorted(path.as_posix() for path in Path("csrc").glob("*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
