"""Reinforcement learning with verifiable rewards: GSPO, GRPO, DAPO, Dr. GRPO, CISPO on text and pictures, dense or MoE.

    python train_rl.py --recipe gspo-paper --model runs/instruct --data toy/rl --out runs/rl
    torchrun --nproc-per-node 8 train_rl.py --recipe dapo --engine vllm --model runs/instruct --data RL-172K --out ...
    torchrun --nproc-per-node 8 train_rl.py --recipe upstream --engine vllm-server ...   # 4 GPUs generate, 4 train

A step: draw prompts -> roll out G responses each -> verify them -> drop or refill groups without spread -> the
trainer's own log-probabilities (old) -> K updates on parts of the batch -> weights to the engine -> log.
A run leaves step_XXXXXXXX/ (the model, and state/ to resume from), metrics.jsonl, curves.png (drawn at every save)
and rollouts.txt, a few responses of every step with their rewards. Rewards, lengths and errors in the log are of all
responses made, those of dropped groups included.

Engines (engine.py): torch, model.py's own generate; vllm, in the same process and asleep while training; vllm-server,
on ranks of its own that run ahead by at most --staleness versions of the weights and take new ones between two tokens.

The loss of a response token t in response i, with ratio r_t = p_t / old_t and advantage A:
  token     -min(r_t A, clip(r_t, 1 - low, 1 + high) A)                                     (GRPO, DAPO, Dr. GRPO)
  gspo      the same with s_i = exp(mean over t of log r_t) in place of r_t: one ratio a response
  gspo-token  s_i as value, p_t / sg(p_t) as gradient
  cispo     -sg(min(r_t, 1 + high)) A log p_t: nothing is dropped
and what sums them: 'sequence' (mean over a response's tokens, mean over responses: GSPO, GRPO), 'token' (sum over all
tokens / their number: DAPO, CISPO), 'constant' (sum over all tokens / (responses x max_new_tokens): Dr. GRPO).
The denominators are those of the whole minibatch, over ranks and micro-batches.

References: GSPO arXiv:2507.18071, DAPO 2503.14476, GRPO 2402.03300, Dr. GRPO 2503.20783, CISPO 2506.13585, truncated
importance sampling (fengyao.notion.site/off-policy-rl), routing replay 2507.18071 (R2) and 2510.11370 (R3); the
released configs/innovator-vl-8b-gspo.yaml.

Departures
1. 'upstream' is the released yaml, whose one update a batch makes its ratio 1 and its clip idle; it also sums a
   sequence loss over tokens. 'gspo-paper' has four updates, 3e-4 and 4e-4, and every response weighs the same.
2. Responses with advantage 0 count in the denominators, but are not run: entropy, clip share, ratios and the gap to
   the engine are of the others.
3. Advantages are normalised once, inside the group; the released code normalises over the batch again.
4. Sampling is at top_p 1 without top_k, so that the engine's and the trainer's probabilities are of one distribution.
5. 'dapo' has this file's other defaults: fewer prompts a batch, a shorter warm-up and shorter responses than the paper
   (512, 20 batches, 20480 tokens), and accuracies in [0, 1] where the paper has -1 and 1. Refill keeps groups whose
   accuracies differ (there: 0 < right responses < G); other groups do not train, even if their rewards differ. Ranks
   keep all such groups of a round: a batch may have more prompts than asked for, by less than one a rank.
"""
import contextlib
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import engine as engines
import moe
import rewards
import train_sft
from common import UserError, is_rank0, print0, rank, world
from data import (MERGE, BadRow, Dataset, Doc, Limits, Tokenizer, best_fit_decreasing, collate, encode, permutation,
                  to_device)
from model import Innovator, checkpoint_folder, gathered

RECIPES = {
    "gspo-paper": dict(loss="gspo", reduce="sequence", low=3e-4, high=4e-4, updates=4, lr=1e-6),
    "upstream": dict(loss="gspo", reduce="token", low=0.2, high=0.28, updates=1, lr=2e-6, correction="mask", cap=5.0),
    "grpo": dict(loss="token", reduce="sequence", low=0.2, high=0.2, updates=1, lr=1e-6),
    "dapo": dict(loss="token", reduce="token", low=0.2, high=0.28, updates=16, lr=1e-6, refill=10, overlong=4096,
                 mask_truncated=True),
    "dr-grpo": dict(loss="token", reduce="constant", low=0.2, high=0.2, updates=1, lr=1e-6, divide_by_std=False),
    "cispo": dict(loss="cispo", reduce="token", low=1.0, high=4.0, updates=1, lr=1e-6),
}
CURVES = ("reward", "accuracy", "length", "entropy", "clip_share", "gap_mean", "equal_groups")
Correction = Literal["none", "truncate", "mask", "sequence-truncate", "sequence-mask"]
NOT_FINITE = "the engine gave a log-probability that is not finite"
EVERY_RECIPE = dict(correction="none", cap=2.0, refill=0, overlong=0, mask_truncated=False, divide_by_std=True)


