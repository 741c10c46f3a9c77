"""Measures what the README's tables say. Every run prints the machine's own ceilings first.

    python bench.py train --model preset:innovator-vl-8b --stage align --tokenizer DIR --data DIR     one GPU
    torchrun --nproc-per-node 2 bench.py train --model preset:innovator-vl-8b --stage mid --tokenizer DIR --data DIR
    python bench.py generate --model preset:innovator-53b-a13b
    python bench.py packing                          fill and samples/s of the packers on a log-normal length file
    python bench.py upcycle --train TEXT --val TEXT --tokenizer DIR --out runs/upcycle      the upcycling experiment
    python bench.py report runs/upcycle              its table and pictures again

train runs train_sft.py's own step (same model, loader, sharding, optimizer) for --steps steps, leaves the first third
out and prints the median. Letters: tok/s counts real tokens of all ranks; MFU uses the data sheet's dense bf16 peak.

upcycle asks the Innovator paper's questions (arXiv:2507.18671, Tables 2 and 4, Figure 3) of a small model: a dense
model is pretrained mostly on rows of discipline 'general', becomes a MoE by induct, split, route and integrate, and is
compared with the same dense model trained on, on integrate's mixture: with as many tokens as integrate (the paper's
comparison), and with as many as the three stages took together.
It runs upcycle.py and train_sft.py as a user would (every command is in commands.sh), --jobs at a time, and goes on
where it was stopped. --variants all adds the granularities 1, 2 and 4 slices, no induction (copies), no routing
warm-up, no shared expert, and shorter integrations.
"""
import json
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
import torch
from tqdm import tqdm

import common
import train_sft
from data import Dataset, best_fit_decreasing
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
                "generate": lambda: generate(common.parse(Generate, sys.argv[2:], __doc__)),
                "upcycle": lambda: upcycle(common.parse(Upcycle, sys.argv[2:], __doc__)),
                "report": lambda: upcycle_report(*sys.argv[2:3] or ["."])}
    commands[common.command(commands, __doc__)]()


if __name__ == "__main__":
    common.run(main)
