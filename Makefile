VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
SOURCES := build/sources
MODEL := build/theworld

.PHONY: demo test test-oldest test-real-size clean

# Gemma's and NVIDIA's weights cannot be shipped, so the demo converts a small pair with random ones.
demo: $(VENV)/.installed
	$(PYTHON) tests/tiny_sources.py $(SOURCES)
	$(PYTHON) convert_weights.py --vae $(SOURCES)/pipeline --gemma $(SOURCES)/gemma --output $(MODEL) --overwrite
	@echo
	@echo "The weights are RANDOM (a small VAE, a small Gemma): this shows the path, and the answer means nothing."
	@echo
	$(PYTHON) demo.py assets/grace_hopper.jpg "What is in this picture?" --model $(MODEL)

test: $(VENV)/.installed build/suite/transformers_tests
	$(PYTHON) -m pytest

# The same tests on the oldest versions supported; transformers' own suite is that of the newest.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest --ignore tests/test_transformers_common.py

# A pair of real size with random weights: 5.3 GB written, converted, loaded. Needs 12 GB of disk and 10 GB of memory.
test-real-size: $(VENV)/.installed
	$(PYTHON) -m pytest tests/test_real_size.py -m real_size -s

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
