# Every target installs what it needs into .venv. Nothing has to be there but Python 3.11+, make and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 22

$(VENV)/.core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.all: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[ray,privacy,text,vision,test,dev]'
	@touch $@ $(VENV)/.core

install: $(VENV)/.core  ## install fedsim into .venv

demo: $(VENV)/.core  ## FedAvg on real handwritten digits, 100 clients
	$(BIN)/fedsim run experiments/quickstart.toml

test: $(VENV)/.all  ## everything that must pass before a change lands
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal

test-slow: $(VENV)/.all  ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.all  ## format, lint, types, import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

reproduce-fedhyper: $(VENV)/.core  ## FedHyper's claims, judged
	$(BIN)/fedsim data get fashion_mnist
	$(BIN)/fedsim data get shakespeare
	$(BIN)/fedsim reproduce experiments/fedhyper/claims.toml

reproduce-fzoos: $(VENV)/.core  ## FZooS's claims: quadratics, attacks and metrics, by queries alone
	$(BIN)/fedsim data get heart_disease
	$(BIN)/fedsim reproduce experiments/fzoos/claims.toml

reproduce-ffa-lora: $(VENV)/.all  ## FFA-LoRA's claims: teacher-student tasks, then MiniLM on two sets of texts
	$(BIN)/fedsim reproduce experiments/ffa_lora/claims.toml
	for name in minilm fine_foods newsgroups; do $(BIN)/fedsim data get $$name || exit 1; done
	$(BIN)/fedsim reproduce experiments/ffa_lora/foods/claims.toml
	$(BIN)/fedsim reproduce experiments/ffa_lora/foods_private/claims.toml
	$(BIN)/fedsim reproduce experiments/ffa_lora/newsgroups/claims.toml

reproduce-ffa-lora-quick: $(VENV)/.all  ## the same for a round or two of one seed: does it run?
	$(BIN)/fedsim reproduce experiments/ffa_lora/claims.toml --quick
	for name in minilm fine_foods newsgroups; do $(BIN)/fedsim data get $$name || exit 1; done
	$(BIN)/fedsim reproduce experiments/ffa_lora/foods/claims.toml --quick
	$(BIN)/fedsim reproduce experiments/ffa_lora/foods_private/claims.toml --quick
	$(BIN)/fedsim reproduce experiments/ffa_lora/newsgroups/claims.toml --quick

reproduce-privacy: $(VENV)/.all  ## accuracy against epsilon on MNIST, judged
	$(BIN)/fedsim data get mnist
	$(BIN)/fedsim reproduce experiments/privacy/claims.toml

reproduce-hyperfl: $(VENV)/.all  ## HyperFL's and MIP's claims, and what attackers reconstruct, judged
	$(BIN)/fedsim data get fashion_mnist
	$(BIN)/fedsim reproduce experiments/hyperfl/claims.toml
	$(BIN)/fedsim reproduce experiments/hyperfl/common_start/claims.toml
	for name in cifar10_test efficientnet_lite0 newsgroups minilm; do $(BIN)/fedsim data get $$name || exit 1; done
	$(BIN)/fedsim reproduce experiments/hyperfl/cifar/claims.toml
	$(BIN)/fedsim reproduce experiments/hyperfl/lpm/claims.toml

reproduce-hyperfl-quick: $(VENV)/.all  ## the same for two rounds of one seed: does it run?
	$(BIN)/fedsim data get fashion_mnist
	$(BIN)/fedsim reproduce experiments/hyperfl/claims.toml --quick
	$(BIN)/fedsim reproduce experiments/hyperfl/common_start/claims.toml --quick
	for name in cifar10_test efficientnet_lite0 newsgroups minilm; do $(BIN)/fedsim data get $$name || exit 1; done
	$(BIN)/fedsim reproduce experiments/hyperfl/cifar/claims.toml --quick
	$(BIN)/fedsim reproduce experiments/hyperfl/lpm/claims.toml --quick

bench: $(VENV)/.all  ## time the engine on this machine
	$(BIN)/fedsim bench

clean:  ## forget the installation
	rm -rf $(VENV) build *.egg-info

.PHONY: reproduce-ffa-lora reproduce-ffa-lora-quick help install demo test test-slow check bench clean reproduce-fedhyper reproduce-privacy reproduce-hyperfl reproduce-hyperfl-quick reproduce-fzoos
