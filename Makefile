# `make demo` and `make test` are all there is to it: both set the environment up first.

VENV ?= .venv
PYTHON ?= $(shell test -x '$(VENV)/bin/python' && echo '$(VENV)/bin/python' || echo python3)

.PHONY: help install demo test clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      train a detector on a generated data set, evaluate it, draw its detections'
	@echo 'make test      run the test suite'
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

clean:
	rm -rf build dist projects/*.egg-info .pytest_cache .ruff_cache
	find kernels configs projects tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
