# The README's commands. `make demo` and `make test` set up a virtual environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint gpu clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch triton
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]' ruff
	touch $@

demo: $(VENV)/.installed
	$(BIN)/fqt demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine with a GPU, with the torch, Triton, pytest and hypothesis of the python3 at hand; no network. All parts run
# even if one fails: the GPU may be gone tomorrow. `make gpu PARTS=check` is one group, `PARTS="doctor optim"` two parts.
gpu: export PYTHONPATH := .:kernels:bench
gpu:
	@$(PYTHON) -m fqt_bench.hardware $(PARTS)

clean:
	rm -rf $(VENV) build *.egg-info
