# `make demo` and `make test` are all there is to it: both set the environment up first.

VENV ?= .venv
PYTHON ?= $(shell test -x '$(VENV)/bin/python' && echo '$(VENV)/bin/python' || echo python3)

.PHONY: help install demo test lint docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      train a detector on a generated data set, evaluate it, draw its detections'
	@echo 'make test      run the test suite'
	@echo 'make lint      style and types of Python, style of C++ and CUDA; changes nothing'
	@echo 'make docs      the pages as a site with an API reference, in build/site; links checked'
	@echo 'make install   set up the environment $(VENV) (the two above do it themselves)'
	@echo '               PYTHON=/path/to/python  make it with this Python, and use its detectron2 if it has one'
	@echo '               VENV=/path/to/env       use this existing environment, add only what it lacks'
	@echo 'make clean     remove caches and build products (the environment stays: rm -rf $(VENV))'

install:
	@'$(PYTHON)' tools/install_env.py --venv '$(VENV)'

demo: install
	@'$(VENV)/bin/python' tools/demo_quick.py

test: install
	@'$(VENV)/bin/python' -m pytest -q --durations=10 -n auto --maxprocesses=4 --dist=worksteal

# The linters have a small environment of their own, so that their pins never meet yours.
LINT := $(VENV)/lint
$(LINT)/ready: requirements/lint.txt
	@'$(VENV)/bin/python' -m venv --clear '$(LINT)'
	'$(LINT)/bin/python' -m pip install -q --disable-pip-version-check -r requirements/lint.txt
	@touch $@

lint: install
	@$(MAKE) --no-print-directory '$(LINT)/ready'
	'$(LINT)/bin/ruff' check .
	'$(LINT)/bin/ruff' format --check .
	find benchmarks kernels tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
		| xargs '$(LINT)/bin/clang-format' --dry-run -Werror
	'$(LINT)/bin/mypy' --python-executable '$(VENV)/bin/python'

# So has the generator of the site. It reads the package and imports nothing.
DOCS := $(VENV)/docs
PAGES := README.md CHANGELOG.md CONTRIBUTING.md $(wildcard docs/*.md docs/*/*.md docs/images/* docs/benchmarks/*/*.json) \
	$(wildcard kernels/*.md kernels/*/*/*.md) projects/sparse_detr/README.md tests/parity/README.md
$(DOCS)/ready: requirements/docs.txt
	@'$(PYTHON)' -m venv --clear '$(DOCS)'
	'$(DOCS)/bin/python' -m pip install -q --disable-pip-version-check -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/ready
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp --parents $(PAGES) build/docs
	cp docs/site/api.md.in build/docs/api.md
	NO_MKDOCS_2_WARNING=1 '$(DOCS)/bin/mkdocs' build -f docs/site/mkdocs.yml
	@echo 'the site: build/site/index.html'

clean:
	rm -rf build dist projects/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find benchmarks configs kernels projects tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
