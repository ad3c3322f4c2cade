VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest

.PHONY: demo test test-oldest test-real-size train evaluate new-kind harness benchmark benchmark-training clean

demo: $(VENV)/.installed
	$(PYTHON) demo.py assets/scene.png "What shape is the blue object?" "How many circles are there?" "Where is the yellow star from the blue star?" --save demo.png

test: $(VENV)/.installed build/suite/transformers_tests
	$(PYTHON) -m pytest

# The same tests on the oldest versions supported; transformers' own suite is that of the newest.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --ignore tests/test_transformers_common.py

# A pair of real size with random weights: 5.3 GB written, converted, loaded. Needs 12 GB of disk and 10 GB of memory.
test-real-size: $(VENV)/.installed
	$(PYTHON) -m pytest tests/test_real_size.py -m real_size -s

# The bundled model from nothing: hours on 2 cores. It goes on where it was interrupted.
train: $(VENV)/.installed
	$(PYTHON) -m recipe.train

# What it answers about scenes it never saw, and without its world tokens; needs what `train` left in build/recipe.
evaluate: $(VENV)/.installed
	$(PYTHON) -m recipe.evaluate

# LoRA teaches the bundled model a kind of question that it was not trained on: ten minutes.
new-kind: $(VENV)/.installed
	$(PYTHON) -m recipe.new_kind

# Held-out scenes by lm-eval, in an environment of its own.
harness: .venv-harness/.installed
	.venv-harness/bin/python -m recipe.harness
	.venv-harness/bin/lm_eval --model hf-multimodal --model_args pretrained=.,trust_remote_code=True --include_path recipe --tasks theworld_scenes --apply_chat_template --batch_size 20 --device cpu

.venv-harness/.installed: constraints.txt pyproject.toml
	python3 -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[train,recipe]" lm-eval==0.4.13
	touch $@

# Speed and memory against diffusers and Gemma alone: a quarter of an hour on 2 cores with nothing else on them.
benchmark: $(VENV)/.installed
	$(PYTHON) -m benchmarks

# Training from latents against training from pixels: two minutes.
benchmark-training: $(VENV)/.installed
	$(PYTHON) -m benchmarks.training

$(VENV)/.installed: constraints.txt pyproject.toml
$(OLDEST)/.installed: constraints-oldest.txt pyproject.toml
%/.installed:
	python3 -m venv $*
	$*/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) --editable ".[test]"
	touch $@

# The common model tests that every architecture in transformers passes; only its source distribution has them.
build/suite/transformers_tests: $(VENV)/.installed
	rm -rf build/sdist $@
	$(PYTHON) -m pip download --quiet --no-deps --no-binary transformers --constraint constraints.txt --dest build/sdist transformers
	mkdir -p $@
	tar --extract --gzip --file build/sdist/transformers-*.tar.gz --directory $@ --strip-components 2 --wildcards "transformers-*/tests/*.py"

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info
