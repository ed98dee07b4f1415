# make demo   set up .venv and run the demonstration: train, classify, draw feature maps (CPU)
# make test   set up .venv and run the tests
# make lint   ruff, check only
# make clean  remove what the other targets made, .venv included

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTEST_FLAGS ?= -n 2 -q

.PHONY: demo test lint clean install

install: $(STAMP)

# Installs again only when what is installed has changed.
$(STAMP): pyproject.toml setup.py $(wildcard kernels/cpu/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(PY) tools/demo.py

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) build dist runs *.egg-info vim/_kernels
	find vim -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
