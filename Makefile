# `make demo` and `make test` create .venv and install on first use, at the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEWEST := .venv-newest
LOWEST := .venv-lowest
WEB := build/web
# programs of the tests in the browser that are not here
ABSENT = $(if $(wildcard /usr/bin/chromium /usr/bin/chromium-browser),,chromium) $(if $(shell command -v npm),,nodejs npm)
INSTALL := -m pip install --quiet --disable-pip-version-check
# a thread per process: small tensors gain nothing from more, and two processes share two cores
SUITE := -m pytest -n 2 --dist loadfile -m "not slow" -rs --durations=10

.PHONY: demo test test-targets test-web test-lowest constraints lint clean

demo: $(INSTALLED)
	$(BIN)/samdistill demo --out $(OUT)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)

# the export formats that install beside this package; LiteRT needs an environment of its own
test-targets: $(VENV)/.targets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/deployment/test_targets.py tests/deployment/test_workarounds.py tests/test_endings.py

$(VENV)/.targets: $(INSTALLED)
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev,openvino,executorch,coreml]'
	touch $@

# the page in the browser: its types, its arithmetic, and its answers on exports of the sandbox's models
test-web: $(INSTALLED) $(WEB)/.installed
	$(WEB)/node_modules/.bin/tsc -p tests/web/tsconfig.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/web/arithmetic.py $(WEB)
	OMP_NUM_THREADS=1 $(BIN)/python tests/web/answers.py $(WEB)
	node --test tests/web/arithmetic.test.mjs
	PYTHON=$(abspath $(BIN)/python) node --test tests/web/page.test.mjs

$(WEB)/.installed: tests/web/package.json tests/web/package-lock.json
	$(if $(strip $(ABSENT)),apt-get update -qq && apt-get install -y -qq --no-install-recommends $(ABSENT))
	mkdir -p $(WEB)
	cp tests/web/package.json tests/web/package-lock.json $(WEB)/
	cd $(WEB) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# the suite on the lowest versions that pyproject.toml declares
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(SUITE)

# the newest versions that the ranges of pyproject.toml allow become those that everyone installs
constraints:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) -e '.[dev]'
	$(NEWEST)/bin/python tools/versions.py installed > $(NEWEST)/constraints.txt
	mv $(NEWEST)/constraints.txt constraints.txt
	rm -rf $(NEWEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

$(LOWEST)/.installed: pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tools/versions.py lowest > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python $(INSTALL) -c $(LOWEST)/lowest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) $(WEB) runs
