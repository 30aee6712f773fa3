# Installs into .venv and runs from there; nothing outside this folder is touched.
#
#   make demo DEMO_ARGS="--help"      extra arguments for `pretrain demo`
#   make test TEST_ARGS="-k schema"   extra arguments for pytest
#   make test TEST_WORKERS=0          in one process, which shows what tests print (TEST_ARGS=-s); 2 is made for two cores
#   make install PYTHON=python3.12    another Python (3.10 to 3.13), when .venv is first made
#   make install TORCH=torch          another torch than the one pinned in constraints.txt: any requirement that pip
#                                     understands, such as torch==2.12.1 or the path of a wheel. On a GPU machine take
#                                     the build that fits its driver; what is installed then stays. (`make clean` first.)
PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
FAULTS_ARGS ?=
BENCH_ARGS ?=
WHEELS ?= wheelhouse

VENV := .venv
INSTALLED := $(VENV)/installed
TORCH_RANGE := $(shell sed -n 's/^ *"\(torch>=[^"]*\)",.*/\1/p' pyproject.toml)
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check

# The stamp names the folder it was made in: scripts in a virtual environment do not survive a move, nor a vanished Python.
ifneq ($(shell test -x $(VENV)/bin/python && cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif
.PHONY: help demo test test-long faults faults-sample cluster-tests bench install wheelhouse lint types clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## everything end to end on this machine, in minutes: text, shards, training, a kill, a resume
	@$(VENV)/bin/pretrain demo $(DEMO_ARGS)

test: $(INSTALLED) ## all tests, but for long ones and samples of campaigns
	@$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadscope -m "not sample and not long" $(TEST_ARGS)

test-long: $(INSTALLED) ## tests that take a quarter of a minute and more, each about one thing alone
	@$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) -m long $(TEST_ARGS)

faults-sample: $(INSTALLED) ## a seeded sample of every fault campaign, another one each time (some minutes)
	@$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) -m sample $(TEST_ARGS)

# One campaign after the other; each prints a line for each kind of fault, and the rest runs where one fails.
CAMPAIGNS := data damage save_points kills_of_runs numbers hangs matrix keys hostile mutations
faults: $(INSTALLED) ## builds and runs killed, hung, cut, filled up and flipped in every way (hours; FAULTS_ARGS="--sample 0.1")
	@failed=""; for campaign in $(CAMPAIGNS); do echo "== $$campaign"; \
		$(VENV)/bin/python -m tests.faults.$$campaign $(FAULTS_ARGS) || failed="$$failed $$campaign"; done; \
		test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

cluster-tests: $(INSTALLED) ## a real Slurm, and hosts that this machine plays (root; fetches slurm-wlm, munge and openssh-server where they are missing; half an hour)
	@$(VENV)/bin/python -m pytest -m cluster tests/faults $(TEST_ARGS)

bench: $(INSTALLED) ## speed and memory of data, reading, training steps and checkpoints, beside their peers (90 minutes; BENCH_ARGS=--quick: 15)
	@$(VENV)/bin/python benchmarks/data.py $(BENCH_ARGS)
	@$(VENV)/bin/python benchmarks/loader.py $(BENCH_ARGS)
	@$(VENV)/bin/python benchmarks/step.py $(BENCH_ARGS)
	@$(VENV)/bin/python benchmarks/loss.py $(BENCH_ARGS)
	@$(VENV)/bin/python benchmarks/checkpoint.py $(BENCH_ARGS)
	@$(VENV)/bin/python benchmarks/metrics.py $(BENCH_ARGS)

install: $(INSTALLED) ## makes .venv, once for each change of pyproject.toml or constraints.txt

# Of this machine's Python and processor, and of the torch build that TORCH names. The last line proves that nothing is missing.
wheelhouse: $(INSTALLED) ## every pinned wheel, and this project's, in WHEELS=wheelhouse: for clusters without a network
	@rm -rf build && mkdir -p "$(WHEELS)" && grep -v '^torch==' constraints.txt >"$(WHEELS)/constraints.txt"
	@echo "[wheelhouse] $(TORCH), the project and its other dependencies (minutes)"
	@$(VENV)/bin/python -m pip wheel -q --disable-pip-version-check -w "$(WHEELS)" -c "$(WHEELS)/constraints.txt" "$(TORCH)" '.[development,ray-jobs]'
	@rm -rf build
	@$(PIP) --isolated --dry-run --ignore-installed --no-index --find-links "$(WHEELS)" 'pretrain[development,ray-jobs]'
	@echo "[wheelhouse] $$(ls "$(WHEELS)" | grep -c 'whl$$') wheels, $$(du -sh "$(WHEELS)" | cut -f1), in $(WHEELS)"

lint: $(INSTALLED) ## ruff: rules and formatting
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(INSTALLED) ## the type checker
	@$(VENV)/bin/basedpyright

clean: ## removes .venv and caches; runs/ and datasets/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and written last, so that a half install never looks complete.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "make: found no $(PYTHON); install Python 3.10 to 3.13, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); wanted Python 3.10 to 3.13. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version 2>/dev/null | grep -qF "$(CURDIR)/$(VENV)/" || { \
		echo "[install] virtual environment in $(VENV) ($$($(PYTHON) -V))"; $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) 'pip>=23.1'
	@echo "[install] $(TORCH) (the largest part)"
	@$(PIP) "$(TORCH)" 2>$(VENV)/torch.log || { cat $(VENV)/torch.log >&2; grep -q 'No matching distribution' $(VENV)/torch.log || exit 1; \
		echo "[install] $(TORCH) cannot be had for this Python: letting pip choose $(TORCH_RANGE)"; $(PIP) "$(TORCH_RANGE)"; }
	@{ grep -v '^torch==' constraints.txt; \
		$(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } >$(VENV)/constraints.txt
	@echo "[install] the project and its other dependencies"
	@$(PIP) -e '.[development]' -c $(VENV)/constraints.txt
	@printf '%s' "$(CURDIR)" >$@
	@echo "[install] done"
