# make demo | test | test-newest | check | bench | bench-all | zoo | xla: each makes its environment on first use.
.DEFAULT_GOAL := help
.PHONY: help demo test test-newest check bench bench-all zoo xla clean

# The first interpreter >= 3.11 that runs and can make an environment; set PYTHON to choose another.
FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if "$$p" -c '$(FITS)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
PY := .venv/bin/python
SOURCES := lightning_accel examples benchmarks tests docs/tree.py

help:
	@head -n 1 Makefile

# An editable install copies the plugin to where Hydra looks, so that it is installed anew when it changes.
PLUGIN := $(wildcard lightning_accel/_hydra_plugins/*.py)

.venv/.stamp: pyproject.toml constraints.txt $(PLUGIN)
	@test -n "$(PYTHON)" || { echo "make: no python3 >= 3.11 with venv and ensurepip found" >&2; exit 1; }
	test -x $(PY) || "$(PYTHON)" -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,examples]'
	@touch $@

demo: .venv/.stamp
	$(PY) examples/demo.py

test: .venv/.stamp
	$(PY) -m pytest -n 2 --dist worksteal

# What a plain `pip install` brings today: no constraints, so the newest torch that pip finds. Gigabytes.
.venv-newest/.stamp: pyproject.toml $(PLUGIN)
	test -x .venv-newest/bin/python || "$(PYTHON)" -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[dev,examples]'
	@touch $@

test-newest: .venv-newest/.stamp
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

check: .venv/.stamp
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_house.py

# What training and inference gain, in under ten minutes on two quiet cores; and then all the others.
SPEED := overhead.py "train_speed.py --cases mlp gpt_d256 cnn_32px" tune_zoo.py infer_speed.py warm_start.py memory_budget.py
OTHERS := "train_speed.py --cases gpt_d512 cnn_64px" prune_accuracy.py compensation_cost.py prune_latency.py prune_selectors.py \
	resume_after_prune.py autocast_cache.py distill_accuracy.py distill_cost.py

bench: .venv/.stamp
	@for script in $(SPEED); do echo "== $$script"; $(PY) benchmarks/$$script || exit 1; done

bench-all: bench
	@for script in $(OTHERS); do echo "== $$script"; $(PY) benchmarks/$$script || exit 1; done

# Apart from the rest: torchvision beside a torch of another build breaks `import lightning`.
.venv-zoo/.stamp: pyproject.toml constraints.txt
	test -x .venv-zoo/bin/python || "$(PYTHON)" -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet -c constraints.txt -e '.[zoo]'
	@touch $@

zoo: .venv-zoo/.stamp
	.venv-zoo/bin/python benchmarks/prune_zoo.py --only 'timm/*' 'torch*' 'transformers/*'
	.venv-zoo/bin/python benchmarks/prune_zoo.py --ratio 0.3 --only \
		'diffusers/*' 'segmentation*' 'monai/*' 'vit_pytorch/*' 'x_transformers/*'

# XLA on the CPU. torch_xla ended with 2.9.0 and needs that torch, which this package refuses elsewhere
# (CVE-2026-24747, of files that are no checkpoints of ours): hence --no-deps. Seven gigabytes, as PyPI's torch
# brings CUDA's libraries along. torch_xla looks for libpython, which pyenv and conda keep to themselves.
.venv-xla/.stamp: pyproject.toml constraints.txt $(PLUGIN)
	@test -n "$(PYTHON)" || { echo "make: no python3 >= 3.11 with venv and ensurepip found" >&2; exit 1; }
	test -x .venv-xla/bin/python || "$(PYTHON)" -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet 'torch==2.9.0' 'torch_xla==2.9.0'
	grep -v '^torch==' constraints.txt > .venv-xla/constraints.txt
	.venv-xla/bin/python -m pip install --quiet -c .venv-xla/constraints.txt \
		lightning hydra-core torch-pruning torchmetrics wandb rich pytest pytest-timeout hatchling
	.venv-xla/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

xla: .venv-xla/.stamp
	LD_LIBRARY_PATH="$$(.venv-xla/bin/python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))'):$$LD_LIBRARY_PATH" \
		PJRT_DEVICE=CPU .venv-xla/bin/python -m pytest -m xla tests/test_xla.py tests/test_precision_xla.py

clean:
	rm -rf .venv .venv-newest .venv-zoo .venv-xla build dist outputs multirun .pytest_cache .mypy_cache .ruff_cache .hypothesis
