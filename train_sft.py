"""Supervised training: the three stages of Innovator-VL, plain text pretraining, and the three trained stages that
upcycle a dense model to Innovator's MoE.

    torchrun --nproc-per-node 8 train_sft.py --stage align --model stage0 --data LLaVA-558K --out runs/align
    torchrun --nproc-per-node 8 train_sft.py --stage mid --model runs/align --data Mid-Training-85M --out runs/mid
    torchrun --nproc-per-node 8 train_sft.py --stage instruct --model runs/mid --data Instruct-46M --out runs/instruct
    python train_sft.py --stage pretrain --model preset:tiny --tokenizer DIR --data text.jsonl --out runs/text

    python upcycle.py induct --dense Qwen2.5-7B --discipline chemistry --out chemistry0
    torchrun --nproc-per-node 8 train_sft.py --stage induct --model chemistry0 --data chemistry --out runs/chemistry
    python upcycle.py split --dense Qwen2.5-7B --expert chemistry=runs/chemistry --expert ... --out split
    torchrun --nproc-per-node 8 train_sft.py --stage route --model split --data labelled --out runs/route
    torchrun --nproc-per-node 8 train_sft.py --stage integrate --model runs/route --ep 8 \
        --data general science --weights 0.3 0.7 --out runs/integrate

One GPU or a CPU runs the same lines without torchrun. STAGES below holds the released settings; every one can be given
on the command line. --model takes a Hugging Face folder, the folder of an earlier run (its newest checkpoint) or
preset:NAME (random weights). A run leaves step_XXXXXXXX/ (the model in the released layout, and state/ to resume from),
metrics.jsonl and curves.png; with --val also val.jsonl: loss per discipline, and where a MoE's router sends it.

Departures from the released recipe (Innovator-VL quick start scripts; its report confirms the trained modules only)
1. The loss is normalised by the supervised tokens of the whole step, over ranks and micro-batches. The released code
   averages per pack (align, mid) or sample (instruct): --loss-average pack or document.
2. instruct takes 288 rows a step as released, but packs them (exactly the same mathematics, no padding).
3. align and mid pack to 8192 tokens, the length of the released packing configuration (its 32768 is only a bound).
4. The warm-up's first step has lr / warm-up steps, not zero.
5. pretrain has no released counterpart; its settings are ours.
6. Of induct, route and integrate the Innovator paper (arXiv:2507.18671, section 4) gives what trains, the losses' names
   and, for integrate, 8192 tokens a sequence and 300B in all; learning rates, batches and coefficients are ours.
7. In route each router learns from its own layer's losses alone: nothing is sent back through frozen layers, nor is the
   language loss used. A router is then a classifier of its layer's input, and the stage costs one forward pass.
"""
import functools
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import common
from common import UserError, is_rank0, print0, rank, world
from data import Limits, Loader, Source, Tokenizer, best_fit_decreasing, labels_of, pack_of, survey, to_device
from model import Innovator, ModelConfig, checkpoint_folder, config_of, init_weights, load_weights, save_weights
from moe import load_statistics

# --trainable names -> start of parameter names
MODULES = {"language_model": r"model\.|lm_head\.", "adapter": r"visual\.merger\.",
           "vision_model": r"visual\.(patch_embed|class_|pre_layernorm|blocks)",
           "experts": r"model\.layers\.\d+\.mlp\.experts\.", "routers": r"model\.layers\.\d+\.mlp\.gate\."}
