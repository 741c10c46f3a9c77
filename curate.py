"""Makes training data with a model's own answers.

    python curate.py select --model runs/instruct --data toy/rl --out runs/selected
    torchrun --nproc-per-node 8 curate.py select --engine vllm --model runs/instruct --data POOL --out runs/selected
    python train_rl.py --recipe gspo-paper --model runs/instruct --data runs/selected/kept.parquet --out runs/rl

select   discrepancy-driven choice of prompts for reinforcement learning (Innovator-VL, arXiv:2601.19325, section
         4.2.1): the policy answers every prompt of the pool N (--group) times, the answers are verified, and a prompt
         stays if
           discrepancy   Pass@N - Pass@1 >= gap: the ability is there, but not reliable, and
           medium band   low < mean accuracy < high: neither solved nor out of reach.
         Pass@1 is the share of right responses, Pass@N is 1 if any is right. Right: accuracy >= 0.5; it is 0 or 1, but
         a similarity for bbox, ocrtext, caption, html-code and svg-code. A response whose verifier failed counts in
         none of the three, and a prompt without any other is a bad row.
         --out gets select.json (what scores depend on), scores.rank_*.jsonl (a line a row), bad_rows.jsonl,
         histogram.png and kept.parquet. --resume goes on after an interruption; with other thresholds it chooses anew
         from the scores.

The pool is cut into chunks of rollout_batch // group neighbouring rows. Whichever rank has a chunk samples it as one
batch with a seed of its own: the torch engine's scores depend neither on the number of ranks nor on interruptions.

Departures
1. The paper gives neither N nor thresholds nor the policy. N = 8 and gap = 0.25 are ours, the band is the released
   code's default. Where accuracy is 0 or 1, a prompt that was ever solved has the gap 1 - mean, which this band keeps
   above 0.4: the gap then decides nothing, it does for similarities.
2. The band is on accuracy, not on the reward, whose tenth for the format every well-formed wrong response has.
3. Prompts are written as they come; train_rl.py puts the instruction of the paper's single format before them.
"""
import contextlib
import hashlib
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import rewards
import train_sft
from common import UserError, is_rank0, print0, rank, world
from data import BadRow, Dataset, data_files, row_of
from evaluate import checkpoint_hash
from model import Innovator, checkpoint_folder, gathered
from train_rl import Prompts, make_engine, right_answers, roll_out, verify

