.PHONY: demo demo-reasoning chaos layouts lab-quick lab test lint format clean
.DEFAULT_GOAL := help

READY := .venv/.ready
# Processes that run tests; each may start a server and four ranks, so their number does not follow the machine's cores.
JOBS ?= 2

help:
	@echo "make demo      set everything up and run the demo: a tiny MoE learns arithmetic with VESPO (about 5 minutes)"
	@echo "make demo-reasoning  the same with a task of reasoning_gym: no data files, no reward to write (about 5 minutes)"
	@echo "make chaos     the demo while its server, a trainer rank, the reward and the disk fail (about 5 minutes)"
	@echo "make layouts   compare parallel layouts (TP, PP, EP, DP and more) with a float64 reference (about 5 minutes)"
	@echo "make lab-quick compare 8 methods on stale samples: table, plots, page in runs/lab-quick (about 10 minutes)"
	@echo "make lab       all methods, mismatches and learning rates, in runs/lab-full (hours; goes on where it stopped)"
	@echo "make test      set everything up and run all tests"
	@echo "make lint      ruff and mypy"

$(READY): constraints.txt tools/requirements-cpu.txt tools/setup_env.sh setup.py
	tools/setup_env.sh .venv
	touch $@

demo: $(READY)
	examples/digits_cpu/run.sh

demo-reasoning: $(READY)
	examples/reasoning_cpu/run.sh $(ARGS)

chaos: $(READY)
	examples/chaos_cpu/run.sh $(ARGS)

layouts: $(READY)
	examples/layouts_cpu/run.sh $(ARGS)

lab-quick: $(READY)
	examples/staleness_lab/run.sh quick $(ARGS)

lab: $(READY)
	examples/staleness_lab/run.sh full $(ARGS)

test: $(READY)
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(READY)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv runs build *.egg-info