@dataclass
class Config:
    recipe: Literal["gspo-paper", "upstream", "grpo", "dapo", "dr-grpo", "cispo"]  # defaults of the fields with *
    model: str  # checkpoint or run folder; preset:NAME: random weights, to measure
    data: list[str]  # rows with the columns of RL-172K
    out: str  # folder of this run
    tokenizer: str = ""  # folder of a tokenizer, for a preset
    loss: Literal["token", "gspo", "gspo-token", "cispo"] | None = None  # * loss of a token, see above
    reduce: Literal["sequence", "token", "constant"] | None = None  # * what sums the losses of tokens
    low: float | None = None  # * the ratio is clipped at 1 - low
    high: float | None = None  # * and at 1 + high
    updates: int | None = None  # * optimizer steps a batch of rollouts, each on its part of the responses
    divide_by_std: bool | None = None  # * advantages are divided by the group's standard deviation
    correction: Correction | None = None  # * weight p(old) / p(engine), cut or dropped above cap
    cap: float | None = None  # * largest weight of the correction
    replay: Literal["none", "old", "engine"] = "none"  # experts of a MoE in updates: the old pass (R2), engine (R3)
    refill: int | None = None  # * rounds of new prompts that may replace groups of equal accuracy, 0: these train
    overlong: int | None = None  # * last tokens of the budget over which the reward falls linearly by 1
    mask_truncated: bool | None = None  # * responses that did not end carry no loss
    kl: float = 0.0  # weight of the KL divergence from the first model (k3 estimator)
    prompts: int = 32  # prompts a step, over all ranks
    group: int = 16  # G, responses a prompt
    max_new_tokens: int = 8192  # longest response
    temperature: float = 1.0  # of sampling and of all log-probabilities
    plain: bool = False  # ask the bare question, without the released instruction on <think> and <answer>
    verifiers: int = 2  # processes a rank that verify responses
    verify_seconds: float = 30.0  # one response's verification may take
    judge: str = ""  # URL of an OpenAI-compatible server, with /v1, that is asked where rules read no answer or say no
    judge_model: str = ""  # its name there; the server's key is read from OPENAI_API_KEY
    rewards: Literal["verified", "shuffled", "random"] = "verified"  # controls: another response's of the batch; noise
    lr: float | None = None  # * constant between warm-up and decay
    warmup: int = 10  # updates
    decay: float = 0.0  # share of the steps, the last ones, over which lr falls linearly to 0
    weight_decay: float = 0.01  # on matrices only
    beta2: float = 0.999  # Adam
    clip: float = 1.0  # largest gradient norm
    steps: int = 100  # batches of rollouts
    pack: int = 8192  # tokens of a micro-batch; one response may be longer
    engine: Literal["torch", "vllm", "vllm-server"] = "torch"  # who generates
    rollout_batch: int = 64  # sequences that the torch engine continues together
    engine_memory: float = 0.3  # share of the GPU's memory that vLLM may take, its weights included
    context: int = 0  # longest prompt + response of vLLM, 0: the model's context
    tp: int = 1  # neighbouring ranks that share one vLLM
    optimize: Literal["none", "graphs", "compile"] = "compile"  # of vLLM: CUDA graphs, torch.compile (a minute)
    rollout_ranks: int = 0  # ranks that only generate, ahead of the others; vllm-server: default half of them
    staleness: int = 1  # versions of the weights that these may be behind when they begin a batch
    patience: float = 1800.0  # seconds without a sign of life from the engine or from a rank, then the run ends
    trainable: list[str] | None = None  # modules that train, default language_model
    min_pixels: int = 3136  # smallest image area
    max_pixels: int = 262144  # largest image area
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # compute; masters are fp32
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"  # packed attention
    recompute: Literal["none", "selective", "full"] = "selective"  # activation checkpointing per block
    compile: bool = False  # torch.compile per block; packs are then filled up to --pack
    threads: int = 0  # CPU threads of torch a rank, 0: torch's choice
    seed: int = 1234  # order of the prompts, sampling
    save_every: int = 25  # steps between checkpoints, and one at the end; 0: none at all, to measure
    keep: int = 2  # newest checkpoints that stay
    resume: bool = False  # go on from the newest checkpoint in --out

    def __post_init__(self):
        for key, value in (EVERY_RECIPE | RECIPES[self.recipe]).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.trainable = self.trainable or ["language_model"]
        assert self.group > 1, f"--group {self.group}: a group needs two responses to compare"
        assert self.temperature > 0, "--temperature 0 samples one response G times"
        for names, ok, what in (
                ("prompts updates max_new_tokens verifiers steps pack rollout_batch tp keep",
                 lambda x: x >= 1, "must be at least 1"),
                ("seed refill kl warmup weight_decay context rollout_ranks staleness threads save_every lr high",
                 lambda x: x >= 0, "cannot be negative"),
                ("cap clip verify_seconds patience", lambda x: x > 0, "must be above 0"),
                ("low decay", lambda x: 0 <= x <= 1, "must lie between 0 and 1")):
            for name in names.split():
                assert ok(getattr(self, name)), f"--{name.replace('_', '-')} {getattr(self, name)} {what}"
        assert 0 <= self.overlong <= self.max_new_tokens, \
            f"--overlong {self.overlong} must lie in 0..max_new_tokens {self.max_new_tokens}"
        assert 0 < self.engine_memory < 1, f"--engine-memory {self.engine_memory} is a share between 0 and 1"
        assert bool(self.judge) == bool(self.judge_model), "--judge and --judge-model belong together"
        assert self.tp == 1 or not self.rollout_ranks and self.engine != "vllm-server", \
            f"--tp {self.tp} shares an engine among training ranks, not rollout ranks"
        assert self.prompts * self.group % self.updates == 0, \
            f"{self.prompts} x {self.group} responses do not divide over {self.updates} updates"


# ---- objectives: pure functions of packed tensors -------------------------------------------------------------------
def advantages(rewards_PG: torch.Tensor, divide_by_std: bool) -> torch.Tensor:
    """Reward minus the group's mean, over its standard deviation (unbiased) if asked. [prompts, G] -> the same."""
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # NOTE rounding leaves a group of equal rewards 6e-8, which the division makes 6e-3 and Adam a step
    centred = centred.masked_fill(rewards_PG.amax(1, keepdim=True) - rewards_PG.amin(1, keepdim=True) < 1e-6, 0)
    return centred / (rewards_PG.std(1, keepdim=True) + 1e-5) if divide_by_std else centred


