# Two commands: `make demo` trains a small model on this machine, `make test` runs the tests.
# `make wheel` writes a source distribution and a wheel to dist/.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
LINEARIZED ?= runs/linearize
TASKS ?= runs/tasks
PY := $(VENV)/bin/python

.PHONY: demo linearize-demo tasks-demo test check sanitize kernels docs bench wheel clean

demo: $(VENV)/.ready
	$(PY) -m fla.cli train --config examples/demo.yaml --output_dir $(RUN)

linearize-demo: $(VENV)/.ready
	$(PY) -m fla.cli train --config examples/teacher.yaml --output_dir $(LINEARIZED)/teacher
	$(PY) -m fla.cli linearize $(LINEARIZED)/teacher $(LINEARIZED)/student --config examples/linearize.yaml

tasks-demo: $(VENV)/.ready
	$(PY) -m fla.cli task mqar,parity --output_dir $(TASKS) --model \
	gated_deltanet,gated_deltanet:allow_neg_eigval=true,delta_net,gla,mamba2,rwkv7,transformer

test: $(VENV)/.ready
	$(PY) -m pytest -n 2

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

clean:
	rm -rf $(VENV) build dist *.egg-info
