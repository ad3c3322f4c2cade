VENV := .venv
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed
SOURCES := build/sources
# Gemma's and NVIDIA's weights cannot be shipped, so the demo converts a small pair with random ones.
QUESTION := What is in this picture?

.PHONY: demo test test-real-size clean

demo: $(SETUP)
	rm -rf $(SOURCES)
	$(PYTHON) tests/tiny_sources.py $(SOURCES)
	$(PYTHON) convert_weights.py --vae $(SOURCES)/pipeline --gemma $(SOURCES)/gemma --output build/theworld --image-size 256 --overwrite
	@echo
	@echo "The weights are RANDOM (a small VAE, a small Gemma): this shows the path, and the answer means nothing."
	@echo
	$(PYTHON) demo.py assets/grace_hopper.jpg "$(QUESTION)" --model build/theworld

test: $(SETUP) build/transformers-tests
	$(PYTHON) -m pytest

# A pair of real size with random weights: 5.4 GB written, converted, loaded. Needs 12 GB of disk, and some minutes.
test-real-size: $(SETUP)
	$(PYTHON) -m pytest tests/test_real_size.py -m real_size -s

$(SETUP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# The common model tests that every architecture in transformers passes; only its source distribution has them.
build/transformers-tests: $(SETUP)
	rm -rf build/sdist $@
	$(PYTHON) -m pip download --quiet --no-deps --no-binary transformers --constraint constraints.txt --dest build/sdist transformers
	mkdir -p $@
	tar --extract --gzip --file build/sdist/transformers-*.tar.gz --directory $@ --strip-components 2 --wildcards "transformers-*/tests/*.py"

clean:
	rm -rf $(VENV) build *.egg-info