def overlong_punishment(length: int, longest: int, window: int) -> float:
    """DAPO's soft punishment: 0 up to longest - window tokens, then linearly down to -1."""
    return -max(0.0, (length - (longest - window)) / window) if window else 0.0


def policy_loss(kind: str, logp_N, old_N, advantage_N, sequence_N, lengths_S, low: float, high: float):
    """Loss of every response token [N] and whether the clip cut its gradient [N]. sequence: number of each token's
    response, lengths: tokens of each response. Sums and denominators: weigh()."""
    log_ratio_N = logp_N - old_N
    if kind in ("gspo", "gspo-token"):
        mean_S = log_ratio_N.new_zeros(len(lengths_S)).index_add(0, sequence_N, log_ratio_N) / lengths_S
        log_s_N = mean_S[sequence_N]
        log_ratio_N = log_s_N if kind == "gspo" else log_s_N.detach() + logp_N - logp_N.detach()
    ratio_N = log_ratio_N.exp()
    if kind == "cispo":
        return -ratio_N.detach().clamp(max=1 + high) * advantage_N * logp_N, ratio_N.detach() > 1 + high
    free, cut = ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N
    return -torch.minimum(free, cut), (cut < free).detach()


def weigh(loss_N, sequence_N, lengths_S, reduce: str):
    """The tokens' losses times their weight, to be summed and divided by denominator()."""
    return loss_N / lengths_S[sequence_N] if reduce == "sequence" else loss_N


def denominator(reduce: str, responses: int, tokens: int, longest: int) -> float:
    return {"sequence": responses, "token": tokens, "constant": responses * longest}[reduce]


def correction_weight(old_N, engine_N, kind: str, cap: float, sequence_N=None, lengths_S=None) -> torch.Tensor:
    """Weight of a token for being sampled by the engine, not by the trainer's own old policy: the ratio of its two
    probabilities or (sequence-) that of its whole response."""
    if kind == "none":
        return torch.ones_like(old_N)
    log_N = old_N - engine_N
    if kind.startswith("sequence-"):
        log_N = log_N.new_zeros(len(lengths_S)).index_add(0, sequence_N, log_N)[sequence_N]
    weight_N = log_N.clamp(max=20.0).exp()  # finite before the cap
    return weight_N.clamp(max=cap) if kind.endswith("truncate") else weight_N * (weight_N <= cap)


def rerouted(a_LTk, b_LTk) -> torch.Tensor:
    """How two choices of experts differ [4]: (layer, token) pairs with another set of experts, pairs; tokens with
    another set in some layer, tokens. Rows of -1 in b count nowhere."""
    known_LT = (b_LTk >= 0).all(-1)
    other_LT = (a_LTk.sort(-1).values != b_LTk.sort(-1).values).any(-1) & known_LT
    return torch.stack([other_LT.sum(), known_LT.sum(), other_LT.any(0).sum(), known_LT.any(0).sum()]).double()


# ---- rollouts -------------------------------------------------------------------------------------------------------
@dataclass
class Response:
    prompt: int  # number of its prompt in the step's batch
    doc: Doc  # prompt and response; labels are the response
    text: str
    engine: np.ndarray  # log-probabilities that the engine sampled with, one a response token
    truncated: bool
    experts: np.ndarray | None = None  # of the engine, engine.Continuation
    reward: float = 0.0
    accuracy: float = 0.0
    error: str = ""  # why it says nothing about the policy
    judge: str = "rule"  # who decided, rewards.Result.by
    advantage: float = 0.0


def right_answers(raw: dict) -> list[str]:
    return [str(a) for a in (raw["answer"] if isinstance(raw["answer"], list) else [raw["answer"]]) if a is not None]


