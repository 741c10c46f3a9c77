"""Measures what the README's tables say. Every run prints the machine's own ceilings first.

    python bench.py train --model preset:innovator-vl-8b --stage align --tokenizer DIR --data DIR     one GPU
    torchrun --nproc-per-node 2 bench.py train --model preset:innovator-vl-8b --stage mid --tokenizer DIR --data DIR
    python bench.py generate --model preset:innovator-53b-a13b
    python bench.py rl                               the trainer's side of RL on ragged responses, ours and TRL's
    python bench.py harness --model preset:qwen3-8b --tokenizer DIR --data DIR       evaluate.py and lm_eval
    python bench.py packing                          fill and samples/s of the packers on a log-normal length file
    python bench.py upcycle --train TEXT --val TEXT --tokenizer DIR --out runs/upcycle      the upcycling experiment
    python bench.py report runs/upcycle              its table and pictures again

train runs train_sft.py's own step (same model, loader, sharding, optimizer) for --steps steps, leaves the first third
out and prints the median. Letters: tok/s counts real tokens of all ranks; MFU uses the data sheet's dense bf16 peak.

rl takes one batch of fixed responses with log-normal lengths through train_rl.py's packing, old log-probabilities and
updates, again and again; and through GRPOTrainer.train() if trl is installed, with these responses in the place of its
generation. Both have fp32 masters, AdamW, the same loss, clip and responses an update; in bf16 ours gathers blocks in
bf16, TRL uses autocast. TRL pads all sequences to the batch's longest prompt and longest response; the fastest of its
micro-batch sizes counts, with Liger's layer kernels where they are installed and faster. Gradient norms differ by TRL's
1e-4 beside the standard deviation (ours 1e-5) and, for dapo, by its mean over updates in the denominator.

harness runs evaluate.py --engine vllm and lm_eval (lm-evaluation-harness 0.4.13) --model vllm on one checkpoint with
the same documents and prompts, each in a process of its own, one after the other: MMLU 5-shot (log-likelihoods) and
GSM8K 8-shot (generation) from mmlu/dev/*.csv, mmlu/test/*.csv and gsm8k/test.jsonl below --data. Wall time is the whole
process's; lm_eval's cache of data sets is filled before. lm_eval has batch size auto and vLLM's defaults; memory,
context and budget are the same on both sides. Until ready: when vLLM has our weights, or lm_eval begins to ask; for
log-likelihoods evaluate.py's log does not tell it.

upcycle asks the Innovator paper's questions (arXiv:2507.18671, Tables 2 and 4, Figure 3) of a small model: a dense
model is pretrained mostly on rows of discipline 'general', becomes a MoE by induct, split, route and integrate, and is
compared with the same dense model trained on, on integrate's mixture: with as many tokens as integrate (the paper's
comparison), and with as many as the three stages took together.
It runs upcycle.py and train_sft.py as a user would (every command is in commands.sh), --jobs at a time, and goes on
where it was stopped. --variants all adds the granularities 1, 2 and 4 slices, no induction (copies), no routing
warm-up, no shared expert, and shorter integrations.
"""
import csv
import gc
import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import train_rl
import tasks
import train_sft
from data import Dataset, Doc, Tokenizer, best_fit_decreasing
from model import PRESETS, Innovator, config_of


def ceilings(device: torch.device) -> str:
    """bf16 matrix product and device copy of this machine, now."""
    if device.type != "cuda":
        return "no GPU"
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2 ** 30, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    def time_of(fn, n):
        for _ in range(3):
            fn()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(n):
            fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / n / 1e3
    mm = 2 * 8192 ** 3 / time_of(lambda: a @ b, 20) / 1e12
    copy = 2 * x.nbytes / time_of(lambda: y.copy_(x), 10) / 1e12
    return (f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: matmul 8192^3 bf16 {mm:.0f} TFLOP/s, "
            f"copy {copy:.2f} TB/s")


