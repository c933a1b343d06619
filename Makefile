# `make demo` and `make test` do all the set-up on a fresh machine; see README.md.
PYTHON ?= python3
VENV ?= .venv
# Here a failure to compile the kernels is an error; 0 does without them.
MMVSSM_BUILD_EXT ?= 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
SOURCES := $(shell find kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h') setup.py

TASK ?= det
BACKBONE ?= spatialmamba
DEMO_SEED ?= 0
DEMO_det := mask_rcnn_$(BACKBONE)_nano_digits
DEMO_seg := upernet_$(BACKBONE)_nano_digits
DEMO_cls := $(BACKBONE)_nano_digits
DEMO := $(or $(DEMO_$(TASK)),none)
SUFFIX := $(if $(filter 0,$(DEMO_SEED)),,_$(DEMO_SEED))
DEMO_DATA := data/digits$(if $(filter det,$(TASK)),,_$(TASK))$(SUFFIX)
DEMO_DIR := work_dirs/$(DEMO)$(SUFFIX)
ifeq ($(filter demo,$(MAKECMDGOALS))$(wildcard configs/$(DEMO).py),demo)
$(error There is no demo for TASK=$(TASK) BACKBONE=$(BACKBONE), but for TASK=det with BACKBONE=spatialmamba or quadmamba, \
and for TASK=seg and TASK=cls with BACKBONE=spatialmamba)
endif

.PHONY: env test demo benchmark clean

env: $(VENV)/.installed

# MMCV is a source release: about 10 minutes on 2 free cores the first time; pip keeps the wheel.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; ok = sys.version_info[:2] in ((3, 11), (3, 12)); \
	sys.exit(0 if ok else 'Python 3.11 or 3.12 is needed, $(PYTHON) is ' + sys.version.split()[0] + '; make PYTHON=python3.11 ...')"
	@command -v c++ >/dev/null || { echo 'a C++ compiler is needed to build MMCV: install g++'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja
	$(PIP) torch torchvision
	@echo 'Building MMCV unless pip has it from before: 10 minutes or more.'
	$(PIP) --no-build-isolation onedl-mmcv
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	MMVSSM_BUILD_EXT=$(MMVSSM_BUILD_EXT) $(PIP) --no-build-isolation --editable '.[onedl,demo,test]'
	touch $@

test: env
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# Interrupted, it goes on where it stopped; `make clean` starts over.
demo: env
	$(BIN)/python tools/data/make_digits.py --task $(TASK) --out $(DEMO_DATA) --seed $(DEMO_SEED)
	$(BIN)/python tools/train.py configs/$(DEMO).py --seed 0 --resume --work-dir $(DEMO_DIR) \
		--cfg-options data_root=$(DEMO_DATA)/ $(DEMO_OPTIONS)
	$(BIN)/python tools/test.py configs/$(DEMO).py "$$(cat $(DEMO_DIR)/last_checkpoint)" \
		--work-dir $(DEMO_DIR)/evaluation --show-dir $(DEMO_DIR)/pictures --cfg-options data_root=$(DEMO_DATA)/
	$(BIN)/python tools/analysis/montage.py $(DEMO_DIR)/pictures $(DEMO_DIR)/demo.jpg

# The segmentor starts from the backbone of the classifier, whose demo runs first.
ifeq ($(TASK),seg)
CLASSIFIER := work_dirs/$(BACKBONE)_nano_digits$(SUFFIX)/epoch_24.pth
DEMO_OPTIONS := pretrained=$(CLASSIFIER)
demo: $(CLASSIFIER)
$(CLASSIFIER): | env
	$(MAKE) demo TASK=cls
endif

benchmark: env
	$(BIN)/python tools/benchmarks/cpu.py

# Forgets all runs; the environment and the data stay.
clean:
	rm -rf work_dirs