class Prompts:
    """Rows in an order that depends on the seed alone; a row that cannot be read is counted and left out."""
    def __init__(self, c, tok: Tokenizer, longest: int):
        self.c, self.tok, self.data, self.bad, self.longest = c, tok, Dataset(c.data), 0, longest
        self.limits = Limits(c.min_pixels, c.max_pixels, 0)
        if not len(self.data):
            raise UserError(f"{', '.join(c.data)}: no rows")

    def read(self, i: int) -> tuple[dict, Doc]:
        row = self.data.row(i)
        if "answer_type" not in row.raw or not isinstance(row.raw.get("problem"), str):
            raise BadRow("no answer_type or no problem: rows need the columns of RL-172K")
        if row.raw["answer_type"] not in rewards.ANSWER_TYPES:
            raise BadRow(f"answer type {row.raw['answer_type']!r} is not one of {', '.join(rewards.ANSWER_TYPES)}")
        messages, images = row.parts[0]
        asked = [m for m in messages if m["role"] != "assistant"]
        if self.c.plain:
            asked = [*asked[:-1], {"role": "user", "content": row.raw["problem"]}]
        doc = encode(asked, images, self.tok, self.limits, generate=True)
        if len(doc.ids) + self.c.max_new_tokens > self.longest:
            raise BadRow(f"{len(doc.ids)} tokens and max_new_tokens exceed the context {self.longest}")
        return row.raw | {"id": row.id, "answer": right_answers(row.raw)}, doc

    def draw(self, cursor: int, n: int, share: int, shares: int) -> tuple[list[tuple[dict, Doc]], int]:
        """n prompts from the cursor on, every shares-th of the order; and the cursor after them."""
        out, misses = [], 0
        while len(out) < n:
            epoch, at = divmod(cursor + share, len(self.data))
            i, cursor = int(permutation(self.c.seed, len(self.data), epoch)[at]), cursor + shares
            try:
                out.append(self.read(i))
            except BadRow as e:
                self.bad, misses = self.bad + 1, misses + 1
                if misses > max(100, len(self.data) // 10):
                    raise UserError(f"{' '.join(self.data.name(i))}: {e}; {misses} bad rows in this batch") from None
        return out, cursor


def make_engine(c, config, dtype, device, out: Path):
    """The engine that --engine names, without weights."""
    given = (config, dtype, device, c.attention, c.replay == "engine")
    if c.engine == "torch":
        return engines.TorchEngine(*given, batch=c.rollout_batch)
    return engines.VllmEngine(*given, context=c.context or config.max_position_embeddings, memory=c.engine_memory,
                              tp=c.tp, optimize=c.optimize, seed=c.seed, out=out)


def make_verifiers(c: Config) -> rewards.Verifiers:
    key = os.environ.get("OPENAI_API_KEY", "")
    return rewards.Verifiers(c.verifiers, rewards.Judge(c.judge, c.judge_model, str(Path(c.out) / "judge"), key)
                             if c.judge else None)


def roll_out(c, engine, drawn: list, tok: Tokenizer, seed: int, between=lambda: None) -> list[Response]:
    """G responses for every prompt of this rank."""
    out, sampling = [], engines.Sampling(c.max_new_tokens, (tok.im_end, tok.pad), c.temperature)
    for k, own in enumerate(engine.generate([doc for _, doc in drawn], c.group, sampling, seed, between)):
        prompt = drawn[k][1]
        for one in own:
            labels = np.concatenate([np.full(len(prompt.ids), -100), one.ids]).astype(np.int32)
            doc = Doc(np.concatenate([prompt.ids, one.ids]).astype(np.int32), labels, prompt.grids, prompt.pixels)
            fine = bool(np.isfinite(one.logp).all())
            out.append(Response(k, doc, tok.decode(one.ids), one.logp if fine else np.zeros_like(one.logp),
                                one.ids[-1] not in sampling.stop_ids, one.experts,
                                error="" if fine else NOT_FINITE))
    return out


def verify(c, verifiers: rewards.Verifiers, responses: list[Response], drawn: list, between=lambda: None) -> None:
    """Fills in rewards: 0.1 format + 0.9 accuracy, less the punishment of overlong responses. A response whose verifier
    raised or ran out of time, or that the engine spoilt, gets the mean of the others of its group, carries no loss and
    is counted."""
    items = [dict(response=r.text, gold=row["answer"], answer_type=row["answer_type"], question=row["problem"])
             for r in responses for row in (drawn[r.prompt][0],)]
    for r, result in zip(responses, verifiers.score_many(items, c.verify_seconds, between)):
        r.error, r.accuracy, r.judge = r.error or result.error or "", result.accuracy or 0.0, result.by
        r.reward = (result.reward or 0.0) + overlong_punishment(len(r.engine), c.max_new_tokens, c.overlong)
    for start in range(0, len(responses), c.group):
        own = responses[start:start + c.group]
        fine = [r.reward for r in own if not r.error]
        for r in own:
            r.reward = r.reward if not r.error else sum(fine) / max(len(fine), 1)


# ---- updates --------------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """One micro-batch of responses on the device: the pack, and for every response token what the loss needs."""
    pack: object
    copy: torch.Tensor  # [N] its row among those that the pack supervises: equal responses to a prompt run once
    sequence: torch.Tensor  # [N] number of its response in this micro-batch
    lengths: torch.Tensor  # [S]
    advantage: torch.Tensor  # [N]
    mask: torch.Tensor  # [N] 0: no loss
    engine: torch.Tensor  # [N]
    chosen: torch.Tensor | None = None  # [L, T, k] best experts under the old policy, -1 for padding
    old: torch.Tensor | None = None  # [N]
    first: torch.Tensor | None = None  # [N] under the first model, with kl


def micro_batches(c: Config, responses: list[Response], model: Innovator, tok: Tokenizer, device) -> list[Batch]:
    """Responses packed to --pack tokens; all ranks get as many, the missing ones empty, so that collectives line up.
    Equal responses to a prompt run once; a picture of several responses goes through the tower once a pack."""
    same = {}
    for r in responses:
        same.setdefault((r.prompt, r.doc.ids.tobytes()), []).append(r)
    same = list(same.values())
    lengths = np.array([len(rs[0].doc.ids) for rs in same], dtype=np.int64)
    packs = best_fit_decreasing(lengths, max(c.pack, int(lengths.max(initial=1)))) if len(lengths) else []
    most = torch.tensor(len(packs))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    packs += [np.zeros(0, np.int64)] * (int(most) - len(packs))
    config = model.config
    names = config.expert_groups if config.num_experts else None
    out = []
    for p in packs:
        once = [same[k] for k in np.sort(p)]
        some, ends = [r for rs in once for r in rs], np.cumsum([len(rs[0].engine) for rs in once], dtype=np.int64)
        copy = [np.arange(end - len(r.engine), end) for rs, end in zip(once, ends) for r in rs]
        docs, first_row, image_from, at = [], {}, [], 0
        for r in (rs[0] for rs in once):
            merged = sum(t * h * w for t, h, w in r.doc.grids) // MERGE ** 2
            docs.append(replace(r.doc, pixels=None, grids=[]) if r.prompt in first_row else r.doc)
            image_from.append(np.arange(merged) + first_row.setdefault(r.prompt, at))
            at += merged if docs[-1] is r.doc else 0
        data = collate(docs, tok.pad, tok.image_pad, c.pack if c.compile else 0, "token", config.vision is not None)
        n = np.array([len(r.engine) for r in some], dtype=np.int64)
        keep = [0.0 if r.error or c.mask_truncated and r.truncated else 1.0 for r in some]
        spread = lambda x: torch.from_numpy(np.repeat(np.array(x, dtype=np.float32), n)).to(device)
        pack = to_device(data, device, model.impl, model.mixed_dtype, names)
        if at:
            pack.image_from = torch.from_numpy(np.concatenate(image_from)).to(device)
        if c.replay == "engine":  # the last token of a response was never read
            experts = np.full((len(data.ids), config.num_hidden_layers, config.num_experts_per_tok), -1, np.int16)
            start = 0
            for r in (rs[0] for rs in once):
                if r.experts is not None:
                    experts[start:start + len(r.experts)] = r.experts
                start += len(r.doc.ids)
            pack.experts = torch.from_numpy(experts).to(device).transpose(0, 1)
        out.append(Batch(
            pack, torch.from_numpy(np.concatenate([*copy, np.zeros(0, np.int64)])).to(device),
            torch.from_numpy(np.repeat(np.arange(len(some)), n)).to(device), torch.from_numpy(n).float().to(device),
            spread([r.advantage for r in some]), spread(keep),
            torch.from_numpy(np.concatenate([r.engine for r in some] + [np.zeros(0, np.float32)])).to(device)))
    return out


def update_part(c: Config, responses: list[Response], model, tok, device) -> tuple[list[Batch], tuple]:
    """The micro-batches of one update, and what update() counts. A response with advantage 0 has no gradient: it
    counts in the denominators, but does not run (with a KL term all run; without any other, one does)."""
    def carries(r): return not (r.error or c.mask_truncated and r.truncated)
    run = [r for r in responses if c.kl or r.advantage and carries(r)] or responses[:1]
    counting = [r for r in responses if carries(r)]
    return micro_batches(c, run, model, tok, device), (
        len(counting), sum(len(r.engine) for r in counting), sum(len(r.engine) for r in run if carries(r)))


@torch.no_grad()
def recompute_old(model, batches: list[Batch], c: Config) -> dict:
    """log p of every response token at the sampling temperature under this model as it is now, and the experts that it
    would choose. -> how these differ from the engine's, if it tells them"""
    sums = torch.zeros(4, dtype=torch.float64, device=batches[0].mask.device)
    for b in batches:
        logp, _, routing = model(b.pack, entropy=False, temperature=c.temperature)
        b.old = logp[b.copy]
        if routing:
            padding_T = b.pack.labels > len(model.config.expert_groups)
            b.chosen = routing[2].masked_fill(padding_T[:, None], -1)
            if c.replay == "engine":
                sums += rerouted(b.chosen, b.pack.experts)
            elif c.replay == "old":
                b.pack.experts = b.chosen
    if c.replay != "engine":
        return {}
    dist.all_reduce(sums)
    pairs, of_pairs, tokens, of_tokens = sums.tolist()
    return {"engine_routers": pairs / max(of_pairs, 1), "engine_rerouted": tokens / max(of_tokens, 1)}


def update(c: Config, model, optimizer, batches: list[Batch], counted: tuple, lr: float) -> dict:
    """One optimizer step on these micro-batches; statistics are sums over tokens, reduced over ranks. counted: this
    rank's responses and tokens that count in the denominators, and the tokens of those that run."""
    device = batches[0].mask.device
    counts = torch.tensor(counted, dtype=torch.float64)
    dist.all_reduce(counts)
    responses, tokens, ran = counts.tolist()
    below = max(denominator(c.reduce, responses, tokens, c.max_new_tokens), 1)
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # loss, clipped, entropy, ratio, k3 to first, kept by cap
    moved, load, top = torch.zeros(4, dtype=torch.float64, device=device), None, torch.zeros((), device=device)
    for b in batches:
        logp, entropy, routing = model(b.pack, entropy=True, temperature=c.temperature)
        logp, entropy = logp[b.copy], entropy[b.copy]
        loss, clipped = policy_loss(c.loss, logp, b.old, b.advantage, b.sequence, b.lengths, c.low, c.high)
        weight = correction_weight(b.old, b.engine, c.correction, c.cap, b.sequence, b.lengths)
        loss = loss * weight
        k3 = torch.zeros_like(logp)
        if b.first is not None:
            k3 = (b.first - logp).exp() - (b.first - logp) - 1
            loss = loss + c.kl * k3
        total = (weigh(loss, b.sequence, b.lengths, c.reduce) * b.mask).sum() / below
        (total + 0 * logp.sum()).backward()
        ratio = (logp.detach() - b.old).exp()
        sums += torch.stack([total.detach().double(), *((x.detach() * b.mask).sum().double() for x in (
            clipped.float(), entropy, ratio, k3, (weight > 0).float()))])
        top = torch.maximum(top, (ratio * b.mask).max()) if len(ratio) else top
        if routing:
            moved += rerouted(routing[2], b.chosen)
            load = routing[1] if load is None else load + routing[1]
    norm = common.clip_gradients([p for p in model.parameters() if p.requires_grad], c.clip)
    dist.all_reduce(sums)
    dist.all_reduce(moved)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    norm, top, *rest = torch.cat([torch.stack([norm, top]).double(), moved, sums]).tolist()  # one wait
    pairs, of_pairs, rerouted_tokens, of_tokens, loss, *per_token = rest
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"loss {loss} or gradient norm {norm} is not finite; nothing was updated. Lower --lr, "
                        "or go on from the last checkpoint with --resume")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    names = ("clip_share", "entropy", "ratio_mean", "kl_first", "corrected_kept")
    row = {"loss": loss, "lr": lr, "grad_norm": norm, "ratio_max": top,
           **{k: v / max(ran, 1) for k, v in zip(names, per_token)}}
    if load is None:
        return row
    dist.all_reduce(load)
    load = moe.load_statistics(load, model.config.expert_groups)
    return row | {"old_routers": pairs / max(of_pairs, 1), "old_rerouted": rerouted_tokens / max(of_tokens, 1),
                  "load_max": load["load_max"], "load_entropy": load["load_entropy"]}


