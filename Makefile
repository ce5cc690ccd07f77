# Every target works alone on a fresh checkout: it makes .venv, installs what it needs, runs.
# More arguments go in ARGS: make test ARGS="-k share_norm", make demo ARGS="--model vit --steps 50".

# TORCH=2.11.0 takes another torch, in an environment of its own: make test TORCH=2.11.0

PYTHON ?= python3
TORCH ?=
VENV := .venv$(if $(TORCH),-$(TORCH))
PY := $(VENV)/bin/python
ARGS ?=

.PHONY: help demo test test-ops test-networks test-architectures check notebooks bench pareto train fidelity first-call traffic cubins kernels report

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## train a small model under stock Inductor and under lowmem, and compare
	$(PY) -m graphopt demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests, on several cores; ARGS="-n 0" runs them in one process
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadscope $(ARGS)

test-ops: $(VENV)/.installed-dev ## train through every operator of PyTorch's own database, under Inductor too; an hour
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist load --long tests/breadth/test_operators.py $(ARGS)

test-networks: $(VENV)/.installed-dev ## train 2,000 random networks
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist load --long tests/breadth/test_random_networks.py $(ARGS)

test-architectures: $(VENV)/.installed-dev ## train 137 architectures of transformers
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist load --long tests/architectures $(ARGS)

check: $(VENV)/.installed-dev ## lint, format, types, sizes of files, figures and plots of the documents
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) scripts/check_sizes.py
	$(PY) benchmarks/report.py --check

notebooks: $(VENV)/.installed-dev ## execute every notebook; the results go to build/notebooks
	$(PY) scripts/run_notebooks.py $(ARGS)

bench: $(VENV)/.installed-dev ## measure six transformer blocks into benchmarks/results
	$(PY) benchmarks/blocks.py $(ARGS)

pareto: $(VENV)/.installed-dev ## measure bytes against time and error
	$(PY) benchmarks/pareto.py $(ARGS)

train: $(VENV)/.installed-dev ## measure steps of whole models: bytes, peak memory, time, gradients
	$(PY) benchmarks/train.py $(ARGS)

fidelity: $(VENV)/.installed-dev ## fine-tune on real data under each method, five seeds: held-out losses
	$(PY) benchmarks/fidelity.py $(ARGS)

first-call: $(VENV)/.installed-dev ## time the first call of models of twelve layers, which compiles
	$(PY) benchmarks/first_call.py $(ARGS)

traffic: $(VENV)/.installed-dev ## count kernels and bytes of the CUDA code of whole blocks, without a GPU
	$(PY) benchmarks/block_traffic.py $(ARGS)

cubins: $(VENV)/.installed-dev ## build every Triton kernel without a GPU: registers, spills
	$(PY) benchmarks/cubins.py $(ARGS)

kernels: $(VENV)/.installed-dev ## on a GPU: errors and GB/s of every Triton kernel
	$(PY) benchmarks/kernels.py $(ARGS)

report: $(VENV)/.installed-dev ## write the figures of benchmarks/results into the README and docs, draw the plots
	$(PY) benchmarks/report.py

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch in the same command as the rest and always under a pin: another one would be gigabytes. Another version has a
# triton and setuptools of its own, and the interpreter of triton 3.6 fails under numpy 2.4
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	sed -e '' $(if $(TORCH),-e '/^\(triton\|setuptools\)==/d' -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^numpy==.*/numpy<2.4/') constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$*]'
	@touch $@
