# Each target sets up everything it needs on a new machine: Python 3.11+ and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SAMPLE := tests/test_clone.py tests/test_readme.py tests/test_convert.py tests/test_attach.py tests/test_release.py

.PHONY: demo test lint types soak links coverage bench zoo zoo-others dist docs notebooks extras clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## convert a BatchNorm ResNet, look at its signal, train both, compare (about 5 minutes)
	$(BIN)/nfnets demo

test: $(STAMP) extras lint types  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

soak: $(STAMP) extras  ## what `make test` samples, at length: whole grids, long tests, 200 kills of training runs, 1,000 random networks
	OMP_NUM_THREADS=1 NFNETS_KILLS=200 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_train_kills.py
	OMP_NUM_THREADS=1 NFNETS_GRID=all $(BIN)/python -m pytest -n 2 --dist worksteal
	OMP_NUM_THREADS=1 NFNETS_GRAPHS=1000 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_random_graphs*.py
	$(BIN)/python tests/links.py

links: $(STAMP)  ## ask every external link of the documentation; skips where no server can be reached
	$(BIN)/python tests/links.py

coverage: $(STAMP) extras  ## the share of branches that the tests take, by package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=json:build/coverage.json
	$(BIN)/python tests/branches.py build/coverage.json

bench: $(STAMP)  ## speed as ratios against timm, PyPI lsuv and torch, both sides timed in turn
	$(BIN)/python -m pip install --disable-pip-version-check --quiet lsuv
	$(BIN)/python -m benchmarks.run

zoo: $(STAMP)  ## every BatchNorm model of timm and torchvision by every method, into docs/ (hours; resumes)
	$(BIN)/python -m benchmarks.zoo --publish

zoo-others: $(STAMP) .others/.installed  ## nets of some 25 other libraries, converted and folded, into docs/ (hours; resumes)
	$(BIN)/python -m benchmarks.zoo --others --publish

# Without what they ask for: most pin an older torch or NumPy. The folder comes last in the search path.
.others/.installed: benchmarks/zoo/others/requirements.txt $(STAMP)
	rm -rf .others
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps --target .others -r $<
	@touch $@

dist: $(STAMP)  ## sdist and wheel in dist/, checked; some tests from the unpacked sdist
	rm -rf dist build/sdist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m pip install --disable-pip-version-check --quiet twine
	$(BIN)/python -m twine check --strict dist/*
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && OMP_NUM_THREADS=1 PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q $(SAMPLE)

docs: $(STAMP)  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo wrote build/site/index.html

notebooks: $(STAMP)  ## run the notebooks anew, in place, with what they print and draw (about 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace --NotebookClient.record_timing=False notebooks/*.ipynb

# A browser and a data set that some tests use; they skip with a reason where these cannot be had.
extras:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		for package in chromium dataset-fashion-mnist; do \
			dpkg -s $$package >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq $$package; } \
				>/dev/null 2>&1 || echo "no $$package: tests that need it will skip"; \
		done; \
	fi

lint: $(STAMP)  ## ruff, style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is spread over three folders, so types are checked on what a wheel installs.
types: $(STAMP)  ## pyright on the installed package
	@rm -rf build
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target build/typed .
	@echo '{"include": ["nfnets"]}' > build/typed/pyrightconfig.json
	$(BIN)/pyright --pythonpath $(BIN)/python --project build/typed

clean:  ## remove what was built (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