TEXT_STAGES = ("pretrain", "induct", "route", "integrate")  # need no vision tower
STAGES = {
    "pretrain": dict(trainable=["language_model"], lr=3e-4, min_lr=3e-5, warmup=0.01, weight_decay=0.1, beta2=0.95,
                     steps=10000, batch=64, unit="packs", seq_len=8192, max_side=0),
    "align": dict(trainable=["adapter"], lr=1e-4, min_lr=1e-6, warmup=0.002, weight_decay=0.0, beta2=0.99, steps=4000,
                  batch=8, unit="packs", seq_len=8192, max_side=0),
    "mid": dict(trainable=["language_model", "adapter", "vision_model"], lr=1e-5, min_lr=1e-6, warmup=0.002,
                weight_decay=0.01, beta2=0.95, steps=78373, batch=96, unit="packs", seq_len=8192, max_side=0),
    "instruct": dict(trainable=["language_model", "adapter", "vision_model"], lr=1e-5, min_lr=1e-6, warmup=0.002,
                     weight_decay=0.0, beta2=0.99, steps=171875, batch=288, unit="rows", seq_len=32768, max_side=1000),
    "induct": dict(trainable=["experts"], lr=1e-4, min_lr=1e-5, warmup=0.01, weight_decay=0.1, beta2=0.95, steps=5000,
                   batch=64, unit="packs", seq_len=8192, max_side=0, balance=0.0, z=0.0),
    "route": dict(trainable=["routers"], lr=1e-3, min_lr=1e-4, warmup=0.01, weight_decay=0.0, beta2=0.95, steps=500,
                  batch=64, unit="packs", seq_len=8192, max_side=0, label=1.0, z=0.0, recompute="none"),
    "integrate": dict(trainable=["language_model"], lr=1e-4, min_lr=1e-5, warmup=0.01, weight_decay=0.1, beta2=0.95,
                      steps=71526, batch=512, unit="packs", seq_len=8192, max_side=0),
}
NEXT = {"pretrain": "python upcycle.py stage0 --llm {0} ... or python upcycle.py induct --dense {0} ...",
        "align": "python train_sft.py --stage mid --model {0} ...",
        "mid": "python train_sft.py --stage instruct --model {0} ...", "instruct": "python evaluate.py {0}",
        "induct": "python upcycle.py split --dense DENSE --expert NAME={0} --expert ...",
        "route": "python train_sft.py --stage integrate --model {0} ...",
        "integrate": "python upcycle.py export {0} OUT"}
EVERY_STAGE = dict(balance=0.01, z=0.001, label=0.0, recompute="selective")  # unless its row says otherwise


@dataclass
class Config:
    stage: Literal["align", "mid", "instruct", "pretrain", "induct", "route", "integrate"]  # defaults of fields with *
    model: str  # checkpoint folder, run folder, or preset:NAME for random weights
    data: list[str]  # files or folders in any published format
    out: str  # folder of this run
    weights: list[float] | None = None  # share of the rows drawn from each --data path; default: all rows once an epoch
    tokenizer: str = ""  # folder or file; empty: the model's own
    trainable: list[str] | None = None  # * modules that train: language_model adapter vision_model experts routers
    lr: float | None = None  # * peak learning rate
    min_lr: float | None = None  # * floor of the cosine
    warmup: float | None = None  # * share of the steps that warm up linearly
    weight_decay: float | None = None  # * on matrices only
    beta1: float = 0.9  # Adam
    beta2: float | None = None  # * Adam
    eps: float = 1e-5  # Adam
    clip: float = 1.0  # largest gradient norm
    steps: int | None = None  # * optimizer steps of the whole run
    batch: int | None = None  # * packs (or rows) a step, over all ranks
    unit: Literal["packs", "rows"] | None = None  # * what batch counts: full packs, or exactly this many rows, packed
    seq_len: int | None = None  # * tokens a pack, and longest document
    loss_average: Literal["token", "pack", "document"] = "token"  # what weighs the same in the loss
    balance: float | None = None  # * coefficient of the experts' balance loss (moe.routing_losses has all three)
    z: float | None = None  # * coefficient of the routers' z-loss
    label: float | None = None  # * coefficient of the discipline loss on the routers
    label_loss: Literal["bce", "ce"] = "bce"  # its form: multi-label, or cross-entropy with the discipline's experts
    val: list[str] | None = None  # held-out files or folders: loss per discipline before, during and after training
    val_every: int = 0  # steps between validations; 0: only before the first step and after the last
    min_pixels: int = 3136  # smallest image area
    max_pixels: int = 2560000  # largest image area
    max_side: int | None = None  # * longest image side first reduced to this, 0: off
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # compute; auto: bf16 on GPUs, fp32 on CPUs; masters are fp32
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"  # packed attention; auto: the fastest that runs
    ep: int = 1  # expert parallelism: neighbouring ranks that divide the experts among them; divides the ranks
    recompute: Literal["none", "selective", "full"] | None = None  # * activation checkpointing per block
    compile: bool | None = None  # torch.compile per block; default on GPUs only
    workers: int = 4  # data processes a rank
    prefetch: int = 4  # steps the loader stays ahead
    window: int = 4096  # rows measured and packed together
    plan: str = ""  # packing plan of data.py pack, instead of windows
    on_bad: Literal["stop", "skip"] = "stop"  # bad rows: stop at the first, or count and list them
    max_bad: float = 0.01  # share of bad rows (of at least 1000) above which skipping stops too
    seed: int = 1234  # order of the data, fresh weights
    threads: int = 0  # CPU threads of torch a rank, 0: torch's choice
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints that stay
    resume: bool = False  # go on from the newest checkpoint in --out
    log_samples: bool = False  # write the documents of every step to samples_rankN.jsonl

    def __post_init__(self):
        for key, value in (EVERY_STAGE | STAGES[self.stage]).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for name in self.trainable:
            assert name in MODULES, f"--trainable {name}: choose from {', '.join(MODULES)}"
        assert self.steps > 0 and self.batch > 0, f"steps {self.steps} and batch {self.batch} must be positive"
        assert 0 <= self.min_lr <= self.lr, f"min_lr {self.min_lr} must lie in 0..lr {self.lr}"


