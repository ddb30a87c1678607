# install: a virtual environment with everything.  serve: a shipped model on 127.0.0.1:8000 (model=demo_landmark, demo_cca: others).
# test, slow, check, bench: see CONTRIBUTING.md.  ARGS passes overrides: make serve ARGS="server.port=9000"

# The first that runs and is new enough: a name on the PATH may be a version manager's shim without a Python behind it.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := torch==2.13.0

.PHONY: install test slow soak kernels check format bench serve clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' \
		|| { echo "error: longctx needs Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# Two at a time (tests/conftest.py): cluster tests wait more than they compute. Threads that wait for each other must not spin meanwhile.
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

slow: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m 'slow and not gpu and not multihost' --numprocesses 2 --dist loadfile $(ARGS)

# Random requests under random faults, about half an hour: every answer exact or a typed error, nothing left behind.
soak: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m tests.cluster.soak $(ARGS)

# Triton's kernels run in its interpreter. Triton takes over a gigabyte: it stays out of the environment that users get.
# The interpreter makes loop bounds of arrays with one element, which newer NumPy refuses.
KERNELS := tests/parallel/test_triton_merge.py tests/longctx/methods/test_method_kernels.py

kernels: install
	test -d .venv/triton || $(BIN)/python -m pip install --quiet --no-deps --target .venv/triton triton 'numpy<2.4'
	PYTHONPATH=.venv/triton $(BIN)/python -m pytest $(KERNELS) $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.serving --quick $(ARGS)

serve: install
	$(BIN)/longctx serve $(if $(model),model=$(model)) $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
