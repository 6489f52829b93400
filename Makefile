# make demo       install, evaluate pruning on the embedded model, print the table, write a page with pictures
# make test       install, run the fast tests offline
# make test-slow  the tests that need minutes
# make test-matrix  the tests with every transformers version of MATRIX; one alone: make test-matrix-5.12.0
# make test-sample  some of the tests with the oldest version of MATRIX, where that can be installed
# make compatibility  the tests of exactness, and docs/compatibility.md from what they found
# make lint       ruff and mypy --strict
# make bench-tables  figures and tables from the measurements in kernels/bench/results
# make build      wheel and sdist into dist/

PYTHON ?= python3
OUT    ?= runs/demo
# Questions of the demo: the same ones for every method and every budget.
LIMIT  ?= 150
KEEP   ?= 0.5,0.25,0.1,0.05

# Versions of transformers (`newest`: what pip resolves now), and what is run with each. TORCH=2.11.0 make test-matrix
# puts that torch into the overlays too (some 5 GB each); without it, torch is the one in .venv.
MATRIX ?= 5.12.0 5.17.0 newest
TORCH  ?=
PYTEST_ARGS ?= tests/exactness tests/kernels
OLDEST := $(firstword $(MATRIX))
SAMPLE ?= $(addprefix tests/exactness/test_,assumptions.py families.py family_turns.py static.py restore.py)

BIN    := .venv/bin
STAMP  := .venv/installed
PIP_INSTALL = $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check
# One thread a worker for tests; nothing here needs the network once the packages are in.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-slow test-matrix test-sample compatibility lint format bench-tables build clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

.venv: $(STAMP)

# `venv --without-pip` and the pip that is there: works where Python comes without ensurepip, too.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	@echo "installing vprune and its packages into .venv (about 5 GB with torch; a few minutes the first time)"
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(OFFLINE) $(BIN)/vprune eval -m method=full,random,attention,learned keep=$(KEEP) limit=$(LIMIT) out=$(OUT)
	@$(OFFLINE) $(BIN)/vprune eval -m method=attention_max recycle=grid size_aware=true keep=$(KEEP) limit=$(LIMIT) out=$(OUT)
	@$(OFFLINE) $(BIN)/vprune report $(OUT)

test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -m slow

compatibility: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/exactness -n 2 --dist loadgroup --compatibility docs/compatibility.md

# A version that the package index does not give at this moment is no fault of ours: said aloud, and passed.
test-sample: $(STAMP)
	@if $(MAKE) --no-print-directory .matrix/$(OLDEST)/installed; \
	then $(MAKE) --no-print-directory test-matrix-$(OLDEST) PYTEST_ARGS="$(SAMPLE)"; \
	else echo "NOT TESTED with transformers $(OLDEST): it could not be installed (see above); the newest version was tested"; fi

test-matrix: $(addprefix test-matrix-,$(MATRIX))

# Run side by side (`make -j`, or one a job of a CI system): every version has a folder of its own.
test-matrix-%: .matrix/%$(if $(TORCH),-torch$(TORCH))/installed
	@PYTHONPATH=$(<D) $(BIN)/python -c 'import sys, torch, transformers; from pathlib import Path; \
	got, asked = transformers.__version__, "$*"; print("transformers", got, "torch", torch.__version__, flush=True); \
	here = Path(transformers.__file__).is_relative_to(Path("$(<D)").resolve()); \
	torched = not "$(TORCH)" or torch.__version__.split("+")[0] == "$(TORCH)"; \
	sys.exit(0 if here and torched and asked in (got, "newest") else f"asked for transformers {asked} torch $(TORCH)")'
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=$(<D) $(BIN)/python -m pytest -n 2 --dist loadgroup -p no:cacheprovider $(PYTEST_ARGS)

# What transformers asks for is read from its own metadata, less what .venv shares with every version (torch and numpy).
.PRECIOUS: .matrix/%/installed
.matrix/%/installed: $(STAMP)
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(PIP_INSTALL) --target $(@D) --no-deps $(if $(filter newest%,$*),transformers,transformers==$(firstword $(subst -torch, ,$*)))
	@PYTHONPATH=$(@D) $(BIN)/python -c 'from importlib.metadata import requires; \
	print("\n".join(one.split(";")[0].strip() for one in requires("transformers") \
	if "extra ==" not in one and not one.startswith(("numpy", "torch"))))' > $(@D)/needs.txt
	@$(PIP_INSTALL) --target $(@D) --upgrade -c constraints.txt $(if $(TORCH),torch==$(TORCH) torchvision) -r $(@D)/needs.txt
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-tables: $(STAMP)
	$(BIN)/python kernels/bench/plots.py --readme README.md

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