def gap(batches: list[Batch]) -> dict:
    """How far the engine's log-probabilities are from the trainer's; with staleness those of older weights."""
    difference = torch.cat([(b.old - b.engine)[b.mask > 0] for b in batches]).double()
    far = (difference.abs() > math.log(2)).sum().double()
    sums = torch.stack([difference.abs().sum(), far, torch.tensor(float(len(difference)), device=far.device).double()])
    top = difference.abs().max() if len(difference) else torch.zeros((), device=far.device).double()
    dist.all_reduce(sums)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total, far, n = sums.tolist()
    return {"gap_mean": total / max(n, 1), "gap_max": top.item(), "beyond_2x": far / max(n, 1)}


# ---- the loop -------------------------------------------------------------------------------------------------------
def tally(c: Config, responses: list[Response], drawn: list) -> Counter:
    """What the log says of these responses, as sums."""
    counts = Counter(responses=len(responses))
    for r in responses:
        kind = drawn[r.prompt][0]["answer_type"]
        counts.update({"reward": r.reward, "accuracy": r.accuracy, "tokens": len(r.engine), "truncated": r.truncated,
                       ("reward", kind): r.reward, ("responses", kind): 1})
        counts.update({("error", r.error): 1} if r.error else {})
        counts["no experts"] += c.replay == "engine" and r.experts is None
        counts["judge asked"] += r.judge != "rule"
        counts["judge failed"] += r.judge not in ("rule", "judge")
    return counts


