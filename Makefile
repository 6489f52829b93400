# make demo       install, evaluate pruning on the embedded model, print the table, write a page with pictures
# make test       install, run the fast tests offline
# make test-slow  the tests that need minutes
# make lint       ruff and mypy --strict
# make build      wheel and sdist into dist/

PYTHON ?= python3
OUT    ?= runs/demo
# Questions of the demo: the same ones for every method and every budget.
LIMIT  ?= 150
KEEP   ?= 0.5,0.25,0.1,0.05

BIN    := .venv/bin
STAMP  := .venv/installed
PIP_INSTALL = $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check
# One thread a worker for tests; nothing here needs the network once the packages are in.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-slow lint format build clean help
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
	@$(OFFLINE) $(BIN)/vprune eval -m method=full,random,attention keep=$(KEEP) limit=$(LIMIT) out=$(OUT)
	@$(OFFLINE) $(BIN)/vprune eval -m method=attention_max recycle=grid size_aware=true keep=$(KEEP) limit=$(LIMIT) out=$(OUT)
	@$(OFFLINE) $(BIN)/vprune report $(OUT)

test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
