# The two commands of the README. Each creates or reuses .venv; nothing outside the clone is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt

DEMO_CONFIG := configs/demo/mask-rcnn_r50_fpn_bnet5_shapes.py
DEMO_DIR := work_dirs/demo

PRETRAIN_CONFIG := configs/demo/resnet50_bnet5_shapes-cls.py
PRETRAIN_DIR := work_dirs/pretrain

# What `make reproduce` trains: cpu, or gpu for a machine that has one.
PRESET ?= cpu

# Processes that share the tests: a number, or auto for one per core. Each takes up to 2 GB of memory.
JOBS ?= auto --maxprocesses=4

# Threads that spin for long while they wait cost a factor of ten where something else uses a core.
export GOMP_SPINCOUNT ?= 10000

# The second environment, with compiled mmcv: of MMCV_WHEEL=path/to/mmcv-....whl, or built from source.
COMPILED := .venv-compiled
COMPILED_STAMP := $(COMPILED)/.installed-$(notdir $(MMCV_WHEEL))
COMPILED_PIP := $(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c requirements/constraints.txt
COMPILED_TESTS := $(addprefix tests/,compat/test_mmcv_ops.py compat/test_compiled_ops.py compat/test_ops_choice.py \
	compat/test_ap_of_ops.py test_every_family_and_norm.py deploy/test_detectors.py \
	models/test_legacy.py::test_pooled_regions_are_the_legacy_ones_from_the_smallest_roi_on \
	models/test_legacy.py::test_a_whole_detector_finds_what_the_legacy_code_would \
	cli/test_train_and_test.py::test_mixed_precision_trains_on_a_cpu \
	cli/test_train_and_test.py::test_the_stock_tools_resume_and_test_a_run_of_ours)
ifdef MMCV_WHEEL
ifeq ($(wildcard $(MMCV_WHEEL)),)
$(error MMCV_WHEEL=$(MMCV_WHEEL): there is no such file)
endif
endif
HAS_OPS := $(COMPILED)/bin/python -c 'import torch, mmcv._ext'

.PHONY: help install data demo data-cls pretrain reproduce test test-compiled bench asan docs lint clean clean-all

help:
	@echo 'make demo   install, generate shapes, train a small Mask R-CNN with BNET-5, test it, draw a picture sheet'
	@echo 'make pretrain  install, generate shapes-cls, train the demo'"'"'s backbone as a classifier, print its top-1'
	@echo 'make reproduce [PRESET=gpu]  the papers'"'"' claims in miniature: some hours of two cores (docs/reproduce.md)'
	@echo 'make test   the whole test suite'
	@echo 'make test-compiled [MMCV_WHEEL=mmcv-....whl]  what calls ops of mmcv, with compiled ones, in .venv-compiled'
	@echo 'make bench  what each norm costs beside batch norm: layers, convolutions, Faster R-CNN (docs/benchmark.md)'
	@echo 'make asan   the tests of the C kernel under AddressSanitizer and UBSan (needs gcc)'
	@echo 'make docs   run every command of the documentation (CONTRIBUTING.md)'
	@echo 'make lint   ruff: style and format'
	@echo 'make install  the environment in .venv, versions from requirements/constraints.txt'
	@echo 'make data   the generated data set of the demo, in data/shapes'
	@echo 'make data-cls  the generated data set of make pretrain, in data/shapes-cls'
	@echo 'make clean  delete what is made again: build products, caches, data/shapes*. Trained runs stay'
	@echo 'make clean-all  ... and, after asking, work_dirs with every trained run in it, .venv and .venv-compiled'
	@echo 'make test and make lint add their own packages to what the others install: pytest, ONNX, Triton, ...'

install: $(STAMP)

$(STAMP): setup.py requirements/constraints.txt $(wildcard mmdet_norms/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'mmdet_norms needs Python >= 3.10: make PYTHON=python3.11 ...' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'creating .venv'; $(PYTHON) -m venv .venv; }
	@echo 'installing into .venv (versions: requirements/constraints.txt): 1/3 setuptools'
	@$(PIP) setuptools wheel
	@echo 'installing 2/3: torch (some minutes where it brings CUDA)'
	@$(PIP) torch
	@echo 'installing 3/3: mmdet and the rest'
	@$(PIP) --no-build-isolation -e '.[lite,optim]'
	@# opencv-python needs libGL, which bare machines lack; the headless build is the same module without it.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || $(PIP) --force-reinstall --no-deps opencv-python-headless
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo 'installing what the tests need on top: pytest, ONNX and, on Linux, Triton (some 200 MB)'
	@$(PIP) --no-build-isolation -e '.[lite,dev]'
	@touch $@

data: $(STAMP)
	@$(BIN)/python tools/make_shapes.py --out data/shapes

demo: data
	@$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_DIR) --overwrite
	@$(BIN)/python tools/test.py $(DEMO_CONFIG) "$$(cat $(DEMO_DIR)/last_checkpoint)" --eval bbox segm \
		--work-dir $(DEMO_DIR) --out $(DEMO_DIR)/results.pkl
	@$(BIN)/python tools/picture_sheet.py $(DEMO_CONFIG) $(DEMO_DIR)/results.pkl --out $(DEMO_DIR)/pictures.png --overwrite
	@$(BIN)/python tools/compare.py $(DEMO_DIR)
	@echo 'AP: $(DEMO_DIR)/results.json   pictures: $(DEMO_DIR)/pictures.png   log and checkpoint: $(DEMO_DIR)/'