FREE = ("out", "gap", "low", "high", "verifiers", "engine_memory", "optimize", "patience", "threads", "resume")
TEXT, SHARE, IMAGE = pa.string(), pa.float64(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(dict(id=TEXT, images=pa.list_(IMAGE), problem=TEXT, answer=pa.list_(TEXT), problem_type=TEXT,
                        answer_type=TEXT, source=TEXT, prompt_type=TEXT, format_guidance=TEXT, avg_reward=SHARE,
                        pass_at_1=SHARE, pass_at_n=SHARE))  # RL-172K's columns, and three of ours at the end
VERDICTS = ("bad row", "too easy", "too hard", "small gap", "kept")


@dataclass
class Select:
    model: str  # checkpoint or run folder of the policy
    data: list[str]  # the pool: rows with the columns of RL-172K
    out: str  # folder of the scores and of what is kept
    group: int = 8  # N, responses a prompt (torchrun takes --n for itself)
    gap: float = 0.25  # smallest Pass@N - Pass@1 of a kept prompt
    low: float = 0.0  # its mean accuracy is above this
    high: float = 0.6  # and below this
    max_new_tokens: int = 8192  # longest response
    temperature: float = 1.0  # of sampling
    plain: bool = False  # ask the bare question, without the released instruction on <think> and <answer>
    verifiers: int = 2  # processes a rank that verify responses
    verify_seconds: float = 30.0  # one response's verification may take
    engine: Literal["torch", "vllm"] = "torch"  # who generates
    rollout_batch: int = 0  # responses sampled together, 0: 64, with vllm 2048
    engine_memory: float = 0.8  # share of the GPU's memory that vLLM may take, its weights included
    context: int = 0  # longest prompt + response, 0: the model's context
    optimize: Literal["none", "graphs", "compile"] = "compile"  # of vLLM: CUDA graphs, torch.compile (a minute)
    patience: float = 1800.0  # seconds without a sign of life from the engine, then the run ends
    min_pixels: int = 3136  # smallest image area
    max_pixels: int = 262144  # largest image area
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the model
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"  # packed attention
    threads: int = 0  # CPU threads of torch a rank, 0: torch's choice
    seed: int = 1234  # of sampling
    resume: bool = False  # go on with the scores in --out
    overlong, replay, tp = 0, "none", 1  # no flags: train_rl.py reads them

    def __post_init__(self):
        self.rollout_batch = self.rollout_batch or (64 if self.engine == "torch" else 2048)
        assert self.group > 1, f"--group {self.group}: a discrepancy needs two responses or more"
        assert self.temperature > 0, "--temperature 0 samples one response N times"
        assert self.low < self.high, f"--low {self.low} must lie below --high {self.high}"
        assert 0 <= self.gap <= 1, f"--gap {self.gap} is a difference of two shares, between 0 and 1"
        assert 0 < self.engine_memory < 1, f"--engine-memory {self.engine_memory} is a share between 0 and 1"


def judged(c: Select, accuracies: list[float | None]) -> tuple[str, float, float, float]:
    """A prompt's verdict, mean accuracy, Pass@1 and Pass@N. accuracies: None where the verifier failed."""
    known = [a for a in accuracies if a is not None]
    if not known:
        return "bad row", 0.0, 0.0, 0.0
    mean, pass_1 = sum(known) / len(known), sum(a >= 0.5 for a in known) / len(known)
    pass_n = float(pass_1 > 0)
    verdict = ("too hard" if mean <= c.low else "too easy" if mean >= c.high else
               "small gap" if pass_n - pass_1 < c.gap - 1e-9 else "kept")
    return verdict, mean, pass_1, pass_n


# ---- scores ---------------------------------------------------------------------------------------------------------
def check_folder(c: Select, out: Path, source: Path) -> None:
    """Writes select.json; an error if the scores in this folder depend on something else than those to come."""
    file, files = out / "select.json", [(p.name, p.stat().st_size) for p in data_files(c.data)]
    now = {k: v for k, v in asdict(c).items() if k not in FREE} | {
        "model": checkpoint_hash(source),
        "data": f"{len(files)} file(s), {hashlib.sha256(repr(files).encode()).hexdigest()}"}
    if any(out.glob("scores.rank_*.jsonl")):
        then = json.loads(file.read_text())["scores"]
        for key in now:
            if now[key] != then.get(key):
                raise UserError(f"{file}: its scores are of another --{key.replace('_', '-')} ({then.get(key)}, now "
                                f"{now[key]}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    common.write_json(file, {"scores": now, "config": asdict(c), "commit": common.commit()})


def read_scores(out: Path) -> dict[int, dict]:
    """The line of every row scored so far, by any number of ranks."""
    lines = {}
    for file in sorted(out.glob("scores.rank_*.jsonl")):
        for text in file.read_text().split("\n"):
            with contextlib.suppress(json.JSONDecodeError):  # empty, or cut when a run was killed: scored anew
                line = json.loads(text)
                lines.setdefault(line["row"], line)
    return lines


def score_chunk(c: Select, engine, prompts: Prompts, verifiers, tok, rows: range, eyes: bool, alive) -> list[dict]:
    """A line of scores for every one of these rows."""
    lines, drawn = [], {}
    for i in rows:
        try:
            row, doc = prompts.read(i)
            if doc.grids and not eyes:
                raise BadRow("it has a picture, the model has no vision tower")
            drawn[i] = row, doc
        except BadRow as e:
            lines.append({"row": i, "id": e.row_id, "accuracies": [], "reason": str(e)})
    asked = list(drawn.values())
    responses = roll_out(c, engine, asked, tok, c.seed * 1_000_003 + rows.start, alive)
    verify(c, verifiers, responses, asked)
    for k, (i, (row, _)) in enumerate(drawn.items()):
        own = responses[k * c.group:(k + 1) * c.group]
        errors = [r.error for r in own if r.error]
        lines.append({"row": i, "id": row["id"], "source": str(row.get("source") or ""),
                      "answer_type": row["answer_type"], "accuracies": [None if r.error else r.accuracy for r in own],
                      "length": sum(len(r.engine) for r in own) / c.group, "truncated": sum(r.truncated for r in own),
                      "errors": len(errors), "reason": f"not verified: {errors[0]}" if errors else ""})
    return lines


# ---- what is left ---------------------------------------------------------------------------------------------------
def kept_row(data: Dataset, i: int, values: list[float]) -> dict:
    """Row i with its images as bytes, in SCHEMA's columns."""
    k, j = data.where(i)
    raw = data.file(k).raw(j)
    row = row_of(raw, data.name(i)[1], data.paths[k].parent)
    given = raw["images"] if isinstance(raw["images"], list) else [raw["images"]]
    images = [{"bytes": im if isinstance(im, bytes) else Path(im).read_bytes(),
               "path": g.get("path") if isinstance(g, dict) else g} for im, g in zip(row.parts[0][1], given)]
    text = {name: str(raw[name]) for name in SCHEMA.names if raw.get(name) is not None}
    return text | {"id": row.id, "images": images, "answer": right_answers(raw)} | dict(zip(SCHEMA.names[-3:], values))


def draw(c: Select, file: Path, scored: list[tuple[dict, tuple]]) -> None:
    """Histogram of mean accuracies with the band, kept against dropped; share kept of every answer type."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    blue, grey = "#2a6fbb", "#c9ced6"
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True, width_ratios=(3, 2))
    bars = min(c.group, 20)
    kept, rest = ([m for _, (v, m, *_) in scored if (v == "kept") == yes] for yes in (True, False))
    left.axvspan(c.low, c.high, color=blue, alpha=0.1, linewidth=0, label=f"band {c.low:g} to {c.high:g}")
    tops, _, parts = left.hist([kept, rest], bins=(np.arange(bars + 2) - 0.5) / bars, stacked=True, color=[blue, grey],
                               rwidth=0.6, label=[f"{len(kept)} kept", f"{len(rest)} dropped"])
    left.bar_label(parts[1], [f"{top:.0f}" for top in tops[1]], padding=2, fontsize=9)
    left.set(xlabel=f"mean accuracy of a prompt's {c.group} responses", ylabel="prompts")
    left.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    total, chosen = (Counter(s["answer_type"] for s, (v, *_) in scored if v in these) for these in (VERDICTS, ["kept"]))
    names = sorted(total, key=lambda t: chosen[t] / total[t])
    right.barh(names, [1] * len(names), color=grey, height=0.6)
    right.barh(names, [chosen[t] / total[t] for t in names], color=blue, height=0.6)
    for y, t in enumerate(names):
        right.text(1.02, y, f"{chosen[t]} of {total[t]}", va="center")
    right.set(xlabel="share kept, by answer type", xlim=(0, 1))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=130)
    plt.close(fig)


def finish(c: Select, out: Path, data: Dataset, alive) -> None:
    """Once all rows have scores: bad_rows.jsonl, kept.parquet, histogram.png and the table."""
    lines = read_scores(out)
    found = [(lines[i], judged(c, lines[i]["accuracies"])) for i in range(len(data))]
    bad = [dict(zip(("file", "row", "reason"), p)) for p in data.problems]
    for s in (s for s, (v, *_) in found if v == "bad row"):
        file, at = data.name(s["row"])
        bad.append({"file": file, "row": s["id"] or at, "at": at, "reason": s["reason"]})
    (out / "bad_rows.jsonl").write_text("".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad))
    kept, tmp = [(s["row"], values) for s, (v, *values) in found if v == "kept"], out / ".kept.parquet.tmp"
    with pq.ParquetWriter(tmp, SCHEMA) as writer:
        for start in tqdm(range(0, len(kept), 256), desc="kept", unit="x256", disable=None):
            writer.write_table(pa.Table.from_pylist([kept_row(data, *k) for k in kept[start:start + 256]], SCHEMA))
            alive()
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(tmp, out / "kept.parquet")
    table = {}
    for s, (verdict, *_) in found:
        for name in (s.get("source") or "no source", "all"):
            table.setdefault(name, Counter())[verdict] += 1
    width = max(map(len, ("source", *table)))
    print(f"{'source':{width}}{'pool':>9}" + "".join(f"{v:>11}" for v in VERDICTS) + f"{'share kept':>12}")
    for name, row in sorted(table.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"{name:{width}}{row.total():9}" + "".join(f"{row[v]:11}" for v in VERDICTS)
              + f"{row['kept'] / row.total():12.3f}")
    scored = [(s, j) for s, j in found if j[0] != "bad row"]
    if scored:
        pass_1, pass_n, length, cut, errors = np.mean(
            [(j[2], j[3], s["length"], s["truncated"] / c.group, s["errors"] / c.group) for s, j in scored], axis=0)
        print(f"Pass@1 {pass_1:.3f}, Pass@{c.group} {pass_n:.3f}, mean length {length:.1f}, truncated {cut:.4f}, "
              f"not verified {errors:.4f}, damaged files {len(data.problems)}")
        draw(c, out / "histogram.png", scored)
    print(f"wrote {out / 'kept.parquet'}, {out / 'histogram.png'}, {out / 'bad_rows.jsonl'}")
    print(f"next: python train_rl.py --recipe gspo-paper --model {c.model} --data {out / 'kept.parquet'} --out runs/rl "
          f"--max-new-tokens {c.max_new_tokens}{' --plain' * c.plain}" if kept else
          "no prompt was kept: another policy or pool, or --resume with other --low, --high, --gap")


def select(c: Select) -> None:
    with contextlib.ExitStack() as closing:
        out, source, device = Path(c.out), checkpoint_folder(c.model), common.init_distributed()
        for p in c.data:
            assert not out.resolve().is_relative_to(Path(p).resolve()), f"--out {out} lies inside --data {p}"
        if any(out.glob("scores.rank_*.jsonl")) and not c.resume:
            raise UserError(f"{out} already holds scores: go on with --resume, or choose another --out")
        c.dtype = c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[c.dtype]
        if c.threads:
            torch.set_num_threads(c.threads)
        config, tok = train_sft.described(train_sft.Config(stage="pretrain", model=str(source), data=c.data, out=c.out,
                                                           seq_len=1))
        prompts = Prompts(c, tok, c.context or config.max_position_embeddings)
        rows, size, done = len(prompts.data), max(c.rollout_batch // c.group, 1), read_scores(out)
        chunks = [range(k, min(k + size, rows)) for k in range(0, rows, size)]
        todo = [chunk for chunk in chunks if any(i not in done for i in chunk)]
        alive = common.watchdog(c.patience, "the engine")
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # ranks may end hours apart

        def all_here():
            waiting = dist.barrier(group, async_op=True)
            while not waiting.is_completed():
                time.sleep(0.05)
                alive()
            waiting.wait()
        if is_rank0():
            check_folder(c, out, source)
        all_here()  # nobody writes before everybody has read
        if todo:
            engine = closing.enter_context(contextlib.closing(make_engine(c, config, dtype, device, out)))
            weights = Innovator.from_pretrained(source, dtype)  # in host memory: the GPU's is the engine's
            engine.load((name, p.to(device)) for name, p in gathered(weights, dtype))
            del weights
            verifiers = closing.enter_context(rewards.Verifiers(c.verifiers))
            print0(f"{rows} rows, {len(done)} with scores; {world()} x {device.type}, {c.dtype}, engine {c.engine}, "
                   f"{len(todo)} chunks of {size} rows; commit {common.commit()}")
            with open(out / f"scores.rank_{rank()}.jsonl", "a") as f:
                f.write("\n" if f.tell() else "")  # its last line may be cut
                for chunk in tqdm(todo[rank()::world()], desc=f"{size} rows", disable=None if is_rank0() else True):
                    lines = score_chunk(c, engine, prompts, verifiers, tok, chunk, config.vision is not None, alive)
                    f.write("".join(json.dumps(line) + "\n" for line in lines))
                    f.flush()
                    alive()
        all_here()
        if is_rank0():
            finish(c, out, prompts.data, alive)
        all_here()  # NOTE before the engine goes: vLLM takes the process group with it


def main() -> None:
    commands = {"select": (Select, select)}
    cls, fn = commands[common.command(commands, __doc__)]
    fn(common.parse(cls, sys.argv[2:], __doc__))


if __name__ == "__main__":
    common.run(main)
