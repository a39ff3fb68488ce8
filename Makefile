# Two commands: `make demo` trains a small model on this machine, `make test` runs the tests.
# `make wheel` writes a source distribution and a wheel to dist/.
# PYTEST holds further options of the tests: make test PYTEST=--durations=25
PYTHON ?= python3
VENV ?= .venv
FLOOR ?= .venv-floor
RUN ?= runs/demo
LINEARIZED ?= runs/linearize
TASKS ?= runs/tasks
PY := $(VENV)/bin/python

# what a test of the oldest versions runs: operators in torch and C++, models, transformers' own, training
FLOOR_TESTS := tests/ops/test_properties.py::test_page_is_the_equation \
  tests/ops/test_properties.py::test_compiles_without_a_graph_break \
  tests/ops/test_native.py::test_the_family_is_the_torch_form \
  tests/ops/test_triton.py::test_the_family_is_the_torch_form \
  tests/models/test_models.py::test_save_and_load_are_bit_equal \
  tests/models/test_models.py::test_gradient_checkpointing_gives_the_same_gradients \
  tests/models/test_generation.py::test_cache_changes_nothing \
  tests/models/test_provider.py tests/models/test_accelerate.py tests/models/test_convert.py \
  tests/training/test_cli.py tests/training/test_sharded.py

.PHONY: demo linearize-demo tasks-demo test test-kernels fuzz floor check sanitize kernels docs bench wheel clean

demo: $(VENV)/.ready
	$(PY) -m fla.cli train --config examples/demo.yaml --output_dir $(RUN)

linearize-demo: $(VENV)/.ready
	$(PY) -m fla.cli train --config examples/teacher.yaml --output_dir $(LINEARIZED)/teacher
	$(PY) -m fla.cli linearize $(LINEARIZED)/teacher $(LINEARIZED)/student --config examples/linearize.yaml

tasks-demo: $(VENV)/.ready
	$(PY) -m fla.cli task mqar,parity --output_dir $(TASKS) --model \
	gated_deltanet,gated_deltanet:allow_neg_eigval=true,delta_net,gla,mamba2,rwkv7,transformer

test: $(VENV)/.ready
	$(PY) -m pytest -n 2 $(PYTEST)

test-kernels: $(VENV)/.ready
	$(PY) -m pytest -n 2 -m full_matrix $$(grep -rlwE 'full_matrix|matrix' tests --include='test_*.py') $(PYTEST)

fuzz: $(VENV)/.ready
	$(PY) -m tests.fuzz

floor: $(VENV)/.ready $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -n 2 $(FLOOR_TESTS) $(PYTEST)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

sanitize: $(VENV)/.ready
	scripts/sanitize.sh $(PY)

kernels: $(VENV)/.ready
	$(PY) -m scripts.compile_kernels

docs: $(VENV)/.ready
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.ready
	$(PY) -m benchmarks.ops

# The wheel is built from the source distribution, so every file it needs is in there.
wheel: $(VENV)/.ready
	$(PY) -m build --outdir dist

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard fla/ops/engine/native/src/*)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing packages into $(VENV) (a few minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,test]'
	@touch $@

$(FLOOR)/.ready: pyproject.toml scripts/floor.py
	$(PY) -m venv --clear $(FLOOR)
	$(PY) -m scripts.floor > $(FLOOR)/requirements.txt
	@echo "Installing the oldest versions into $(FLOOR)"
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -r $(FLOOR)/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info