data-cls: $(STAMP)
	@$(BIN)/python tools/make_shapes.py --classification --out data/shapes-cls

pretrain: data-cls
	@$(BIN)/python tools/train.py $(PRETRAIN_CONFIG) --work-dir $(PRETRAIN_DIR) --overwrite
	@$(BIN)/python tools/test.py $(PRETRAIN_CONFIG) "$$(cat $(PRETRAIN_DIR)/last_checkpoint)" --work-dir $(PRETRAIN_DIR)
	@$(BIN)/python tools/compare.py $(PRETRAIN_DIR)
	@echo 'accuracy: $(PRETRAIN_DIR)/results.json   checkpoint, for init_cfg of a detector: docs/pretrain.md'

# The papers' claims in miniature, docs/reproduce.md; REPRODUCE='...' goes to every `compare run`.
reproduce: $(STAMP)
	@PYTHON=$(BIN)/python tools/reproduce.sh $(PRESET) $(REPRODUCE)

# Stealing keeps most tests of a file, and so what they share, in one process, and still evens out at the end.
test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-compiled: $(COMPILED_STAMP)
	@$(COMPILED)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(COMPILED_TESTS)

# Of an environment for another wheel only mmcv is replaced, and without a wheel a mmcv that has ops is kept.
$(COMPILED_STAMP): setup.py requirements/constraints.txt $(wildcard mmdet_norms/kernels/csrc/*) $(MMCV_WHEEL)
	@test -x $(COMPILED)/bin/python || { echo 'creating $(COMPILED)'; $(PYTHON) -m venv $(COMPILED); }
	@echo 'installing into $(COMPILED): setuptools, torch'
	@$(COMPILED_PIP) 'setuptools<82' wheel
	@$(COMPILED_PIP) torch
ifdef MMCV_WHEEL
	@echo 'installing $(MMCV_WHEEL)'
	@$(COMPILED_PIP) --force-reinstall --no-deps '$(MMCV_WHEEL)'
else
	@$(HAS_OPS) 2>/dev/null || { echo 'building mmcv from source: about 20 minutes on two cores; for a built one:' \
		'make test-compiled MMCV_WHEEL=path'; \
		MMCV_WITH_OPS=1 $(COMPILED_PIP) --no-cache-dir --no-build-isolation --force-reinstall --no-deps 'mmcv>=2.0.0,<2.2.0'; }
endif
	@echo 'installing mmdet and what the tests need'
	@$(COMPILED_PIP) --no-build-isolation -e '.[mmcv,dev]'
	@$(COMPILED)/bin/python -c 'import cv2' 2>/dev/null || $(COMPILED_PIP) --force-reinstall --no-deps opencv-python-headless
	@$(HAS_OPS) || { echo 'mmcv in $(COMPILED) has no compiled ops for this torch, see above; take another MMCV_WHEEL,' \
		'or rm -r $(COMPILED) and build it' >&2; exit 1; }
	@rm -f $(COMPILED)/.installed-*
	@touch $@

bench: $(STAMP)
	@$(BIN)/python tools/benchmark.py $(BENCH)

# Under AddressSanitizer and UBSan, of gcc or clang; docs/reliability.md.
asan: $(DEV_STAMP)
	@$(BIN)/python tests/kernels/asan.py

# Every command of the documentation, in a copy of the checkout; CONTRIBUTING.md.
docs: $(DEV_STAMP)
	@$(BIN)/python tools/check_docs.py $(DOCS)

lint: $(DEV_STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis data/shapes data/shapes-cls data/shapes-cls-hard data/shapes-large data/shapes-cls-large
	find mmdet_norms mmdet_norms_start tests tools configs -name __pycache__ -prune -exec rm -rf {} +

# YES=1 answers the question.
clean-all:
	@test -n '$(YES)' || { printf 'delete every run in work_dirs, .venv and .venv-compiled? [y/N] '; read -r answer && [ "$$answer" = y ]; } || \
		{ echo 'nothing deleted'; exit 1; }
	@$(MAKE) --no-print-directory clean
	rm -rf work_dirs .venv .venv-compiled