def learning_rate(c: Config, step: int) -> float:
    """Linear warm-up, then a cosine to min_lr at the last step."""
    warmup = round(c.warmup * c.steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, c.steps - warmup)
    return c.min_lr + 0.5 * (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress))


def _save_policy():
    """Keeps attention outputs, every second matrix product of a block, and the routers' choices: which experts a token
    goes to is never decided twice. Everything else is computed again."""
    ops, count, grouped = torch.ops, 0, 0
    keep = {getattr(ops.aten, n).default for n in (
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")}
    for namespace, name in (("torch_attn", "_varlen_attn"), ("flash_attn", "_flash_attn_varlen_forward")):
        if hasattr(getattr(ops, namespace), name):
            keep.add(getattr(getattr(ops, namespace), name).default)
    keep.add(ops.aten.topk.default)

    def policy(ctx, op, *args, **kwargs):
        nonlocal count, grouped
        if op in (ops.aten.mm.default, ops.aten.addmm.default):
            count += 1
            return CheckpointPolicy.MUST_SAVE if count % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        if op is ops.aten._grouped_mm.default:  # the first of two, the gate/up product: the one kept for the backward
            grouped += 1
            return CheckpointPolicy.MUST_SAVE if grouped % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE
    return policy


def _selective_contexts():
    # forward and recomputation each count their own products, so both make the same choices
    forward, again = _save_policy(), _save_policy()
    return create_selective_checkpoint_contexts(
        lambda ctx, *a, **k: (again if ctx.is_recompute else forward)(ctx, *a, **k))


def prepare_blocks(model: Innovator, recompute: str, compile: bool) -> None:
    """Wraps each block's run(): recomputation inside, compilation (one graph for all blocks of a kind) outside."""
    choices = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    for block in [*model.model.layers, *(model.visual.blocks if model.visual is not None else [])]:
        run = block.run
        if recompute != "none":
            extra = dict(context_fn=_selective_contexts if recompute == "selective" else choices)
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False, **extra)
        block.run = torch.compile(run) if compile else run


def described(c: Config) -> tuple[ModelConfig, Tokenizer]:
    """The configuration that --model names, fit for the tokenizer and the stage, and the tokenizer."""
    fresh = c.model.startswith("preset:")
    assert not fresh or c.tokenizer, "a preset has no tokenizer: give one with --tokenizer DIR"
    config = config_of(c.model)
    tok = Tokenizer(c.tokenizer or checkpoint_folder(c.model))
    if fresh:
        config.token_ids = tok.token_ids()
        config.vocab_size = max(config.vocab_size, math.ceil(tok.size / 128) * 128)
        if c.stage in TEXT_STAGES:
            config.vision = None
    assert tok.size <= config.vocab_size, \
        f"the tokenizer has {tok.size} tokens, the model's embedding {config.vocab_size} rows"
    assert tok.image_pad == config.image_token_id or config.vision is None, \
        f"<|image_pad|> is {tok.image_pad} in the tokenizer, {config.image_token_id} in config.json"
    assert config.vision is not None or c.stage in TEXT_STAGES, \
        f"{c.model} has no vision tower; make one: python upcycle.py stage0 -h"
    assert c.stage != "induct" or config.num_experts == 1, \
        f"{c.model} has {config.num_experts} experts; induct trains one: python upcycle.py induct -h makes it"
    assert c.stage not in ("route", "integrate") or config.num_experts > 1, \
        f"{c.model} has {config.num_experts} experts; make a MoE: python upcycle.py split -h"
    assert not c.label or config.expert_groups, f"{c.model} does not say which discipline owns which expert: " \
        "train routers on a model from upcycle.py split, or with --label 0"
    assert c.seq_len <= config.max_position_embeddings, \
        f"seq_len {c.seq_len} exceeds the model's {config.max_position_embeddings}"
    return config, tok


def build(c: Config, device: torch.device) -> tuple[Innovator, Tokenizer]:
    """The sharded model with its weights, and the tokenizer."""
    config, tok = described(c)
    model = Innovator.on_meta(config)
    model.attention, model.assets = c.attention, tok.path.parent
    trains = re.compile("|".join(MODULES[name] for name in c.trainable))
    for name, p in model.named_parameters():
        p.requires_grad_(bool(trains.match(name)))
    assert any(p.requires_grad for p in model.parameters()), f"--trainable {c.trainable}: the model has no such part"
    common.shard(model, {"bf16": torch.bfloat16, "fp32": torch.float32}[c.dtype], c.ep)
    for block in model.model.layers if config.num_experts else ():
        block.mlp.router_only, block.mlp.label_loss = c.stage == "route", c.label_loss
        if c.stage == "route":  # the backward pass of a router's own losses needs no parameter of the block: without
            for unit in filter(None, (block, block.around)):  # this, all blocks would be gathered at the same time
                unit.set_unshard_in_backward(False)
    model.to_empty(device=device)
    if c.model.startswith("preset:"):
        init_weights(model, c.seed)
    else:
        load_weights(model, c.model)
    prepare_blocks(model, c.recompute, c.compile)
    return model.train(), tok


def adamw(model: Innovator, c: Config) -> torch.optim.AdamW:
    """Weight decay on matrices only; biases, norms and single vectors have none."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=same, weight_decay=decay)
              for decay, some in ((c.weight_decay, [p for p in params if p.ndim >= 2]),
                                  (0.0, [p for p in params if p.ndim < 2]))
              for same in common.by_mesh(some)]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def open_data(c: Config, model: Innovator, tok: Tokenizer, names: list[str] | None):
    """The loader of --data and, with --val, what validates."""
    # what a document costs, up to a common factor: FLOPs per token, token^2, patch, patch^2
    vit, linear = model.config.vision, model.train_flops([1], [], 0)
    cost = [linear, model.train_flops([1000], [], 0) / 1e6 - linear / 1e3]
    cost += [72 * vit.embed_dim ** 2 * vit.depth, 12 * vit.embed_dim * vit.depth] if vit else [0, 0]
    limits = Limits(c.min_pixels, c.max_pixels, c.max_side)
    source = Source(c.data, str(tok.path), limits, c.seq_len, names if c.label else None)
    loader = Loader(source, c.batch, c.unit, weights=c.weights, seed=c.seed, rank=rank(), world=world(),
                    workers=c.workers, prefetch=c.prefetch, window=c.window, plan=c.plan or None, pad=c.compile,
                    average=c.loss_average, vision=vit is not None, on_bad=c.on_bad, max_bad=c.max_bad,
                    bad_file=Path(c.out) / f"bad_rows_rank{rank()}.jsonl", cost=cost)
    if c.label:
        source.check_labels()
    held_out = Source(c.val or [], str(tok.path), limits, c.seq_len)
    return loader, Validation(c, held_out, c.compile, vit is not None) if c.val else None


class Validation:
    """Held-out rows, packed once; every rank keeps its packs."""
    def __init__(self, c: Config, source: Source, pad: bool, vision: bool):
        found = survey(source, 0, False)
        if found.bad:
            raise UserError("--val: {file}, {row} ({at}): {reason}".format_map(found.bad[0]))
        packs = best_fit_decreasing(found.items[:, 2], c.seq_len)
        packs += [np.zeros(0, np.int64)] * (-len(packs) % world())  # ranks run alike, so that collectives line up
        self.packs = [pack_of(source, found.items[np.sort(p)], c.seq_len if pad else 0, "token", vision)
                      for p in packs[rank()::world()]]
        every = [None] * world()
        dist.all_gather_object(every, sorted({g for p in self.packs for g in p.groups}))
        self.groups = sorted({g for groups in every for g in groups})

    @torch.no_grad()
    def run(self, model: Innovator, device: torch.device) -> dict:
        """{"loss": {discipline: mean over its supervised tokens}} and, of a MoE, load_statistics on these rows."""
        names, sums, counts = model.config.expert_groups, torch.zeros(2, len(self.groups), device=device).double(), 0
        for p in self.packs:
            logp_S, _, routing = model(to_device(p, device, model.impl, model.mixed_dtype, names), entropy=False)
            group_S = torch.from_numpy(labels_of(p, self.groups)[p.rows]).to(device)
            sums.index_add_(1, group_S, torch.stack([-logp_S, torch.ones_like(logp_S)]).double())
            counts += routing[1] if routing else 0
        for x in (sums, *([counts] if routing else [])):
            dist.all_reduce(x)
        nll, n = sums.tolist()
        loss = {g or "all": a / b for g, a, b in zip(self.groups, nll, n) if b}
        load = load_statistics(counts.cpu(), names) if routing else {}
        return {"loss": loss, "mean": sum(nll) / max(sum(n), 1)} | load


def stop_non_finite(c: Config, step: int, packs: list, losses: list[float], norm: float) -> None:
    """All ranks end before the update; the documents of the packs whose loss is not finite (of all packs, if only the
    gradient is not) are named and written down."""
    mine = [name for p, loss in zip(packs, losses) if not math.isfinite(loss) for name in p.names]
    every = [None] * world()
    dist.all_gather_object(every, (mine, [name for p in packs for name in p.names]))
    names = [n for bad, _ in every for n in bad] or [n for _, whole in every for n in whole]
    file = Path(c.out) / f"non_finite_step_{step}.json"
    if is_rank0():
        common.write_json(file, names)
    raise UserError(f"step {step}: loss or gradient norm ({norm}) is not finite; nothing was updated. "
                    f"{len(names)} documents in the packs concerned: {', '.join(names[:4])}"
                    f"{' ...' if len(names) > 4 else ''}; all are in {file}")


def save(c, model, optimizer, step: int, trainer: dict) -> None:
    """step_XXXXXXXX/ of a run; `trainer`: what its script needs to go on. Older ones than --keep are removed."""
    folder = Path(c.out) / f"step_{step:08d}"
    with common.atomic_dir(folder) as tmp:
        save_weights(model, tmp, model.mixed_dtype)
        common.save_state(model, optimizer, tmp, {"step": step, "world": world(), "config": asdict(c),
                                                  "commit": common.commit(), **trainer})
    model.assets = model.assets and folder  # the checkpoint that the run was resumed from may go now
    if is_rank0():
        for old in sorted(Path(c.out).glob("step_????????"))[:-c.keep]:
            common.remove_dir(old)


def main() -> None:
    c = common.parse(Config, doc=__doc__)
    device = common.init_distributed()
    c.dtype = c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    c.compile = device.type == "cuda" if c.compile is None else c.compile
    if c.compile and c.ep > 1:
        print0("expert parallelism exchanges tokens inside blocks: compile is off")
        c.compile = False
    if c.threads:
        torch.set_num_threads(c.threads)
    out, start, resumed = Path(c.out), 0, common.latest(c.out)
    if resumed and not c.resume:
        raise UserError(f"{out} already holds {resumed.name}: go on with --resume, or choose another --out")
    if resumed:  # weights of frozen modules come from the checkpoint's model, masters of trained ones from its state
        c.model, c.tokenizer = str(resumed), ""
    model, tok = build(c, device)
    optimizer = adamw(model, c)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"{c.stage}: {c.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} train; "
           f"{world()} x {device.type}, {c.dtype}, attention {model.impl}, recompute {c.recompute}, "
           f"compile {'on' if c.compile else 'off'}")
    print0("config:", json.dumps(asdict(c)), "commit:", common.commit())

    names = model.config.expert_groups if model.config.num_experts else None  # None: no routing to look at
    loader, val = open_data(c, model, tok, names)
    coefficients = torch.tensor([c.balance, c.z, c.label], device=device)
    before = 0.0
    if resumed:
        trainer = common.load_state(model, optimizer, resumed)
        start, before = trainer["step"], trainer["seconds"]
        loader.load_state(trainer["loader"])
        print0(f"resumed from {resumed} at step {start}" + ("" if trainer["world"] == world() else
               f" (saved by {trainer['world']} ranks: the same sample order, sums in another order)"))
    log, val_log = common.Log(out, start), common.Log(out, start, "val.jsonl")
    if is_rank0():
        common.write_json(out / "run.json", {"config": asdict(c), "commit": common.commit()})

    asked, stop = common.on_sigterm(), False
    peak, dtype, began = common.peak_flops(device), model.mixed_dtype, time.perf_counter()
    bar = tqdm(total=c.steps, initial=start, desc=c.stage, disable=None if is_rank0() else True, mininterval=1)
    steps = iter(loader)
    step = start
    if val and not start:
        val_log.write({"step": 0} | val.run(model, device))
    while step < c.steps and not stop:
        t0 = time.perf_counter()
        data = next(steps)
        t1 = time.perf_counter()
        # host-side totals of the step over all ranks: the loss's denominator is needed before the first backward pass
        totals = torch.tensor([sum(p.denominator for p in data.packs), sum(p.tokens for p in data.packs),
                               sum(model.train_flops(p.lengths, p.grids, len(p.rows)) for p in data.packs)],
                              dtype=torch.float64)
        dist.all_reduce(totals)
        denominator, tokens, flops = totals.tolist()
        losses, extra, counts = [], torch.zeros(3, device=device), None  # extra: balance, z, label, mean over layers
        for p in data.packs:
            loss, _, routing = model(to_device(p, device, model.impl, dtype, names))
            losses.append(loss.detach())
            loss = loss / max(denominator, 1)  # sharding sums over ranks
            if routing:
                loss = loss + (routing[0].sum(0) @ coefficients) * (p.tokens / tokens)
                extra += routing[0].detach().mean(0) * (p.tokens / tokens)
                counts = routing[1] if counts is None else counts + routing[1]
            loss.backward()
        norm = common.clip_gradients([p for p in model.parameters() if p.requires_grad], c.clip)
        local = torch.cat([torch.stack([sum(losses).double() / max(denominator, 1),
                                        torch.tensor(float(bool(asked)), device=device)]), extra,
                           *([counts.flatten()] if counts is not None else [])]).double()
        dist.all_reduce(local)
        norm, loss, stopping, *extra = torch.cat([norm.double()[None], local]).tolist()  # the one wait for the device
        if not (math.isfinite(loss) and math.isfinite(norm)):
            stop_non_finite(c, step, data.packs, torch.stack(losses).tolist(), norm)
        stop = stopping > 0
        lr = learning_rate(c, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": int(tokens),
               "supervised": denominator, "tok_s": tokens / (now - t0), "wait_s": t1 - t0,
               "seconds": before + now - began, "epoch": data.state["epoch"],
               "bad_rows": sum(data.state["bad"].values())}
        if names is not None:
            counts = torch.tensor(extra[3:]).view(counts.shape)
            row |= dict(zip(("balance", "z", "label"), extra)) | load_statistics(counts, names)
        if peak:
            row |= {"mfu": flops / (now - t0) / world() / peak, "peak_gb": torch.cuda.max_memory_allocated() / 2 ** 30}
        log.write(row)
        if c.log_samples:
            with open(out / f"samples_rank{rank()}.jsonl", "a") as f:
                f.write(json.dumps({"step": step, "samples": [p.names for p in data.packs]}) + "\n")
        bar.set_postfix_str(f"loss {loss:.4f} norm {norm:.2f} {row['tok_s']:.0f} tok/s"
                            + (f" MFU {row['mfu']:.1%} {row['peak_gb']:.0f} GB" if peak else "")
                            + (f" bad {row['bad_rows']}" if row["bad_rows"] else ""))
        bar.update()
        if val and (step == c.steps or c.val_every and step % c.val_every == 0):
            val_log.write({"step": step} | val.run(model, device))
        if step % c.save_every == 0 or step == c.steps or stop:
            save(c, model, optimizer, step, {"loader": data.state, "seconds": row["seconds"]})
    bar.close()
    steps.close()
    if is_rank0():
        print(f"wrote {common.latest(out)}, {out / 'metrics.jsonl'}"
              + (f", {common.plot_metrics(out)}" if step > start else ""))
        print(f"stopped at step {step} of {c.steps}; go on with --resume" if step < c.steps else
              f"next: {NEXT[c.stage].format(c.out)}")


if __name__ == "__main__":
    common.run(main)
