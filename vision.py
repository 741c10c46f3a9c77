"""RICE-ViT and PatchMerger: the vision tower of Innovator-VL.

Images come at their native resolution as rows of 14x14 patches in merge-window order (each 2x2 window contiguous, so
four rows become one token of the decoder). One class token per image stands before its patches; attention is full
inside an image and never crosses images; every block rotates queries and keys by the patch's row and column.

References: RICE-ViT (deepglint/MVT, loads as Transformers' MLCDVisionModel); Innovator-VL report arXiv:2601.19325 2.2;
modeling_innovator_vl.py of the released repository. Attribute names are those of the released checkpoint.

Departures
1. The released Hugging Face file strips class tokens with offsets that ignore the class tokens of earlier images, so
   from the second image on its rows are shifted. Here each image's own rows are returned (as its Megatron and sglang
   versions do). Single images agree with the released file exactly.
2. The class token and its rotary angles train with the tower (parameters in the released Hugging Face file, buffers
   that never move in its Megatron code).

Letters: N images, P patches of all images, S = P + N rows with class tokens, C width, A heads, d head width,
M = P/4 merged tokens, D width of the decoder.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import Documents, attend, rotate


@dataclass
class VisionConfig:
    depth: int = 24  # transformer blocks
    embed_dim: int = 1024  # width C
    num_heads: int = 16  # A
    intermediate_size: int = 4096  # width of the MLP
    in_channels: int = 3
    patch_size: int = 14  # pixels a side
    spatial_merge_size: int = 2  # patches a side that become one token of the decoder
    layer_norm_eps: float = 1e-5  # of every LayerNorm, the merger's too
    rope_theta: float = 1e4

    def __post_init__(self):
        assert self.embed_dim % (4 * self.num_heads) == 0, (
            f"vision width {self.embed_dim} over {self.num_heads} heads: a head's width must divide by 4 "
            "(half its angles are the row's, half the column's)")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


class PatchEmbed(nn.Module):
    """14x14x3 pixels -> C: the released Conv2d weight, applied as the matrix product that it is."""
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_channels, cfg.embed_dim, cfg.patch_size, cfg.patch_size, bias=False)

    def forward(self, pixels_PX):
        return F.linear(pixels_PX, self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x_SC, angles, docs, impl):
        q, k, v = self.qkv(x_SC).view(-1, 3, self.heads, self.head_dim).unbind(1)  # [S, A, d] each
        out = attend(rotate(q, angles), rotate(k, angles), v, docs, False, impl)
        return self.proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.embed_dim)

    def forward(self, x_SC):
        return self.fc2(F.gelu(self.fc1(x_SC)))  # exact GELU


class Block(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.embed_dim, cfg.layer_norm_eps)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.embed_dim, cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def run(self, x_SC, angles, docs, impl):
        x_SC = x_SC + self.attn(self.norm1(x_SC), angles, docs, impl)
        return x_SC + self.mlp(self.norm2(x_SC))

    def forward(self, *args):
        return self.run(*args)  # training wraps `run` (checkpointing, compile) and leaves the module's hooks outside


class PatchMerger(nn.Module):
    """LayerNorm per patch, then the four patches of a 2x2 window through a two-layer MLP to one decoder token."""
    def __init__(self, cfg: VisionConfig, text_width: int):
        super().__init__()
        self.width = cfg.embed_dim * cfg.spatial_merge_size ** 2
        self.ln_q = nn.LayerNorm(cfg.embed_dim, cfg.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, text_width))

    def forward(self, x_PC):
        return self.mlp(self.ln_q(x_PC).view(-1, self.width))  # [M, D]


def patch_positions(grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """Row and column of every patch of one image (t, h, w), in merge-window order. -> [t*h*w, 2]"""
    t, h, w = grid
    hw = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)  # [h, w, 2]
    hw = hw.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(h * w, 2)
    return hw.repeat(t, 1)


class VisionTower(nn.Module):
    def __init__(self, cfg: VisionConfig, text_width: int):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.class_embedding = nn.Parameter(torch.empty(cfg.embed_dim))
        self.class_pos_emb = nn.Parameter(torch.empty(1, cfg.head_dim // 2))  # angles of the class token
        self.pre_layernorm = nn.LayerNorm(cfg.embed_dim, cfg.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg, text_width)

    def features(self, pixels_PX, grids: list[tuple[int, int, int]], impl: str = "sdpa"):
        """Patch features before the merger. pixels [P, 588] normalised, grids (t, h, w) per image. -> [P, C]"""
        frames = [h * w for t, h, w in grids for _ in range(t)]
        P, N, device = sum(frames), len(frames), pixels_PX.device
        assert pixels_PX.shape[0] == P, f"{pixels_PX.shape[0]} rows of pixels, but the grids {grids} need {P}"
        # rows of [class tokens; patches] in the order class 0, patches 0, class 1, patches 1, ...
        order, patch_rows, patch = [], [], 0
        for k, n in enumerate(frames):
            order += [torch.tensor([k]), torch.arange(N + patch, N + patch + n)]
            patch_rows.append(torch.arange(patch + k + 1, patch + k + 1 + n))  # NOTE k + 1 class tokens stand before
            patch += n
        order, patch_rows = (torch.cat(x).to(device, non_blocking=True) for x in (order, patch_rows))
        hw = torch.cat([patch_positions(g, self.cfg.spatial_merge_size) for g in grids]).to(device, non_blocking=True)
        docs = Documents.of([n + 1 for n in frames], device, impl)

        d4 = self.cfg.head_dim // 4  # frequencies for rows, as many for columns
        inv = self.cfg.rope_theta ** -(torch.arange(d4, device=device, dtype=torch.float32) / d4)
        angles = (hw[:, :, None] * inv).flatten(1)  # [P, d/2] = row angles, column angles
        angles = torch.cat([self.class_pos_emb.float().expand(N, -1), angles])[order]  # [S, d/2]
        angles = (angles.cos()[:, None], angles.sin()[:, None])

        patches = self.patch_embed(pixels_PX.to(self.patch_embed.proj.weight.dtype))
        x = torch.cat([self.class_embedding.expand(N, -1), patches])[order]  # [S, C]
        x = self.pre_layernorm(x)
        for block in self.blocks:
            x = block(x, angles, docs, impl)
        return x[patch_rows]

    def forward(self, pixels_PX, grids: list[tuple[int, int, int]], impl: str = "sdpa"):
        """pixels [P, 588] normalised, grids (t, h, w) in patches per image. -> [P/4, D] decoder tokens, in order"""
        return self.merger(self.features(pixels_PX, grids, impl))

    def init_weights(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        """Released initial values: N(0, 0.02), class token N(0, 1/C), its angles N(0, 1), norms 1, biases 0."""
        if name == "class_embedding":
            tensor.normal_(0, self.cfg.embed_dim ** -0.5, generator=generator)
        elif name == "class_pos_emb":
            tensor.normal_(0, 1, generator=generator)
        elif name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name or "ln_q" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 0.02, generator=generator)

    def flops(self, grids: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Forward FLOPs of (tower, merger) for these images: 2 per multiply-add of the matrix products."""
        c, frames = self.cfg, [h * w for t, h, w in grids for _ in range(t)]
        P, C = sum(frames), c.embed_dim
        linear = 2 * P * (c.in_channels * c.patch_size ** 2 * C + c.depth * (4 * C * C + 2 * C * c.intermediate_size))
        scores = 4 * C * c.depth * sum((n + 1) ** 2 for n in frames)
        return linear + scores, 2 * (P // 4) * self.merger.width * (self.merger.width + self.merger.mlp[2].out_features)
