# The two commands: `make book` and `make test`. They need Python >= 3.11 with venv, make and git.
# To choose the Python: PYTHON=python3.12 make book

PY := .venv/bin/python

.PHONY: help book test newest environment architecture figure bench gpu address clean
.DEFAULT_GOAL := help

help:
	@echo 'make book     make .venv, run every notebook, build the book, print where it is'
	@echo 'make test     make .venv, then lint, format check, type check and all tests'
	@echo 'make newest   without the pins: import, core tests, one decode with newest versions'
	@echo 'make bench    measure the solvers'
	@echo 'make gpu      measure solver and decoder on a GPU, with the Python of that machine'
	@echo 'make architecture  draw the folders and their imports into CONTRIBUTING.md'
	@echo 'make figure   draw the figure of the README'
	@echo 'make address  write the public address of pyproject.toml into README and CITATION'
	@echo 'make clean    remove what these made here: .venv, the built book, the caches'

book: environment
	$(PY) -m qstar_book fetch
	$(PY) -m qstar_book run
	$(PY) -m qstar_book pages

test: environment
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses logical --dist worksteal

newest: environment
	.ci/newest

environment:
	@.ci/environment

bench: environment
	$(PY) -m qstar_book record solver

# On a machine with a GPU, torch, transformers and SciPy; no environment is made.
gpu:
	PYTHONPATH=.:book $(or $(PYTHON),python3) -m qstar_book record accelerator \
		--out $(or $(OUT),build/accelerator.json)

architecture: environment
	$(PY) .ci/architecture.py

figure: environment
	$(PY) .ci/figure.py

address: environment
	$(PY) .ci/address.py

clean:
	rm -rf .venv build book/_build book/chapters .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find qstar book tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +
