# make demo   the whole pipeline on handwritten digits, into out/demo
# make test   the tests
# make lint   ruff
# Both make .venv from requirements.txt where it is missing. PYTHON=python3.11 picks the interpreter it is made with.

SHELL := bash
PYTHON ?= python3
PY := .venv/bin/python
DEMO := out/demo
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	touch $@

test: .venv/installed
	$(PY) -m pytest

lint: .venv/installed
	$(PY) -m ruff check .

# base -> SFT -> alignment -> RLVR, and RLVR straight from SFT beside it. Nothing here is special to the digits but that
# --data is left out: with it the same commands run on anything.
demo: .venv/installed
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(PY) digits.py && cp -r out/digits/base $(DEMO)/base
	$(PY) sft.py --model $(DEMO)/base --output_dir $(DEMO)/sft
	$(PY) discriminator.py --model $(DEMO)/base --policy $(DEMO)/sft --output_dir $(DEMO)/discriminator
	$(PY) align.py --ckpt $(DEMO)/sft --discriminator $(DEMO)/discriminator --output_dir $(DEMO)/align
	$(PY) rlvr.py --ckpt $(DEMO)/sft --output_dir $(DEMO)/sft_grpo
	$(PY) rlvr.py --ckpt $(DEMO)/align --output_dir $(DEMO)/align_grpo
	for name in base sft align sft_grpo align_grpo; do $(PY) eval.py --ckpt $(DEMO)/$$name || exit 1; done
	$(PY) report.py $(DEMO)