def collect(c: Config, engine, prompts: Prompts, verifiers, cursor: int, step: int, tok, share: int, shares: int,
            between=lambda: None):
    """This rank's responses to the step's prompts, groups of equal accuracies replaced up to --refill times, until the
    ranks of its group together have enough. -> responses, rows, counts, cursor"""
    kept, rows, bad, counts = [], [], prompts.bad, Counter()
    for attempt in range(c.refill + 1):
        have, most = torch.tensor(len(rows)), torch.tensor(cursor)
        dist.all_reduce(have)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        missing, cursor = -(-(c.prompts * world() // shares - int(have)) // world()), int(most)
        if missing <= 0:
            break
        drawn, cursor = prompts.draw(cursor, missing, share, shares)
        seed = (c.seed * 1_000_003 + step * 1009 + attempt) * 8191 + share
        responses = roll_out(c, engine, drawn, tok, seed, between)
        spoilt = sum(r.error == NOT_FINITE for r in responses)
        if responses and spoilt == len(responses):
            raise UserError(f"{NOT_FINITE} in all {spoilt} responses of step {step + 1}: the weights or the engine's "
                            "precision are broken; go on from the last checkpoint with --resume")
        verify(c, verifiers, responses, drawn, between)
        counts.update(tally(c, responses, drawn))
        for k, (row, _) in enumerate(drawn):
            own = responses[k * c.group:(k + 1) * c.group]
            values = [r.accuracy for r in own if not r.error] if c.refill else [r.reward for r in own]
            equal = max(values, default=0) - min(values, default=0) < 1e-6
            counts.update(groups=1, equal=equal)
            if not (c.refill and equal):
                for r in own:
                    r.prompt = len(rows)
                kept, rows = kept + own, [*rows, row]
    counts["bad"] = prompts.bad - bad
    cursor = torch.tensor(cursor)
    dist.all_reduce(cursor, op=dist.ReduceOp.MAX)
    return kept, rows, counts, int(cursor)


def assign_advantages(c: Config, responses: list[Response], step: int) -> None:
    if not responses:
        return
    values = np.array([r.reward for r in responses], dtype=np.float32)
    if c.rewards != "verified":
        draw = np.random.default_rng([c.seed, step, rank()])
        values = draw.permutation(values) if c.rewards == "shuffled" else draw.random(len(values), dtype=np.float32)
    grouped = torch.from_numpy(values).view(-1, c.group)
    for r, a in zip(responses, advantages(grouped, c.divide_by_std).flatten().tolist()):
        r.advantage = a


def generate_ahead(c: Config, link, engine, config, dtype, tok, number: int, step: int, cursor: int) -> None:
    """The life of a rank that only generates: batches for step, step + 1, ... until the trainers are done."""
    first, prompts = step, Prompts(c, tok, c.context or config.max_position_embeddings)
    common.on_sigterm()  # torchrun sends it to all ranks: this one serves until the trainers are done
    alive = common.watchdog(c.patience, f"the engine of rollout rank {number}")

    def between():
        alive()
        link.poll(engine, config, dtype, alive)
    with make_verifiers(c) as verifiers:
        try:
            while True:
                between()
                version = first + link.version - 1  # the first ones that come are those that training began with
                if not link.version or step >= c.steps or step - version > c.staleness:
                    time.sleep(0.01)
                    continue
                batch = collect(c, engine, prompts, verifiers, cursor, step, tok, number, c.rollout_ranks, between)
                cursor = batch[-1]
                link.put(step, (*batch, version))
                step += 1
        except engines.Finished:
            pass


def taken(c: Config, batches: list) -> tuple:
    """This trainer's share of what the generating ranks made for a step: every world()-th group."""
    responses, rows, counts, cursor = [], [], Counter(), 0
    groups = [(own[k * c.group:(k + 1) * c.group], row) for own, asked, *_ in batches for k, row in enumerate(asked)]
    for k, (own, row) in enumerate(groups[rank()::world()]):
        for r in own:
            r.prompt = k
        responses, rows = responses + own, [*rows, row]
    for _, _, some, its_cursor, *_ in batches if is_rank0() else ():  # counted once
        counts.update(some)
        cursor = max(cursor, its_cursor)
    return responses, rows, counts, cursor


def write_rollouts(file: Path, step: int, responses: list[Response], rows: list[dict]) -> None:
    """The best and the worst response of the step's first two prompts, to be read by a person."""
    with open(file, "a") as f:
        for k, row in list(enumerate(rows))[:2]:
            own = sorted((r for r in responses if r.prompt == k), key=lambda r: r.reward)
            f.write(f"==== step {step}, {row['id']}: {row['problem']}\n     right: {row['answer']}\n")
            for r in (own[-1], own[0]):
                f.write(f"---- reward {r.reward:.2f}, {len(r.engine)} tokens{', truncated' * r.truncated}"
                        f"{', error: ' * bool(r.error)}{r.error}\n{r.text}\n")


def trim_rollouts(file: Path, step: int) -> None:
    """Forgets the steps after a checkpoint that a run goes on from."""
    if file.exists():
        steps = re.split(r"^(?===== step \d+,)", file.read_text(), flags=re.M)
        file.write_text("".join(s for s in steps if int((re.match(r"==== step (\d+)", s) or [0, 0])[1]) <= step))


def summed(counts: Counter) -> Counter:
    tables, total = [None] * world(), Counter()
    dist.all_gather_object(tables, counts)
    for table in tables:
        total.update(table)
    return total


def everywhere(true: bool) -> bool:
    flag = torch.tensor(int(true))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    with contextlib.ExitStack() as closing:
        train(common.parse(Config, doc=__doc__), closing)


def check_resumed(c: Config, folder: Path) -> None:
    """An error if the run of this checkpoint was another one. Its files may have moved: that is said."""
    then = json.loads((folder / "trainer.json").read_text())["config"]
    for name in ("recipe", "seed", "plain", "data", "tokenizer", "model"):
        if then[name] != getattr(c, name):
            says = f"{folder} is of a run with --{name} {then[name]}, now {getattr(c, name)}"
            if name in ("recipe", "seed", "plain") or name == "model" and c.kl:
                raise UserError(f"{says}; give the same, or choose another --out")
            print0(f"{says}: that run's weights and its place in the order of the prompts go on")


def train(c: Config, closing: contextlib.ExitStack) -> None:
    out, ranks = Path(c.out), int(os.environ.get("WORLD_SIZE", 1))
    if c.engine == "vllm-server":
        c.rollout_ranks = c.rollout_ranks or ranks // 2
        assert c.rollout_ranks, "--engine vllm-server needs two ranks or more: torchrun --nproc-per-node 2 ..."
    trainers, link, number = ranks - c.rollout_ranks, None, int(os.environ.get("RANK", 0))
    assert trainers > 0, f"--rollout-ranks {c.rollout_ranks} of {ranks} ranks leaves none to train"
    for name, many in (("ranks that train", trainers), ("ranks that generate", c.rollout_ranks or trainers)):
        assert c.prompts % many == 0, f"--prompts {c.prompts} does not divide over {many} {name}"
    device, store = (common.init_apart(trainers, c.patience) if c.rollout_ranks else
                     (common.init_distributed(c.patience), None))
    if c.threads:
        torch.set_num_threads(c.threads)
    step, cursor, updates, resumed = 0, 0, 0, common.latest(c.out)
    if resumed and not c.resume:
        raise UserError(f"{out} already holds {resumed.name}: go on with --resume, or choose another --out")
    if resumed:
        check_resumed(c, resumed)
    source = str(resumed or checkpoint_folder(c.model))
    sft = train_sft.Config(stage="pretrain", model=source, tokenizer="" if resumed else c.tokenizer, data=c.data,
                           out=c.out, trainable=c.trainable, lr=c.lr, min_lr=0.0, weight_decay=c.weight_decay,
                           beta2=c.beta2, eps=1e-8, seq_len=1,
                           dtype=c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32",
                           attention=c.attention, recompute=c.recompute, compile=c.compile, seed=c.seed)
    (config, tok), dtype = train_sft.described(sft), {"bf16": torch.bfloat16, "fp32": torch.float32}[sft.dtype]
    assert c.replay == "none" or config.num_experts, f"--replay {c.replay}: {c.model} has no experts"
    if c.rollout_ranks:
        trainer = json.loads((resumed / "trainer.json").read_text()) if resumed else {"step": 0, "cursor": 0}
        link = engines.Link(store, out, number < trainers, number if number < trainers else number - trainers,
                            c.rollout_ranks, device, c.patience)
        if number >= trainers:
            engine = closing.enter_context(contextlib.closing(make_engine(c, config, dtype, device, out)))
            return generate_ahead(c, link, engine, config, dtype, tok, number - trainers, trainer["step"],
                                  trainer["cursor"])
    engine = None if link else closing.enter_context(contextlib.closing(make_engine(c, config, dtype, device, out)))
    model, _ = train_sft.build(sft, device)
    optimizer = train_sft.adamw(model, sft)
    if resumed:
        trainer = common.load_state(model, optimizer, resumed)
        step, cursor, updates = trainer["step"], trainer["cursor"], trainer["updates"]
        print0(f"resumed from {resumed} at step {step}")
    if link:
        closing.callback(link.finish)
        link.publish(model, dtype)
    else:
        engine.load(gathered(model, dtype))
    prompts = Prompts(c, tok, c.context or config.max_position_embeddings)
    verifiers = None if link else closing.enter_context(make_verifiers(c))
    first = None
    if c.kl:
        first = Innovator.from_pretrained(c.model, dtype, device, c.attention)
    print0(f"{c.recipe}: {c.model}, {sum(p.numel() for p in model.parameters()):,} parameters; {world()} x "
           f"{device.type}, {sft.dtype}, attention {model.impl}, engine {c.engine}"
           + (f" on {c.rollout_ranks} ranks of its own" if link else ""))
    if c.rollout_ranks and c.staleness and c.correction == "none":
        print0(f"--staleness {c.staleness} without --correction: samples of older weights count as the trainer's own")
    print0("config:", json.dumps(asdict(c)), "commit:", common.commit())
    log = common.Log(out, step)
    if is_rank0():
        common.write_json(out / "run.json", {"config": asdict(c), "commit": common.commit()})
        trim_rollouts(out / "rollouts.txt", step)
    alive = common.watchdog(c.patience, "the run")
    asked, stop, saved = common.on_sigterm(), False, step

    def save() -> int:
        train_sft.save(c, model, optimizer, step, {"cursor": cursor, "updates": updates})
        if is_rank0() and step < c.steps:  # the end draws it anyway
            common.plot_metrics(out, CURVES)
        return step
    def rate(): return c.lr * min(1.0, updates / max(c.warmup, 1), (c.steps - step) / max(c.decay * c.steps, 1))
    bar = tqdm(total=c.steps, initial=step, desc=c.recipe, disable=None if is_rank0() else True)
    while step < c.steps and not stop:
        t0 = now(device)
        if link:
            made = link.take(step, asked, alive)
            if not everywhere(made is not None):  # a SIGTERM, which some ranks may see later than others
                break
            responses, rows, counts, cursor = taken(c, made)
            row = {"staleness": step - sum(b[4] for b in made) / len(made)}
        else:
            responses, rows, counts, cursor = collect(c, engine, prompts, verifiers, cursor, step, tok, rank(), world(),
                                                      alive)
            engine.sleep()
            row = {}
        assign_advantages(c, responses, step)
        t1 = now(device)
        alive()
        # neighbours: groups stay together where a part holds whole ones; an empty part still runs empty micro-batches
        ends = [len(responses) * k // c.updates for k in range(c.updates + 1)]
        parts = [update_part(c, responses[a:b], model, tok, device) for a, b in zip(ends, ends[1:])]
        parts = [(batches, counted) for batches, counted in parts if batches]
        every, stats = [b for batches, _ in parts for b in batches], []
        if every:
            row |= recompute_old(model, every, c) | gap(every)
            if first is not None:
                with torch.no_grad():
                    for b in every:
                        b.first = first(b.pack, entropy=False, temperature=c.temperature)[0][b.copy]
        for batches, counted in parts:
            updates += 1
            stats.append(update(c, model, optimizer, batches, counted, rate()))
            alive()
        t2 = now(device)
        step += 1
        if step < c.steps:  # the last weights feed nobody
            link.publish(model, dtype, asked, alive) if link else engine.load(gathered(model, dtype))
        t3 = now(device)
        counts.update(kept=len(responses), asked=bool(asked))
        sums = summed(counts)
        if link and is_rank0():
            link.drop(step - 1)
        stop, made = sums["asked"] > 0, max(sums["responses"], 1)
        errors = Counter({k[1]: n for k, n in sums.items() if k[0] == "error"})
        spoilt = errors.pop(NOT_FINITE, 0)
        row = {"step": step, "reward": sums["reward"] / made, "accuracy": sums["accuracy"] / made,
               "by_type": {k[1]: sums["reward", k[1]] / n for k, n in sums.items() if k[0] == "responses"},
               "length": sums["tokens"] / made, "truncated": sums["truncated"] / made,
               "verifier_errors": errors.total(), "verifier_error": errors.most_common(1)[0][0] if errors else "",
               "engine_errors": spoilt, "responses": sums["kept"], "made": sums["responses"],
               "bad_rows": sums["bad"], "equal_groups": sums["equal"] / max(sums["groups"], 1), **row,
               **({"no_experts": sums["no experts"]} if c.replay == "engine" else {}),
               **({"judge_failed": sums["judge failed"] / max(sums["judge asked"], 1)} if c.judge else {}),
               **{k: sum(s[k] for s in stats) / len(stats) for k in (stats[0] if stats else ())},
               "generate_s": t1 - t0, "train_s": t2 - t1, "sync_s": t3 - t2,
               "waking_s": engine.waking if engine and step < c.steps else 0.0, "tok_s": sums["tokens"] / (t3 - t0)}
        if device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 2 ** 30
        log.write(row)
        if is_rank0():
            write_rollouts(out / "rollouts.txt", step, responses, rows)
        failed = errors.total() + spoilt
        bar.set_postfix_str(f"reward {row['reward']:.3f} accuracy {row['accuracy']:.3f} length {row['length']:.0f} "
                            f"equal {row['equal_groups']:.2f}{f' errors {failed}' * bool(failed)}")
        bar.update()
        if c.save_every and (step % c.save_every == 0 or step == c.steps or stop):
            saved = save()
        alive()
    bar.close()
    if link:
        link.finish()
    if c.save_every and step > saved:  # a SIGTERM came while the generating ranks were waited for
        save()
    if is_rank0():
        picture = common.plot_metrics(out, CURVES) if step else ""
        print(f"wrote {common.latest(out) or 'no checkpoint'}, {log.path}, {out / 'rollouts.txt'}, {picture}")
        print(f"stopped at step {step} of {c.steps}; go on with --resume" if step < c.steps else
              f"next: python evaluate.py {c.out}" if c.save_every else "next: the same without --save-every 0")


if __name__ == "__main__":
    common.run(main)
