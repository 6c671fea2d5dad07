PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow gpu lint bench docs clean

# torch first: the rest of the requirements must not choose another build of it. setuptools tells of every editable
# installation that folders of the working directory may be imported in its place, which is meant here.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/sqcompile demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'

slow: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu'

# compiling the kernels takes most of the time, so it pays to have more processes than GPUs
gpu: $(VENV)/ready
	$(BIN)/python -m pytest -n 8 --dist worksteal -m gpu

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	$(BIN)/python -m sqcompile.bench cpu

$(VENV)/docs: $(VENV)/ready
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# docstrings are read from the sources, and nothing is fetched; the variable silences a notice of the theme about itself
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
