# Two commands do everything on a fresh machine with Python 3.11 or newer: make quickstart, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test thorough check browser docs dist timm-tests clean

quickstart: $(VENV)/usable ## train, test and explain a small model on bundled images
	$(BIN)/debiformer quickstart

test: check browser ## style, types and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 10

thorough: $(VENV)/ready ## further cases of kernels and compiled models, a minute each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m thorough

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile

# One that is there, or playwright's own, or as root that of the system.
browser: $(VENV)/ready ## a Chromium for the tests of the explorer
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null || timeout 300 $(BIN)/playwright install chromium \
	|| (test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install -y chromium > /dev/null) \
	|| echo "No Chromium could be installed: the tests of the explorer in a browser are skipped."

docs: $(VENV)/ready ## the pages, into site/
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

dist: $(VENV)/ready ## the source archive and the wheel, built from it, in dist/; the quickstart runs in an empty environment
	rm -rf dist
	$(BIN)/python -m build
	PYTHON=$(PYTHON) scripts/try_dist.sh dist/*.tar.gz dist/*.whl

timm-tests: $(VENV)/ready ## timm's own tests on our presets: make timm-tests TIMM=path/to/a/timm/checkout
	cd $(TIMM) && $(abspath $(BIN))/python -m pytest tests/test_models.py -p debiformer -k "(debiformer or biformer) and not torchscript"

$(VENV)/usable: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[train,explain,app]"
	touch $@

$(VENV)/ready: $(VENV)/usable
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) dist site runs