def train(argv: list[str]) -> None:
    """A short run of train_sft.py; the row of the README's table. --layers N cuts a preset to N blocks."""
    if "--layers" in argv:
        at = argv.index("--layers")
        name = argv[argv.index("--model") + 1].removeprefix("preset:")
        PRESETS[name] = replace(PRESETS[name], num_hidden_layers=int(argv[at + 1]))
        argv = argv[:at] + argv[at + 2:]
    out = Path(tempfile.mkdtemp(prefix="bench_"))
    sys.argv = ["train_sft.py", "--out", str(out), "--save-every", str(10 ** 9), *argv]
    train_sft.save = lambda c, *_: Path(c.out)  # the checkpoint is not what is measured
    train_sft.common.plot_metrics = lambda *_: "no picture"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_sft.main()
    if not common.is_rank0():
        return
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, kept = rows[0]["seconds"], rows[len(rows) // 3:]
    median = lambda key: statistics.median(r[key] for r in kept)
    times = [r["tokens"] / r["tok_s"] for r in kept]
    print(ceilings(device))
    print(f"bench: steps {len(kept)}, tokens a step {median('tokens'):.0f}, step {statistics.median(times):.3f} s "
          f"(min {min(times):.3f}, max {max(times):.3f}), {median('tok_s'):.0f} tok/s on {common.world()} rank(s), "
          + (f"MFU {median('mfu'):.3f} of the data sheet's peak, peak {max(r['peak_gb'] for r in rows):.1f} GiB, "
             if "mfu" in rows[0] else "")
          + f"waiting for data {median('wait_s') * 1e3:.1f} ms, first step {first:.0f} s after start, "
          f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}")


@dataclass
class Generate:
    model: str  # folder or preset:NAME (random weights)
    prompts: int = 16  # sequences at a time
    prompt: int = 128  # tokens of each prompt, random
    new: int = 64  # tokens made for each


def generate(c: Generate) -> None:
    """Speed of model.py's own generate, bf16 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Innovator.from_config(config_of(c.model), dtype, device) if c.model.startswith("preset:") else \
        Innovator.from_pretrained(c.model, dtype, device)
    ids = torch.randint(0, 1000, (c.prompts, c.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    seconds = []
    for _ in range(3):
        t0 = time.perf_counter()
        out = model.generate(ids, max_new_tokens=c.new)
        seconds.append(time.perf_counter() - t0)
    print(ceilings(device))
    print(f"generate {c.model}: {sum(map(len, out))} tokens in {min(seconds):.2f} s (first time {seconds[0]:.2f} s), "
          f"{sum(map(len, out)) / min(seconds):.0f} tok/s" + (
              f", peak {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if device.type == "cuda" else ""))


def packing() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 0.9, 1_000_000), 16, 8192).astype(np.int64)
    for name, window in (("global", len(lengths)), ("windows of 4096", 4096)):
        t0 = time.perf_counter()
        packs = [p for i in range(0, len(lengths), window) for p in best_fit_decreasing(lengths[i:i + window], 8192)]
        seconds = time.perf_counter() - t0
        print(f"packing, {name}: fill {lengths.sum() / len(packs) / 8192:.4f}, "
              f"{len(lengths) / seconds / 1e6:.2f} M samples/s on one core")
    print(f"padding each to 8192: fill {lengths.mean() / 8192:.4f}")


# ---- the trainer's side of reinforcement learning -------------------------------------------------------------------
@dataclass
class RL:
    model: str = ""  # folder of a dense text model, or preset:NAME (random weights, no vision); default mini, CPU: tiny
    layers: int = 0  # blocks that a preset is cut to, 0: all
    recipe: Literal["grpo", "dapo"] = "grpo"  # loss, its sum and its clip
    prompts: int = 8  # a batch
    group: int = 16  # responses a prompt
    updates: int = 2  # optimizer steps a batch; at 1 TRL leaves out the old log-probabilities (the ratio is 1)
    prompt: int = 128  # mean tokens of a prompt, before the cut at four times that
    mean: int = 512  # mean tokens of a response, before the cut
    longest: int = 2048  # tokens of a response
    pack: int = 8192  # tokens of our micro-batches
    micro: list[int] | None = None  # sequences of TRL's micro-batches, of which the fastest counts; default 2 4 8 .. 64
    recompute: Literal["none", "selective", "full"] = "none"  # ours; unless none, TRL checkpoints whole blocks
    compile: bool = False  # torch.compile of our blocks
    attention: str = "sdpa"  # attn_implementation of TRL's model; ours takes the fastest that runs
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # compute; masters are fp32
    batches: int = 5  # timed, after 2 of warm-up
    seed: int = 0  # weights, lengths, ids, rewards

    def __post_init__(self):
        cuda = torch.cuda.is_available()
        self.model = self.model or ("preset:mini" if cuda else "preset:tiny")
        self.dtype = self.dtype if self.dtype != "auto" else "bf16" if cuda else "fp32"
        self.each = self.prompts * self.group // self.updates  # responses an optimizer step
        self.micro = [m for m in self.micro or (2, 4, 8, 16, 32, 64) if self.each % m == 0]
        assert self.micro, f"no --micro divides the {self.each} responses of an update"


def rl_ours(c: RL, r: train_rl.Config, responses: list, device, batches: int) -> dict:
    sft = train_sft.Config(stage="pretrain", model=r.model, data=[], out="", lr=r.lr, min_lr=0.0, beta2=r.beta2,
                           weight_decay=r.weight_decay, eps=1e-8, seq_len=1, dtype=c.dtype, recompute=c.recompute,
                           compile=c.compile)
    model, tok = train_sft.build(sft, device)
    optimizer, marks = train_sft.adamw(model, sft), [train_rl.now(device)]
    for k in range(2 + batches):
        parts = [train_rl.update_part(r, responses[n:n + c.each], model, tok, device)
                 for n in range(0, len(responses), c.each)]
        every = [b for batches, _ in parts for b in batches]
        train_rl.recompute_old(model, every, r)
        stats = [train_rl.update(r, model, optimizer, *part, r.lr) for part in parts]
        marks.append(train_rl.now(device))
        if not k:  # from the packs' order to that of the responses, whose numbers `engine` carries
            order, norm = torch.cat([b.engine for b in every]).argsort(stable=True), stats[0]["grad_norm"]
            logp = torch.cat([b.old for b in every])[order].cpu()
    return {"micro": f"{len(every)} packs of {c.pack}, {model.impl}", "marks": marks, "logp": logp, "grad_norm": norm}


def rl_trl(c: RL, r: train_rl.Config, responses: list, device, batches: int, micro: int, liger: bool) -> dict:
    """GRPOTrainer.train() as its users call it; rollout_func returns the responses, a callback is the clock."""
    import transformers
    import trl.trainer.grpo_trainer as theirs
    from datasets import Dataset as Rows
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs.shuffle_sequence_dict = lambda batch: batch  # so that an update has the same responses as ours
    asked, said = zip(*((x.doc.ids[:-len(x.engine)].tolist(), x.doc.ids[-len(x.engine):].tolist()) for x in responses))
    marks, logp = [], [torch.zeros(0)]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:  # what it holds is of the weights before the first update
                logp.extend(b["old_per_token_logps"][b["completion_mask"] > 0].cpu()
                            for b in trainer._buffered_inputs if "old_per_token_logps" in b)
            if state.global_step % c.updates == 0:
                marks.append(train_rl.now(device))
    args = theirs.GRPOConfig(
        output_dir=str(Path(r.model).parent / "trl"), per_device_train_batch_size=micro, num_generations=c.group,
        gradient_accumulation_steps=c.each // micro, steps_per_generation=c.each // micro * c.updates,
        max_completion_length=c.longest, max_steps=(2 + batches) * c.updates, loss_type=c.recipe, epsilon=r.low,
        epsilon_high=r.high, beta=0.0, scale_rewards="group", learning_rate=r.lr, lr_scheduler_type="constant",
        weight_decay=r.weight_decay, adam_beta2=r.beta2, adam_epsilon=1e-8, max_grad_norm=r.clip,
        bf16=c.dtype == "bf16", gradient_checkpointing=c.recompute != "none", use_liger_kernel=liger, seed=c.seed,
        shuffle_dataset=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_first_step=True,
        logging_steps=10 ** 6, use_cpu=device.type == "cpu",
        model_init_kwargs={"dtype": "float32", "attn_implementation": c.attention})
    trainer = theirs.GRPOTrainer(
        model=r.model, reward_funcs=lambda completions, **_: [x.reward for x in responses], args=args,
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(Path(r.model) / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        train_dataset=Rows.from_list([{"prompt": str(k)} for k in range(c.prompts)]), callbacks=[Clock()],
        rollout_func=lambda *_: {"prompt_ids": list(asked), "completion_ids": list(said), "logprobs": None})
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.accelerator.free_memory()
    return {"micro": f"{micro} sequences, {c.attention}{', Liger' if liger else ''}", "marks": marks,
            "sequences": micro, "logp": torch.cat(logp), "grad_norm": trainer.state.log_history[0]["grad_norm"]}


def random_model(c, tokenizer: Path, folder: Path, device, dtype: torch.dtype | None = None) -> str:
    """A preset's random weights as a checkpoint, without vision. -> its folder"""
    config = config_of(c.model)
    model = Innovator.from_config(replace(
        config, vision=None, num_hidden_layers=c.layers or config.num_hidden_layers,
        token_ids=Tokenizer(tokenizer).token_ids()), device=device, seed=c.seed)
    model.assets = tokenizer
    model.save_pretrained(folder, dtype)
    return str(folder)


def rl_responses(c: RL, vocab: int) -> list[train_rl.Response]:
    """Random ids of log-normal lengths and random rewards; `engine` carries the response's number."""
    rng, out = np.random.default_rng(c.seed), []

    def texts(mean, longest, n, sigma=0.8):
        lengths = rng.lognormal(np.log(mean) - sigma ** 2 / 2, sigma, n).round().clip(1, longest).astype(int)
        return [rng.integers(7, vocab, length, dtype=np.int32) for length in lengths]
    prompts = texts(c.prompt, 4 * c.prompt, c.prompts)
    for k, said in enumerate(texts(c.mean, c.longest, c.prompts * c.group)):
        asked = prompts[k // c.group]
        doc = Doc(np.concatenate([asked, said]), np.concatenate([np.full(len(asked), -100, np.int32), said]))
        engine = np.full(len(said), k, np.float32)
        out.append(train_rl.Response(k // c.group, doc, "", engine, False, reward=rng.random()))
    return out


def rl(c: RL) -> None:
    device, folder = common.init_distributed(), Path(tempfile.mkdtemp(prefix="bench_"))
    assert common.world() == 1, "rl measures one process"
    special = [f"<|{n}|>" for n in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
                                    "video_pad")]
    vocabulary = tokenizers.models.WordLevel({t: k for k, t in enumerate(special)}, unk_token=special[0])
    tokenizers.Tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    model = random_model(c, folder, folder / "model", device) if c.model.startswith("preset:") else c.model
    config = config_of(model)
    assert not config.num_experts and config.vision is None, f"{c.model}: rl compares dense text models"
    r = train_rl.Config(recipe=c.recipe, model=model, data=[], out="", prompts=c.prompts, group=c.group,
                        updates=c.updates, max_new_tokens=c.longest, pack=c.pack, overlong=0, mask_truncated=False,
                        compile=c.compile)
    responses = rl_responses(c, config.vocab_size)
    train_rl.assign_advantages(r, responses, 0)
    new, tokens = [len(x.engine) for x in responses], sum(len(x.doc.ids) for x in responses)
    padded = max(len(x.doc.ids) - n for x, n in zip(responses, new)) + max(new)
    print(ceilings(device))
    print(f"rl: {c.model}, {config.num_hidden_layers} blocks, {c.recipe}, {c.dtype}, recompute {c.recompute}; a batch: "
          f"{c.prompts} x {c.group} responses of {min(new)} to {max(new)} tokens, mean {np.mean(new):.0f}, {tokens:,} "
          f"tokens with prompts, padded to {padded}: fill {tokens / len(new) / padded:.3f}; {c.updates} updates of "
          f"{c.each}; {c.batches} batches after 2 of warm-up")

    def measure(run, batches, *args):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        x = run(c, r, responses, device, batches, *args)
        steps = np.diff(x.pop("marks"))[-batches:] / c.updates
        peak = torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda" else 0.0
        step, speed = float(np.median(steps)), tokens / c.updates / float(np.median(steps))
        row = f"{x['micro']} | {step:.3f} s ({min(steps):.3f} to {max(steps):.3f}) | {speed:,.0f} | {peak:.1f} |"
        print(f"| {'TRL' if args else 'ours'}, {batches} batches | {row}", flush=True)  # a run may be cut short
        return x | {"step_s": step, "min_s": min(steps), "max_s": max(steps), "tok_s": speed, "peak_gb": peak}
    print("| trainer | micro-batches | an optimizer step (min to max) | real tok/s | peak GiB |\n|---|---|---|---|---|")
    ours, theirs, tried = measure(rl_ours, c.batches), None, []
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # else Accelerate wraps the model for several processes
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

    def attempt(*how):
        try:
            tried.append(measure(rl_trl, *how))
        except Exception as e:  # one that does not fit or does not run must not cost the others' figures
            print(f"TRL, {how[1]} sequences{', Liger' if how[2] else ''}: {type(e).__name__}: {str(e)[:200]}")
    if importlib.util.find_spec("trl"):
        for micro in c.micro if len(c.micro) > 1 else ():
            attempt(1, micro, False)
        fastest = min(tried, key=lambda x: x["step_s"], default={"sequences": c.micro[0]})["sequences"]
        tried.clear()
        attempt(c.batches, fastest, False)
        if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            attempt(c.batches, fastest, True)  # NOTE last: it patches Transformers' classes for good
        theirs = min(tried, key=lambda x: x["step_s"], default=None)
    result = {"config": asdict(c), "commit": common.commit(), "tokens": tokens, "ours": ours, "trl": theirs}
    if theirs:
        result["ratio"] = theirs["tok_s"] / ours["tok_s"]
        print(f"time a real token, ours / TRL: {result['ratio']:.3f}")
        if len(theirs["logp"]):
            gap = (ours["logp"] - theirs["logp"]).abs()
            result |= {"logp_gap_max": gap.max().item(), "logp_gap_mean": gap.mean().item()}
            print(f"same weights: log-probabilities of {len(gap):,} response tokens differ by {gap.max():.1e} at most, "
                  f"{gap.mean():.1e} on average")
        print(f"gradient norm of the first update: ours {ours['grad_norm']:.5f}, TRL {theirs['grad_norm']:.5f}")
    elif not importlib.util.find_spec("trl"):
        print("trl is not installed, nothing to compare with: pip install trl==1.16.0")
    shutil.rmtree(folder)
    for x in filter(None, (ours, theirs)):
        del x["logp"]
    print(json.dumps(result))


# ---- evaluate.py and lm-evaluation-harness --------------------------------------------------------------------------
@dataclass
class Harness:
    model: str  # folder of a dense text model, or preset:NAME (random weights, no vision)
    data: str = "data"  # folder of the benchmarks' files
    tokenizer: str = ""  # folder; for presets
    layers: int = 0  # blocks that a preset is cut to, 0: all
    which: Literal["both", "mmlu", "generation"] = "both"  # what is measured
    limit: int = 2000  # documents of MMLU, evenly spread over its files, 0: all
    samples: int = 1000  # documents of GSM8K, likewise
    new: int = 256  # budget of a response
    context: int = 4096  # longest prompt + response
    memory: float = 0.8  # share of the GPU's memory that vLLM may take
    repeats: int = 1  # runs of each side, which take turns in being first; vLLM's caches are empty in the first
    optimize: Literal["none", "graphs", "compile"] = "graphs"  # of evaluate.py's vLLM; lm_eval's always compiles
    seed: int = 0  # weights
    out: str = ""  # new folder of logs and results; empty: a temporary one


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def read_mmlu(data: Path, split: str) -> list[tuple[str, list[str]]]:
    """(subject, row of its file), in the order of tasks.py."""
    return [(f.stem.removesuffix(f"_{split}"), row) for f in sorted((data / f"mmlu/{split}").glob("*.csv"))
            for row in csv.reader(open(f, encoding="utf-8-sig", newline=""))]


def write_mmlu(root: Path, split: str, rows: list[tuple[str, list[str]]]) -> dict[str, list[dict]]:
    """In the published layout, and as jsonl for the harness. -> the latter by subject"""
    found = {}
    for subject, row in rows:
        found.setdefault(subject, []).append(row)
    for subject, some in found.items():
        path = root / f"mmlu/{split}/{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows(some)
        found[subject] = [dict(question=r[0], choices=r[1:5], answer="ABCD".index(r[5]), subject=subject) for r in some]
        write_rows(root / f"harness/mmlu_{subject}_{split}.jsonl", found[subject])
    return found


def harness_task(root: Path, file: str, files: dict[str, str], until=(), tokens: int = 0, **more) -> dict:
    """The harness' own task file, with local data. until, tokens: what ends a response."""
    import lm_eval.tasks
    import yaml
    path = Path(lm_eval.tasks.__file__).parent / file
    own = yaml.safe_load(path.read_text())
    base = yaml.safe_load(path.with_name(own.pop("include")).read_text()) if "include" in own else {}
    more |= dict(dataset_path="json", dataset_name=None, dataset_kwargs={
        "data_files": {k: str(root / v) for k, v in files.items()}})
    if tokens:
        more["generation_kwargs"] = dict(until=list(until), do_sample=False, temperature=0.0, max_gen_toks=tokens)
    return {k: v for k, v in (base | own | more).items() if k not in ("tag", "group", "task_alias")}


def harness_files(c: Harness, root: Path) -> dict[str, list[dict]]:
    """Writes the chosen documents for both sides. -> the harness' tasks of each of ours"""
    def spread(rows, n): return [rows[i * len(rows) // n] for i in range(n)] if 0 < n < len(rows) else rows
    data, found = Path(c.data), {}
    if c.which != "generation":
        subjects = write_mmlu(root, "test", spread(read_mmlu(data, "test"), c.limit))
        write_mmlu(root, "dev", [row for row in read_mmlu(data, "dev") if row[0] in subjects])
        found["mmlu"] = [harness_task(root, f"mmlu/default/mmlu_{s}.yaml", {
            k: f"harness/mmlu_{s}_{k}.jsonl" for k in ("test", "dev")}, num_fewshot=5, task=f"local_mmlu_{s}")
            for s in subjects]
    if c.which != "mmlu":
        write_rows(root / "gsm8k/test.jsonl",
                   spread([json.loads(line) for line in open(data / "gsm8k/test.jsonl", "rb")], c.samples))
        found["gsm8k_cot"] = [harness_task(root, "gsm8k/gsm8k-cot.yaml", {"test": "gsm8k/test.jsonl"},
                                           tasks.TASKS["gsm8k_cot"].stop, c.new, task="local_gsm8k_cot")]
    return found


def timed(command: list, out: Path, ready: bytes | None) -> tuple[float, float | None]:
    """Wall seconds of a process, and until its log says `ready`."""
    start, at, tail, log = time.perf_counter(), None, b"", Path(f"{out}.log")
    env = os.environ | {"PYTHONUNBUFFERED": "1", "VLLM_CACHE_ROOT": f"{out.parent}/cache_{out.name[:-2]}",
                        "TRITON_CACHE_DIR": f"{out.parent}/triton_{out.name[:-2]}"}
    with open(log, "wb") as f, subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE,
                                                stderr=subprocess.STDOUT) as process:
        while some := process.stdout.read1():
            f.write(some)
            tail = tail[-200:] + some
            if at is None and ready and re.search(ready, tail):
                at = time.perf_counter() - start
    if process.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise common.UserError(f"exit code {process.returncode}, see {log}: {''.join(last)[:300]}")
    return time.perf_counter() - start, at


def harness_agree(name: str, root: Path, ours: Path, theirs: Path, tok: Tokenizer) -> dict:
    """What both were asked, and on how many documents they decide the same."""
    docs = {d["id"]: d["context"] or d["pairs"][0][0] for d in tasks.documents(name, root)}
    here = [json.loads(line) for line in open(ours / f"samples_{name}.jsonl", "rb")]
    there = [row for f in theirs.rglob("samples_*.jsonl") for row in map(json.loads, open(f, "rb"))
             if row["filter"] in ("none", "flexible-extract")]
    hits = {row["arguments"]["gen_args_0"]["arg_0"]: row.get("acc", row.get("exact_match")) for row in there}
    assert len(here) == len(there) and set(docs.values()) == set(hits), \
        f"{name}: {len(here)} documents here, {len(there)} there, or their prompts differ"
    assert not (bad := [row["error"] for row in here if row["error"]]), f"{name}: {len(bad)} errors: {bad[0]}"
    texts = [row["resps"][0][0] for row in there if name == "gsm8k_cot"]
    return {"documents": len(here), "read": sum(len(tok.encode(text)) for text in docs.values()),
            "new": [sum(x["tokens"] for row in here for x in row["responses"]), sum(len(tok.encode(t)) for t in texts)],
            "agree": sum(bool(row["numbers"]["acc"]) == bool(hits[docs[row["id"]]]) for row in here)}


def harness(c: Harness) -> None:
    if not importlib.util.find_spec("lm_eval"):
        raise common.UserError("lm_eval is not installed, nothing to compare with: pip install lm_eval==0.4.13")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import yaml
    from lm_eval.api.task import ConfigurableTask
    folder, cuda = Path(c.out or tempfile.mkdtemp(prefix="bench_")), torch.cuda.is_available()
    (folder / "tasks").mkdir(parents=True)
    device, dtype, model = torch.device("cuda" if cuda else "cpu"), "bfloat16" if cuda else "float32", c.model
    if c.model.startswith("preset:"):
        model = random_model(c, Path(c.tokenizer), folder / "model", device, getattr(torch, dtype))
        if not (folder / "model/tokenizer_config.json").exists():  # Transformers needs it
            common.write_json(folder / "model/tokenizer_config.json", dict(
                tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", pad_token="<|endoftext|>"))
    tok, found, result = Tokenizer(model), harness_files(c, folder), {"config": asdict(c), "commit": common.commit()}
    for task in (task for some in found.values() for task in some):
        (folder / f"tasks/{task['task']}.yaml").write_text(yaml.safe_dump(task))
        ConfigurableTask(config=task)  # fills the cache of data sets
    print(ceilings(device))
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    print("| | documents | tokens read, new: ours, lm_eval | ours (until ready) | lm_eval (until ready) | ratio | "
          "same decision |\n|---|---|---|---|---|---|---|", flush=True)
    for name, some in found.items():
        commands = {
            "ours": [Path(__file__).parent / "evaluate.py", model, "--tasks", name, "--data-root", folder, "--engine",
                     "vllm", "--engine-memory", c.memory, "--context", c.context, "--max-new-tokens", c.new,
                     "--optimize", c.optimize, "--out"],
            "lm_eval": ["-m", "lm_eval", "run", "--model", "vllm", "--batch_size", "auto", "--model_args",
                        f"pretrained={model},dtype={dtype},gpu_memory_utilization={c.memory},"
                        f"max_model_len={c.context}", "--include_path", folder / "tasks", "--tasks",
                        *(t["task"] for t in some), "--log_samples", "--output_path"]}
        ready = {"ours": None if name == "mmlu" else rb"processing weights took",
                 "lm_eval": rb"Running \w+ requests: +0%"}
        runs = {side: [] for side in commands}
        for k in range(c.repeats):
            for side in list(commands)[::(-1) ** k]:
                out = folder / f"{name}_{side}_{k}"
                runs[side].append(timed([*commands[side], out], out, ready[side]))
        x = harness_agree(name, folder, *(folder / f"{name}_{side}_0" for side in commands), tok)
        wall = [statistics.median(seconds for seconds, _ in runs[side]) for side in commands]
        cells = [", ".join(f"{s:.1f} ({'-' if at is None else f'{at:.1f}'})" for s, at in runs[side]) for side in runs]
        result[name] = x | {"runs": runs, "ratio": wall[0] / wall[1]}
        print(f"| {name} | {x['documents']} | {x['read']:,}, new {x['new'][0]:,}, {x['new'][1]:,} | {cells[0]} s | "
              f"{cells[1]} s | {wall[0] / wall[1]:.3f} | {x['agree']} |", flush=True)
    if not c.out:
        shutil.rmtree(folder)
    print(json.dumps(result))


# ---- the upcycling experiment ---------------------------------------------------------------------------------------
@dataclass
class Upcycle:
    train: list[str]  # files of rows with text and discipline; 'general' and the sciences
    val: list[str]  # held-out files of the same kind
    tokenizer: str  # folder
    out: str  # folder of all runs
    model: str = "preset:tiny"  # the dense model
    variants: Literal["main", "all"] = "main"  # main: upcycling against dense training; all: also the paper's ablations
    seeds: int = 1  # runs of everything, with other initial weights and data orders
    first_seed: int = 0  # number of the first
    jobs: int = 2  # processes at a time
    threads: int = 1  # CPU threads of each
    chars: int = 4000  # texts are cut at paragraphs into documents of about this many characters
    seq_len: int = 2048  # tokens a pack
    batch: int = 1  # packs a step
    pretrain: int = 300  # steps of the dense model
    pretrain_general: float = 0.7  # share of general rows in them; the rest is spread over the sciences
    induct: int = 12  # steps of each discipline's expert
    route: int = 40  # steps of the routers
    integrate: int = 480  # steps of the whole MoE
    general: float = 0.3  # share of general rows in integrate, and in the dense model's continued training
    lr: float = 2e-3  # of pretrain; integrate and continued training have half of it, induct all of it
    router_lr: float = 3e-2  # of route
    balance: float = 0.01  # coefficient of the balance loss


FRACTIONS = (1 / 6, 1 / 3, 2 / 3)  # of integrate: the paper's 50B, 100B, 200B of 300B tokens


def jobs_of(c: Upcycle, seed: int, names: list[str]) -> dict[str, tuple[list[str], list]]:
    """{folder: (folders it needs, command)}, all inside out/seed_N."""
    here, data = Path(c.out) / f"seed_{seed}", Path(c.out) / "data"
    jobs = {}

    def train(name, stage, model, steps, lr, data_of, *more):
        sources = [str(data / f"{d}.jsonl") for d in data_of]
        jobs[name] = ([model] if not model.startswith("preset:") else [], [
            "train_sft.py", "--stage", stage, "--model", model if model.startswith("preset:") else str(here / model),
            *(["--tokenizer", c.tokenizer] if model.startswith("preset:") else []), "--data", *sources, "--val",
            str(data / "val.jsonl"), "--out", str(here / name), "--steps", steps, "--lr", lr, "--min-lr", lr / 10,
            "--warmup", 0.1, "--batch", c.batch, "--seq-len", c.seq_len, "--seed", 1234 + seed, "--threads", c.threads,
            "--workers", 0, "--recompute", "none", "--no-compile", "--window", 256, "--save-every", 10 ** 9, *more])

    def upcycle(name, command, needs, *options):
        jobs[name] = (needs, ["upcycle.py", command, "--dense", str(here / "pretrain"), *options,
                              "--out", str(here / name)])

    mixture = ["general", *names]
    shares = lambda general: ["--weights", general, *[(1 - general) / len(names)] * len(names)]
    weights = shares(c.general)
    before = len(names) * c.induct + c.route  # steps that a MoE takes before integrate
    train("pretrain", "pretrain", c.model, c.pretrain, c.lr, mixture, *shares(c.pretrain_general))
    for n in names:
        upcycle(f"induct0_{n}", "induct", ["pretrain"], "--discipline", n)
        train(f"induct_{n}", "induct", f"induct0_{n}", c.induct, c.lr, [n])

    def moe(name, slices=8, induced=True, warm=True, *options):
        needs = ["pretrain", *(f"induct_{n}" for n in names if induced)]
        upcycle(f"split_{name}", "split", needs, "--slices", slices, "--top-k", slices, "--seed", 1234 + seed, *options,
                *(x for n in names for x in ("--expert", f"{n}={here / (f'induct_{n}' if induced else 'pretrain')}")))
        if warm:
            train(f"route_{name}", "route", f"split_{name}", c.route, c.router_lr, names, "--balance", c.balance)
        train(f"moe_{name}", "integrate", f"route_{name}" if warm else f"split_{name}", c.integrate, c.lr / 2, mixture,
              *weights, "--balance", c.balance)

    moe("8")
    train("dense", "pretrain", "pretrain", before + c.integrate, c.lr / 2, mixture, *weights)
    train("dense_same", "pretrain", "pretrain", c.integrate, c.lr / 2, mixture, *weights)
    if c.variants == "all":
        for slices in (1, 2, 4):
            moe(str(slices), slices)
        moe("no_induction", induced=False)
        moe("no_warmup", warm=False)
        moe("no_shared", 8, True, True, "--no-shared")
        for f in FRACTIONS:
            steps = round(c.integrate * f)
            train(f"moe_at_{steps}", "integrate", "route_8", steps, c.lr / 2, mixture, *weights, "--balance", c.balance)
            train(f"dense_at_{steps}", "pretrain", "pretrain", before + steps, c.lr / 2, mixture, *weights)
    return {f"seed_{seed}/{name}": ([f"seed_{seed}/{n}" for n in needs], [str(x) for x in command])
            for name, (needs, command) in jobs.items()}


def pieces_of(text: str, longest: int) -> list[str]:
    """Paragraphs of a text, joined up to `longest` characters: short documents, so that a pack holds many."""
    out = [""]
    for paragraph in text.split("\n\n"):
        if out[-1] and len(out[-1]) + len(paragraph) > longest:
            out.append("")
        out[-1] += ("\n\n" if out[-1] else "") + paragraph
    return [piece for piece in out if piece.strip()]


def finished(folder: Path) -> bool:
    if (folder / "config.json").exists():  # of upcycle.py
        return True
    run, last = folder / "run.json", common.latest(folder)
    return bool(last) and run.exists() and int(last.name[5:]) == json.loads(run.read_text())["config"]["steps"]


def run_jobs(out: Path, jobs: dict, parallel: int) -> None:
    """Runs each job once its needs are done. A job's output is in NAME.log; the first failure stops everything."""
    done, running = {n for n in jobs if finished(out / n)}, {}
    bar = tqdm(total=len(jobs), initial=len(done), desc="runs", disable=None)
    try:
        while len(done) < len(jobs):
            for name, (needs, command) in jobs.items():
                if len(running) < parallel and name not in done and name not in running and done.issuperset(needs):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    resume = ["--resume"] if common.latest(out / name) else []
                    with open(f"{out / name}.log", "w") as log:
                        script = str(Path(__file__).parent / command[0])
                        running[name] = subprocess.Popen([sys.executable, script, *command[1:], *resume], stdout=log,
                                                         stderr=log)
            time.sleep(0.1)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    last = Path(f"{out / name}.log").read_text().strip().splitlines()[-1:]
                    raise common.UserError(f"{name} failed, see {out / name}.log: {''.join(last)}")
                for state in (out / name).glob("step_*/state"):
                    shutil.rmtree(state)  # never resumed again: moments and masters are most of a run's size
                done.add(name)
                bar.set_postfix_str(name)
                bar.update()
    finally:
        for process in running.values():
            process.terminate()
    bar.close()


def upcycle(c: Upcycle) -> None:
    out = Path(c.out)
    (out / "data").mkdir(parents=True, exist_ok=True)
    common.write_json(out / "experiment.json", asdict(c) | {"commit": common.commit()})
    rows = {"train": {}, "val": {}}
    for part, paths in (("train", c.train), ("val", c.val)):
        data = Dataset(paths)
        for i in range(len(data)):
            row = data.row(i)
            if not row.group or row.text is None:
                raise common.UserError(f"{' '.join(data.name(i))}: rows need text and discipline")
            rows[part].setdefault(row.group, []).extend(
                {"id": f"{part}_{i}_{k}", "text": text, "discipline": row.group}
                for k, text in enumerate(pieces_of(row.text, c.chars)))
    assert "general" in rows["train"] and len(rows["train"]) > 1, \
        f"--train has the disciplines {sorted(rows['train'])}; 'general' and at least one science are needed"
    files = rows["train"] | {"val": [row for some in rows["val"].values() for row in some]}
    for name, some in files.items():
        (out / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    names = sorted(set(rows["train"]) - {"general"})
    jobs = {}
    for seed in range(c.first_seed, c.first_seed + c.seeds):
        jobs |= jobs_of(c, seed, names)
    (out / "commands.sh").write_text("".join(f"python {' '.join(map(shlex.quote, command))}\n"
                                             for _, command in jobs.values()))
    run_jobs(out, jobs, c.jobs)
    upcycle_report(c.out)


def upcycle_report(folder: str) -> None:
    """Table (report.md) and pictures of the runs below `folder`: the last line of every val.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    out, runs = Path(folder), {}
    config = json.loads((out / "experiment.json").read_text())
    for file in sorted(out.glob("seed_*/*/val.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if len(lines) > 1:  # before the first step and after the last: the run is complete
            runs.setdefault(file.parent.name, []).append((lines[0], lines[-1]))
    if "pretrain" not in runs:
        raise common.UserError(f"{out}: no runs below it; make them with python bench.py upcycle -h")
    groups = sorted(runs["pretrain"][0][1]["loss"], key=lambda g: (g != "general", g))
    sciences = [g for g in groups if g != "general"]

    def figures(name):
        """[seeds, 2 + sciences]: general, mean over the sciences, each science."""
        each = np.array([[last["loss"][g] for g in groups] for _, last in runs[name]])
        return np.concatenate([each[:, :1], each[:, 1:].mean(1, keepdims=True), each[:, 1:]], axis=1)

    def cell(x):
        return f"{x.mean():.3f}" + (f" ± {x.std(ddof=1):.3f}" if len(x) > 1 else "")
    title = {"pretrain": "dense, before", "dense_same": "dense, integrate's tokens", "dense": "dense, all tokens",
             "moe_8": "MoE, 8 slices",
             **{f"moe_{n}": f"MoE, {n} slice{'s' * (n > 1)}" for n in (4, 2, 1)},
             "moe_no_induction": "MoE 8, no induction", "moe_no_warmup": "MoE 8, no routing warm-up",
             "moe_no_shared": "MoE 8, no shared expert"}
    head = ["validation loss", "seeds", "general", "science", *sciences]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in title:
        if name in runs:
            f = figures(name)
            table.append(f"| {title[name]} | {len(f)} | " + " | ".join(cell(f[:, k]) for k in range(f.shape[1])) + " |")
    lines, base = ["\n".join(table), ""], figures("pretrain")
    for name in ("dense_same", "dense", "moe_8"):
        if name in runs and len(runs[name]) == len(base):
            change = figures(name) / base - 1
            lines.append(f"{title[name]}: general {change[:, 0].mean():+.2%} against the dense model before, science "
                         f"{change[:, 1].mean():+.2%}; per seed: "
                         + ", ".join(f"{g:+.2%} and {s:+.2%}" for g, s in change[:, :2]))

    def save(fig, name):
        fig.savefig(out / name, dpi=110)
        plt.close(fig)
        written.append(str(out / name))
    written = [str(out / "report.md")]
    if "route_8" in runs:
        own = list(runs["route_8"][0][1]["share"])
        fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True, sharey=True)
        for ax, at, when in zip(axes, (0, 1), ("before", "after")):
            share = np.mean([[pair[at]["share"][n] for n in own] for pair in runs["route_8"]], axis=0)
            image = ax.imshow(share, vmin=0, vmax=1, cmap="Blues")
            ax.set(title=f"{when} routing warm-up", xlabel="experts of", xticks=range(share.shape[1]),
                   yticks=range(len(own)))
            ax.set_xticklabels(own[:share.shape[1]], rotation=45, ha="right")
            ax.set_yticklabels([n if n != "other" else "general" for n in own])
            for y, x in np.ndindex(*share.shape):
                ax.text(x, y, f"{share[y, x]:.2f}", ha="center", va="center", fontsize=7,
                        color="white" if share[y, x] > 0.6 else "black")
            hit = np.mean([share[k, k] for k in range(share.shape[1])])
            lines.append(f"{when} routing warm-up, {hit:.3f} of a held-out token's choices are its discipline's "
                         f"experts (lowest {min(share[k, k] for k in range(share.shape[1])):.3f})")
        axes[0].set_ylabel("tokens of")
        fig.colorbar(image, ax=axes[1], shrink=0.8, label="share of the choices")
        save(fig, "routing.png")
    bars = [name for name in title if name in runs and name != "pretrain"]  # the model before is far above all others
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for ax, column, what in zip(axes, (0, 1), ("general", "science")):
        values = [figures(n)[:, column] for n in bars]
        mean = np.array([v.mean() for v in values])
        ax.bar(range(len(bars)), mean, yerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in values], capsize=3,
               color=["C0" if n.startswith("moe") else "0.5" for n in bars])
        ax.set(title=f"{what}: validation loss (axis cut)", xticks=range(len(bars)),
               ylim=(mean.min() - 0.3 * np.ptp(mean) - 1e-3, mean.max() + 0.3 * np.ptp(mean) + 1e-3))
        ax.set_xticklabels([title[n] for n in bars], rotation=40, ha="right", fontsize=8)
    save(fig, "granularity.png")
    points = {kind: sorted((int(n.rsplit("_", 1)[1]), n) for n in runs if n.startswith(f"{kind}_at_"))
              for kind in ("moe", "dense")}
    if points["moe"]:
        fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
        before = len(sciences) * config["induct"] + config["route"]
        for kind, last, label in (("moe", "moe_8", "MoE, 8 slices"), ("dense", "dense", "dense")):
            steps = [s for s, _ in points[kind]] + [config["integrate"]]
            values = [figures(n) for _, n in points[kind]] + [figures(last)]
            tokens = [(before + s) * config["batch"] * config["seq_len"] / 1e6 for s in steps]
            for ax, column, what in zip(axes, (0, 1), ("general", "science")):
                ax.errorbar(tokens, [v[:, column].mean() for v in values], capsize=3, marker="o", label=label,
                            yerr=[v[:, column].std(ddof=1) if len(v) > 1 else 0 for v in values])
                ax.set(title=what, xlabel="million tokens after pretraining, all stages", ylabel="validation loss")
        for ax, column in zip(axes, (0, 1)):
            ax.axhline(figures("pretrain")[:, column].mean(), color="0.6", linestyle=":", label="dense, before")
            if column == 1:  # far above the others: keep their range
                ax.set_ylim(top=max(figures(n)[:, 1].max() for k in points for _, n in points[k]) + 0.1)
        axes[0].legend()
        save(fig, "scaling.png")
    text = "\n".join(lines)
    (out / "report.md").write_text(text + "\n")
    print(f"{text}\n\nwrote {', '.join(written)}; the runs' commands are in {out / 'commands.sh'}")


def main() -> None:
    commands = {"train": lambda: train(sys.argv[2:]), "packing": packing,
                "rl": lambda: rl(common.parse(RL, sys.argv[2:], __doc__)),
                "harness": lambda: harness(common.parse(Harness, sys.argv[2:], __doc__)),
                "generate": lambda: generate(common.parse(Generate, sys.argv[2:], __doc__)),
                "upcycle": lambda: upcycle(common.parse(Upcycle, sys.argv[2:], __doc__)),
                "report": lambda: upcycle_report(*sys.argv[2:3] or ["."])}
    commands[common.command(commands, __doc__)]()


if __name__ == "__main__":
    common.run(main)
