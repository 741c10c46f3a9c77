"""Attention over packed documents: one function, three ways to run it.

For a document with rows i and causal or full scope S(i):   o_i = sum_{j in S(i)} softmax_j(q_i k_j / sqrt(d)) v_j.
Documents are laid end to end in one axis T; no row sees another document. K key/value heads serve H query heads.

    sdpa        torch.nn.functional.scaled_dot_product_attention on documents padded to powers of two: the reference
                twin, and the path on CPUs.
    varlen      torch.nn.attention.varlen.varlen_attn (FlashAttention inside torch), bf16/fp16 on GPUs.
    flash-attn  the flash-attn package's flash_attn_varlen_func, bf16/fp16 on GPUs.

Run `python kernels/attention.py` for the largest error against fp32 SDPA and the speed of each path at three shapes.
Letters: T rows of all documents, N documents, H query heads, K key/value heads, d head width.
"""
import inspect
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:  # absent in torch before 2.10
    from torch.nn.attention.varlen import varlen_attn
    _ARGS = inspect.signature(varlen_attn).parameters
    # torch 2.11 to 2.13 name causality and grouped heads differently
    _CAUSAL = dict(is_causal=True) if "is_causal" in _ARGS else dict(window_size=(-1, 0))
    _GQA = dict(enable_gqa=True) if "enable_gqa" in _ARGS else {}
except ImportError:
    varlen_attn = None
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

IMPLEMENTATIONS = ("flash-attn", "varlen", "sdpa")


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves 'auto' to the fastest path that can run here; a named path that cannot run is an error."""
    fast = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    can = {"flash-attn": fast and flash_attn_varlen_func is not None, "varlen": fast and varlen_attn is not None,
           "sdpa": True}
    if name == "auto":
        return next(n for n in IMPLEMENTATIONS if can[n])
    assert name in can, f"attention {name!r}: choose one of {', '.join(IMPLEMENTATIONS)} or auto"
    assert can[name], (
        f"attention {name!r} needs a CUDA device, bf16 or fp16 and the package: here {device.type}, {dtype}")
    return name


@dataclass
class Documents:
    """Where the documents of a pack lie. Built on the host from their lengths, so nothing waits for the GPU."""
    lengths: list[int]
    cu: torch.Tensor  # [N+1] int32, cumulative lengths
    longest: int  # rounded up to a power of two, so that compiled code sees few values
    buckets: list  # for sdpa: (rows [n * L] of the pack, n, valid [n, L] or None when nothing is padded)
    back: torch.Tensor | None  # for sdpa: [T] where the buckets' valid rows, one after another, hold row t

    @staticmethod
    def of(lengths: list[int], device: torch.device, impl: str) -> "Documents":
        starts = [0, *itertools.accumulate(lengths)]
        cu = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        buckets, order = [], []
        if impl == "sdpa":
            groups = {}  # documents whose lengths share a power of two are padded to their longest and run together
            for start, n in zip(starts, lengths):
                groups.setdefault(max(n - 1, 0).bit_length(), []).append((start, n))
            for members in groups.values():
                start, n = torch.tensor(members).T[:, :, None]
                ar = torch.arange(n.max())
                valid = ar < n  # [n, L]
                rows = torch.where(valid, start + ar, start)
                order.append(rows[valid])
                buckets.append((rows.flatten().to(device), len(members),
                                None if bool(valid.all()) else valid.to(device)))
        back = torch.cat(order).argsort().to(device) if order else None
        longest = 1 << max(max(lengths, default=1) - 1, 0).bit_length()
        return Documents(lengths, cu, longest, buckets, back)

    def positions(self) -> torch.Tensor:
        """[T] positions that restart at 0 in each document (on the host)."""
        return torch.cat([torch.arange(n) for n in self.lengths]) if self.lengths else torch.zeros(0, dtype=torch.long)


@dataclass
class Branches:
    """Continuations that share contexts. The pack holds all contexts, then all branches; a branch sees its context and
    itself. attend takes it in the place of Documents."""
    contexts: Documents
    lengths: list[tuple[int, int]]  # of each branch: its own rows, its context's and its own
    cu: torch.Tensor  # [N+1] int32, cumulative own rows
    keys: torch.Tensor  # [N+1] int32, cumulative rows seen
    rows: torch.Tensor  # rows seen, one branch after another

    @staticmethod
    def of(contexts: list[int], branches: list[tuple[int, int]], device: torch.device, impl: str) -> "Branches":
        """branches: (number of its context, rows above 0) of each."""
        starts, lengths, rows, at = [0, *itertools.accumulate(contexts)], [], [], sum(contexts)
        for context, own in branches:
            lengths.append((own, contexts[context] + own))
            rows += [torch.arange(starts[context], starts[context + 1]), torch.arange(at, at + own)]
            at += own
        def cumulative(x): return torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32).to(device)
        return Branches(Documents.of(contexts, device, impl), lengths, cumulative(n for n, _ in lengths),
                        cumulative(m for _, m in lengths), torch.cat(rows).to(device) if rows else None)

    def positions(self) -> torch.Tensor:
        """[T] on the host; a branch's continue its context's."""
        return torch.cat([self.contexts.positions(), *(torch.arange(m - n, m) for n, m in self.lengths)])


def _branches(q_THd, k_TKd, v_TKd, docs: Branches, impl: str):
    """Attention of the branches' rows: the last rows of a causal document each."""
    k, v = k_TKd.index_select(0, docs.rows), v_TKd.index_select(0, docs.rows)
    if impl == "sdpa":
        own, seen = zip(*docs.lengths)  # queries of zeros stand for the context's
        return torch.cat([F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (F.pad(q, (0, 0, 0, 0, m - n, 0)), *kv)), is_causal=True,
            enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)[-n:]
            for (n, m), q, *kv in zip(docs.lengths, q_THd.split(own), k.split(seen), v.split(seen))])
    longest, furthest = map(max, zip(*docs.lengths))
    if impl == "varlen":
        return varlen_attn(q_THd, k, v, docs.cu, docs.keys, longest, furthest, **_CAUSAL, **_GQA)
    return flash_attn_varlen_func(q_THd, k, v, docs.cu, docs.keys, longest, furthest, causal=True)


