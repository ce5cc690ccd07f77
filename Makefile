# Every target works alone on a fresh checkout: it makes .venv, installs what it needs, runs.
# More arguments go in ARGS: make test ARGS="-k share_norm", make demo ARGS="--model vit --steps 50".

PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=

.PHONY: help demo test check notebooks bench pareto train fidelity traffic cubins kernels report

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed-demo ## train a small model under stock Inductor and under lowmem, and compare
	$(PY) -m graphopt demo $(ARGS)

test: .venv/.installed-dev ## run the tests
	$(PY) -m pytest $(ARGS)

check: .venv/.installed-dev ## lint, format, types, sizes of files, figures and plots of the documents
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) scripts/check_sizes.py
	$(PY) benchmarks/report.py --check

notebooks: .venv/.installed-dev ## execute every notebook; the results go to build/notebooks
	$(PY) scripts/run_notebooks.py $(ARGS)

bench: .venv/.installed-dev ## measure six transformer blocks into benchmarks/results
	$(PY) benchmarks/blocks.py $(ARGS)

pareto: .venv/.installed-dev ## measure bytes against time and error
	$(PY) benchmarks/pareto.py $(ARGS)

train: .venv/.installed-dev ## measure steps of whole models: bytes, peak memory, time, gradients
	$(PY) benchmarks/train.py $(ARGS)

fidelity: .venv/.installed-dev ## fine-tune on real data under each method, five seeds: held-out losses
	$(PY) benchmarks/fidelity.py $(ARGS)

traffic: .venv/.installed-dev ## count kernels and bytes of the CUDA code of whole blocks, without a GPU
	$(PY) benchmarks/block_traffic.py $(ARGS)

cubins: .venv/.installed-dev ## build every Triton kernel without a GPU: registers, spills
	$(PY) benchmarks/cubins.py $(ARGS)

kernels: .venv/.installed-dev ## on a GPU: errors and GB/s of every Triton kernel
	$(PY) benchmarks/kernels.py $(ARGS)

report: .venv/.installed-dev ## write the figures of benchmarks/results into the README and docs, draw the plots
	$(PY) benchmarks/report.py

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch in the same command as the rest and always under its pin: another one would be gigabytes
.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
