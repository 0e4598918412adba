# The two commands of the README. Each creates or reuses .venv; nothing outside the clone is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt

DEMO_CONFIG := configs/demo/mask-rcnn_r50_fpn_bnet5_shapes.py
DEMO_DIR := work_dirs/demo

# Processes that share the tests: a number, or auto for one per core. Each takes up to 2 GB of memory.
JOBS ?= auto --maxprocesses=4

# Threads that spin for long while they wait cost a factor of ten where something else uses a core.
export GOMP_SPINCOUNT ?= 10000

.PHONY: help install data demo test bench asan docs lint clean clean-all

help:
	@echo 'make demo   install, generate shapes, train a small Mask R-CNN with BNET-5, test it, draw a picture sheet'
	@echo 'make test   the whole test suite'
	@echo 'make bench  what each norm costs beside batch norm: layers, convolutions, Faster R-CNN (docs/benchmark.md)'
	@echo 'make asan   the tests of the C kernel under AddressSanitizer and UBSan (needs gcc)'
	@echo 'make docs   run every command of the documentation (CONTRIBUTING.md)'
	@echo 'make lint   ruff: style and format'
	@echo 'make install  the environment in .venv, versions from requirements/constraints.txt'
	@echo 'make data   the generated data set of the demo, in data/shapes'
	@echo 'make clean  delete what is made again: build products, caches, data/shapes. Trained runs stay'
	@echo 'make clean-all  ... and, after asking, work_dirs with every trained run in it, and .venv'
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
	@$(PIP) --no-build-isolation -e '.[lite]'
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

# Stealing keeps most tests of a file, and so what they share, in one process, and still evens out at the end.
test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

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
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis data/shapes
	find mmdet_norms mmdet_norms_start tests tools configs -name __pycache__ -prune -exec rm -rf {} +

# YES=1 answers the question.
clean-all:
	@test -n '$(YES)' || { printf 'delete every run in work_dirs, and .venv? [y/N] '; read -r answer && [ "$$answer" = y ]; } || \
		{ echo 'nothing deleted'; exit 1; }
	@$(MAKE) --no-print-directory clean
	rm -rf work_dirs .venv