def _sdpa(q_THd, k_TKd, v_TKd, docs: Documents, causal: bool):
    out = []
    for rows, n, valid in docs.buckets:
        q, k, v = (x.index_select(0, rows).view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q_THd, k_TKd, v_TKd))
        # a padded key stands after every real query of its document, so the causal mask alone hides it
        mask = None if causal or valid is None else valid[:, None, None, :]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           enable_gqa=q.shape[1] != k.shape[1])
        o = o.transpose(1, 2)  # [n, L, H, d]
        out.append(o.flatten(0, 1) if valid is None else o[valid])
    return torch.cat(out).index_select(0, docs.back)


def attend(q_THd, k_TKd, v_TKd, docs: Documents | Branches, causal: bool, impl: str):
    """Softmax attention inside each document of a pack, scaled by d^-0.5. -> [T, H, d]"""
    if isinstance(docs, Branches):
        C = sum(docs.contexts.lengths)
        out = attend(q_THd[:C], k_TKd[:C], v_TKd[:C], docs.contexts, True, impl)
        return torch.cat([out, _branches(q_THd[C:], k_TKd, v_TKd, docs, impl)]) if docs.lengths else out
    if impl == "sdpa":
        return _sdpa(q_THd, k_TKd, v_TKd, docs, causal)
    if impl == "varlen":
        return varlen_attn(q_THd, k_TKd, v_TKd, docs.cu, docs.cu, docs.longest, docs.longest,
                           **(_CAUSAL if causal else {}), **_GQA)
    return flash_attn_varlen_func(q_THd, k_TKd, v_TKd, docs.cu, docs.cu, docs.longest, docs.longest, causal=causal)


def rotate(x_TXd: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in the NeoX pairing (i, i + d/2), computed in fp32; angles are (cos, sin) [T, 1, d/2]."""
    cos, sin = angles
    a, b = x_TXd.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_TXd.dtype)


if __name__ == "__main__":
    from torch.utils.benchmark import Timer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scale = 1 if device.type == "cuda" else 16  # a CPU runs a sixteenth of each shape
    print(f"{'shape':34} {'path':11} {'max error':>10} {'fwd+bwd ms':>11} {'TFLOP/s':>8}")
    for name, lengths, H, K, d, causal in (
            ("decoder, one document", [8192 // scale], 32, 8, 128, True),
            ("decoder, ragged documents", [n // scale for n in (4096, 2048, 1024, 512, 256, 160, 96)], 32, 8, 128,
             True),
            ("vision, four images", [n // scale for n in (4096, 2304, 1024, 784)], 16, 16, 64, False)):
        T = sum(lengths)
        q, k, v = (torch.randn(T, n, d, device=device, dtype=dtype, requires_grad=True) for n in (H, K, K))
        exact = attend(q.float(), k.float(), v.float(), Documents.of(lengths, device, "sdpa"), causal, "sdpa")
        for impl in IMPLEMENTATIONS:
            try:
                choose(impl, device, dtype)
            except AssertionError as e:
                print(f"{name:34} {impl:11} not here: {e}")
                continue
            docs = Documents.of(lengths, device, impl)
            def step(): attend(q, k, v, docs, causal, impl).sum().backward()
            error = (attend(q, k, v, docs, causal, impl).float() - exact).abs().max().item()
            ms = Timer("step()", globals=dict(step=step)).blocked_autorange(min_run_time=0.5).median * 1e3
            flop = 14 * H * d * sum(n * n for n in lengths) / (2 if causal else 1)
            print(f"{name:34} {impl:11} {error:10.2e} {ms:11.2f} {flop / ms / 1e9:8.1f}")
