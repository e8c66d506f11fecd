# make demo          the whole pipeline on handwritten digits, into out/demo
# make test          ruff, then the tests
# make test-numbers  the tests of numbers as two older processors compute them
# make test-gpu      the tests that need a GPU
# make chaos         faults at random moments, a long run, inputs broken in every way; TRIES, SEED,
#                    STEPS and FUZZ may be given
# make study         the paper's claims over seeds: hours; goes on where it was stopped
# All but test-gpu run on the CPU, also where there is a GPU. They make .venv from requirements.txt
# where it is missing. PYTHON=python3.11 picks the interpreter that it is made with.

SHELL := bash
PYTHON ?= python3
PY := .venv/bin/python
DEMO := out/demo
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-numbers test-gpu lint chaos study
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	touch $@

demo test test-numbers chaos study: export CUDA_VISIBLE_DEVICES :=

test: lint
	$(PY) -m pytest

# Processors round sums in different orders. A test of numbers must not hang on the last bit of one.
NUMBERS := align discriminator* lora model* other_models policy_gradient* sampler
NUMBERS := $(NUMBERS:%=tests/test_%.py)
test-numbers: .venv/installed
	ATEN_CPU_CAPABILITY=default $(PY) -m pytest $(NUMBERS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PY) -m pytest $(NUMBERS)

test-gpu: .venv/installed
	$(PY) -m pytest -n 0 -k cuda

TRIES ?= 80
SEED ?= 0
STEPS ?= 300
FUZZ ?= 20000
chaos: .venv/installed
	$(PY) tests/chaos.py --tries $(TRIES) --seed $(SEED) --steps $(STEPS) --fuzz $(FUZZ)

study: .venv/installed
	$(PY) benchmarks/study.py

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# base -> SFT -> alignment -> RLVR, and RLVR straight from SFT beside it, two commands at a time.
# Without `--data digits` the same commands run the published stages.
# Each has one thread: of a model this small a second one computes nothing sooner.
demo: export OMP_NUM_THREADS := 1
demo: .venv/installed
	rm -rf $(DEMO)
	$(MAKE) --no-print-directory -j2 $(DEMO)/results.json

out/digits/init/model.safetensors:
	$(PY) -m support.digits

$(DEMO)/base/model.safetensors: out/digits/init/model.safetensors
	$(PY) sft.py --model out/digits/init --data digits --output_dir $(DEMO)/base

$(DEMO)/sft/model.safetensors: $(DEMO)/base/model.safetensors
	$(PY) sft.py --model $(DEMO)/base --data digits --output_dir $(DEMO)/sft

$(DEMO)/discriminator/model.safetensors: $(DEMO)/sft/model.safetensors
	$(PY) discriminator.py --model $(DEMO)/base --policy $(DEMO)/sft --data digits --output_dir $(DEMO)/discriminator

$(DEMO)/align/model.safetensors: $(DEMO)/discriminator/model.safetensors
	$(PY) align.py --ckpt $(DEMO)/sft --discriminator $(DEMO)/discriminator --data digits --output_dir $(DEMO)/align

$(DEMO)/align_grpo/model.safetensors: $(DEMO)/align/model.safetensors
	$(PY) rlvr.py --ckpt $(DEMO)/align --data digits --output_dir $(DEMO)/align_grpo

$(DEMO)/sft_grpo/model.safetensors: $(DEMO)/sft/model.safetensors
	TQDM_POSITION=1 $(PY) rlvr.py --ckpt $(DEMO)/sft --data digits --output_dir $(DEMO)/sft_grpo

$(DEMO)/%/eval.json: $(DEMO)/%/model.safetensors
	$(PY) eval.py --ckpt $(DEMO)/$* --data digits

$(DEMO)/results.json: $(foreach name,align_grpo sft_grpo align sft base,$(DEMO)/$(name)/eval.json)
	$(PY) -m support.report $(DEMO)
