"""Builds `lumi._csrc` from csrc/ and installs kernels/ and configs/ as `lumi.kernels` and `lumi.configs`."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    packages=["lumi", "lumi.corpus", "lumi.kernels", "lumi.configs"],
    package_dir={"lumi.kernels": "kernels", "lumi.configs": "configs"},
    package_data={"lumi.configs": ["**/*.json"]},
    ext_modules=[
        Pybind11Extension(
            "lumi._csrc",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
