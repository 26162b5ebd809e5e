# Everything a clone needs: Python >= 3.11, make, and a package index. Each target makes .venv itself, once.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test alltests lint harness tasks bench speed joint serving methods replay study docs clean

help:           ## this list
	@sed -n 's/^\([a-z]*\): *[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(READY)  ## make .venv with the pinned versions and this package in it

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name yours: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## fine-tune the embedded model on the embedded tasks, score it before and after, merge it
	$(BIN)/tsugiki demo --again

test: lint      ## the linter, then every test: offline, one thread a worker, WORKERS=2
	TSUGIKI_TESTS=$(TSUGIKI_TESTS) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

alltests: lint  ## the tests with every combination of the largest products, of which `test` takes a third; half an hour
	$(MAKE) test TSUGIKI_TESTS=all

lint: $(READY)  ## ruff
	$(BIN)/ruff check src tests scripts benchmarks examples

harness: $(READY)  ## install lm-evaluation-harness (325 MB with what it brings) and run its tests, which are skipped without it
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,eval]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests/test_harness.py $(ARGS)

tasks: $(READY)  ## check 200 rows a task (DATA=the folder above the tasks') against a plain re-computation; an hour. ARGS
	$(BIN)/python scripts/check_tasks.py --data $(DATA) --tasks $(or $(TASKS),boolq ARC-Easy ARC-Challenge openbookqa winogrande) $(ARGS)

bench: $(READY)  ## how much faster a training step is when freed memory is kept
	$(BIN)/python benchmarks/malloc.py

speed: $(READY)  ## tokens/s of LoRA at SmolLM2-135M's shape beside Trainer with PEFT; ARGS, as in benchmarks/train_speed.py
	$(BIN)/python benchmarks/train_speed.py --sides tsugiki trainer --steps 5 --warmup 1 --batch-size 8 $(ARGS)

joint: $(READY)  ## eight jobs trained together beside one after another, on the embedded base and SmolLM2-135M's shape; minutes. ARGS
	$(BIN)/python benchmarks/joint_speed.py $(ARGS)

serving: $(READY)  ## the engine: 16 adapters in a batch beside one and beside PEFT, 200 adapters on 16 slots; then cross-talk, 5,000 requests
	OMP_NUM_THREADS=$(or $(THREADS),2) $(BIN)/python benchmarks/serve_speed.py $(ARGS)
	$(BIN)/python benchmarks/cross_talk.py

methods: $(READY)  ## train every method on SST-2 (DATA=its folder), three seeds; write the table in docs/methods.md. Hours; goes on
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods_sst2.py --data "$(DATA)"
	$(BIN)/python scripts/make_docs.py --sst2

replay: $(READY)  ## the replay study on TinyStories and novels (DATA=folder of both); ~15 minutes, goes on, results in benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/replay_study.py --data "$(DATA)" $(ARGS)

study: $(READY)  ## compare eleven methods on three data sets (DATA=their folder), WORKERS processes; writes docs/study. Hours; goes on
	$(BIN)/python benchmarks/study/prepare.py --data "$(DATA)" --out runs/study-data
	for i in $$(seq $(WORKERS)); do OMP_NUM_THREADS=1 $(BIN)/tsugiki compare --config benchmarks/study/study.yaml $(ARGS) || echo stopped > runs/study-data/failed & done; wait
	@test ! -f runs/study-data/failed || { rm runs/study-data/failed; echo "stopped; make study goes on from here"; exit 1; }
	mkdir -p docs/study
	cp runs/study/results.csv runs/study/results.md runs/study/report.html docs/study/

docs: $(READY)  ## write docs/configuration.md, docs/methods.md and the README's table of methods anew from the code
	$(BIN)/python scripts/make_docs.py

clean:          ## remove caches and build products; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
