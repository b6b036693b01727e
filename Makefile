# Two commands: `make serve` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What serving needs, and what tests, training and benchmarks need beside it.
SERVE := $(VENV)/.serve-installed
TEST := $(VENV)/.test-installed

.PHONY: serve test kernels-emulated chaos soak demo model lint protos clean fuzz

serve: $(SERVE)
	$(BIN)/baton serve

demo: $(SERVE)
	$(BIN)/baton demo

test: $(TEST)
	$(BIN)/python -m pytest

# What the C++ kernels compute on every instruction set that can be run or emulated here (docs/architecture/exactness.md).
kernels-emulated: $(TEST)
	$(BIN)/python -m tests.kernels

# Minutes: worker processes are killed, stopped and cut off at every step of a transfer. SEED=2 for another run.
chaos: $(TEST)
	PYTHONPATH=tests $(BIN)/python -m chaos --seed $(or $(SEED),1) --requests $(or $(REQUESTS),1000)

# Thousands of small simulated clusters under random faults; a seed that fails is printed with the command that shows it again.
soak: $(TEST)
	$(BIN)/python -m cluster.sim.soak --seeds $(or $(SEEDS),1:3001)

# What the fuzzers of `make test` do in seconds, for longer: messages of peers, lanes, bodies, the described API, entries of the store, tier files, checkpoints.
FUZZERS := $(foreach name,hostile_records hostile_peers sealed_lanes api_fuzz api_document hostile_redis cluster_membership kv_tier_files hostile_checkpoints,tests/unit/test_$(name).py)
fuzz: $(TEST)
	BATON_FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(BIN)/python -m pytest --timeout 7200 $(FUZZERS)

lint: $(TEST)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy cluster router workers && $(LINT_BENCH)

# The programs of bench/ are looked at only for names and arguments that the product no longer has.
LINT_BENCH = $(BIN)/mypy --cache-dir .mypy_cache/bench --ignore-missing-imports $(UNCHECKED:%=--disable-error-code %) bench/*.py
UNCHECKED = arg-type assignment dict-item misc no-untyped-call return-value unused-ignore

model: $(TEST)
	$(BIN)/python models/train.py --output models/ernie-4.5-tiny

protos: $(TEST)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/workers/pb/worker.proto proto/workers/pb/group.proto

# Installing compiles the C++ (hatch_build.py), with zig from PyPI where there is no compiler.
$(SERVE): pyproject.toml hatch_build.py workers/machine/native_build.py \
		workers/model/native/build.py workers/kv_memory/native/build.py \
		$(wildcard workers/model/native/source/* workers/kv_memory/native/source/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[demo]"
	touch $@

$(TEST): $(SERVE)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	$(BIN)/python -m tests.kube.kube_tools
	touch $@

clean:
	rm -rf $(VENV)
