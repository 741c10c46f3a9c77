"""Measures what the README's tables say. Every run prints the machine's own ceilings first.

    python bench.py train --model preset:innovator-vl-8b --stage align --tokenizer DIR --data DIR     one GPU
    torchrun --nproc-per-node 2 bench.py train --model preset:innovator-vl-8b --stage mid --tokenizer DIR --data DIR
    python bench.py packing                          fill and samples/s of the packers on a log-normal length file

train runs train_sft.py's own step (same model, loader, sharding, optimizer) for --steps steps, leaves the first third
out and prints the median. Letters: tok/s counts real tokens of all ranks; MFU uses the data sheet's dense bf16 peak.
"""
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import common
import train_sft
from data import best_fit_decreasing


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
    """A short run of train_sft.py; the row of the README's table."""
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


def packing() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 0.9, 1_000_000), 16, 8192).astype(np.int64)
    for name, window in (("global", len(lengths)), ("windows of 4096", 4096)):
        t0 = time.perf_counter()
        packs = [p for i in range(0, len(lengths), window) for p in best_fit_decreasing(lengths[i:i + window], 8192)]
        seconds = time.perf_counter() - t0
        print(f"packing, {name}: fill {lengths.sum() / len(packs) / 8192:.4f}, "
              f"{len(lengths) / seconds / 1e6:.2f} M samples/s on one core")
    print(f"padding each to 8192: fill {lengths.mean() / 8192:.4f}")


def main() -> None:
    commands = {"train": lambda: train(sys.argv[2:]), "packing": packing}
    commands[common.command(commands, __doc__)]()


if __name__ == "__main__":
    common.run(main)
