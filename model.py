"""The decoder (Qwen2.5, Qwen3, dense or with experts), Innovator-VL around it, the loss, checkpoints and generation.

Everything is packed: the tokens of several documents lie end to end in one axis T, positions restart at 0 in each
document, and attention never leaves it. A batch of one is a pack of one document.

    model = Innovator.from_pretrained("DIR", dtype=torch.bfloat16, device="cuda")
    logits = model.logits(input_ids, pixel_values, image_grid_thw)          # [T, V] fp32
    tokens = model.generate([prompt_ids], pixel_values, image_grid_thw, max_new_tokens=64)[0]
    model.save_pretrained("OUT")                                            # the released layout

References: Qwen2.5 (arXiv:2412.15115), Qwen3 (arXiv:2505.09388), Innovator-VL (arXiv:2601.19325) and its released
modeling_innovator_vl.py. Parameter names are those of the released checkpoints, so NAMES below is all the mapping.

Departures
1. Positions are one-dimensional, as the released model really uses them (its get_rope_index is dead code).
2. Rotary angles and their products stay fp32 in bf16 models; the released file rounds cos and sin to bf16.
3. innovator-vl-4b is untied: stage 0 of the released code copies the tied embedding into lm_head.
4. innovator-vl-30b-a3b turns with theta 1e7, as two of its released configurations do; a third says 1e6.

Letters: T tokens of all documents, D width, H heads, K key/value heads, d head width, F MLP width, V vocabulary,
B sequences, S supervised rows.
"""
import functools
import json
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from common import UserError, atomic_dir, is_rank0, latest, write_json
from kernels.attention import Documents, attend, choose, rotate
from moe import MoE
from vision import VisionConfig, VisionTower

_TOKEN_IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
              "vision_end_token_id": 151653, "image_token_id": 151655, "video_token_id": 151656}


@dataclass
class ModelConfig:
    vocab_size: int = 151936  # V, rows of the embedding (the tokenizer may use fewer)
    hidden_size: int = 4096  # D
    intermediate_size: int = 12288  # F
    num_hidden_layers: int = 36
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 8  # K
    head_dim: int = 128  # d, free in Qwen3
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768  # longest document
    qkv_bias: bool = False  # Qwen2.5
    qk_norm: bool = True  # Qwen3: RMSNorm per head on queries and keys, before the rotation
    tie_word_embeddings: bool = False  # lm_head is the embedding
    num_experts: int = 0  # E routed experts in every block; 0: a dense MLP
    num_experts_per_tok: int = 8  # k
    moe_intermediate_size: int = 0  # n, width of an expert
    norm_topk_prob: bool = True  # the k routing weights sum to 1
    shared_expert_intermediate_size: int = 0  # width of the MLP that every token takes; 0: none
    shared_expert_gate: bool = False  # Qwen2-MoE: a sigmoid gate on that MLP
    expert_groups: list = field(default_factory=list)  # disciplines; the first E / S experts are the first one's, ...
    expert_scale: float = 1.0  # the experts' down projections were multiplied by this when they were split
    token_ids: dict = field(default_factory=lambda: dict(_TOKEN_IDS))  # ids that config.json carries; the tokenizer's
    vision: VisionConfig | None = None  # None: a text model

    @property
    def image_token_id(self) -> int:
        return self.token_ids["image_token_id"]

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, \
            f"{self.num_attention_heads} heads do not divide over {self.num_key_value_heads} key/value heads"
        if self.num_experts:
            assert 0 < self.num_experts_per_tok <= self.num_experts, \
                f"top-k {self.num_experts_per_tok} must lie in 1..{self.num_experts}, the number of experts"
            assert self.moe_intermediate_size > 0, "experts need a moe_intermediate_size above 0"
            assert self.num_experts % max(1, len(self.expert_groups)) == 0, \
                f"{self.num_experts} experts do not divide over {len(self.expert_groups)} disciplines"

    @staticmethod
    def from_hf(c: dict) -> "ModelConfig":
        """Reads config.json of Innovator-VL (and LLaVA-OneVision-1.5), Innovator's MoE, Qwen2/2.5 or Qwen3, dense or
        MoE."""
        t = c.get("text_config", c)
        if "num_local_experts" in t:  # the name under which Transformers 5 writes Qwen3-MoE's
            t = t | {"num_experts": t["num_local_experts"]}
        family = t["model_type"].lower()
        known = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "innovator_moe", "innovatorvl_text",
                 "innovatorvlmoe_text", "llavaonevision1_5_text")
        assert family in known, f"config.json: model_type {t['model_type']!r} is not one of {', '.join(known)}"
        rope = t.get("rope_parameters") or {"rope_theta": t["rope_theta"], **(t.get("rope_scaling") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        assert kind == "default", \
            f"config.json: rope scaling {kind!r} is not supported; only unscaled rotary angles are"
        v, moe = c.get("vision_config"), {}
        if t.get("num_experts"):
            assert not t.get("mlp_only_layers") and t.get("decoder_sparse_step", 1) == 1, \
                "config.json: mlp_only_layers or decoder_sparse_step leave dense blocks; only MoE in every one is read"
            moe = {k: t[k] for k in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
            moe |= {"shared_expert_gate": family == "qwen2_moe"} | {k: t[k] for k in (
                "shared_expert_intermediate_size", "shared_expert_gate", "expert_groups", "expert_scale") if k in t}
        return ModelConfig(
            **{k: t[k] for k in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")},
            head_dim=t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"], rope_theta=rope["rope_theta"],
            qkv_bias=t.get("attention_bias", t.get("qkv_bias", family.startswith("qwen2"))),
            qk_norm=t.get("use_qk_norm", not family.startswith("qwen2")), **moe,
            tie_word_embeddings=c.get("tie_word_embeddings", t.get("tie_word_embeddings", False)),
            token_ids={k: next((x[k] for x in (c, t) if x.get(k) is not None), default)
                       for k, default in _TOKEN_IDS.items()},
            vision=v and VisionConfig(**{k: v[k] for k in (
                "depth", "embed_dim", "num_heads", "intermediate_size", "in_channels", "patch_size",
                "spatial_merge_size", "layer_norm_eps")}))

    def to_hf(self, dtype: torch.dtype) -> dict:
        """config.json of the released class (vision), of Qwen2ForCausalLM / Qwen3ForCausalLM and their MoE (text), or,
        for an upcycled model, of our own."""
        dtype, moe = str(dtype).removeprefix("torch."), [f for f in asdict(self) if "expert" in f or f in (
            "moe_intermediate_size", "norm_topk_prob")]
        text = {k: v for k, v in asdict(self).items() if k not in ("vision", "token_ids", "qkv_bias", "qk_norm", *moe)}
        if self.num_experts:
            text |= {k: v for k, v in asdict(self).items() if k in moe} | {
                "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
        text |= {"hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0, "initializer_range": 0.02,
                 "use_sliding_window": False, "sliding_window": None, "use_cache": True, "torch_dtype": dtype}
        if self.vision is None:
            assert self.qkv_bias != self.qk_norm, "a text checkpoint is Qwen2 (bias) or Qwen3 (q/k norm)"
            family, arch = ("qwen3", "Qwen3") if self.qk_norm else ("qwen2", "Qwen2")
            if self.num_experts and (not self.shared_expert_intermediate_size if self.qk_norm
                                     else self.shared_expert_gate):
                family, arch = family + "_moe", arch + "Moe"
            elif self.num_experts:
                family, arch = "innovator_moe", "InnovatorMoe"
            ids = {k: self.token_ids[k] for k in ("bos_token_id", "eos_token_id")}
            return {"architectures": [arch + "ForCausalLM"], "model_type": family} | ids | text | (
                {"attention_bias": False} if self.qk_norm else {}) | (
                {"attention_bias": self.qkv_bias, "use_qk_norm": self.qk_norm} if family == "innovator_moe" else {})
        vision = asdict(self.vision) | {
            "model_type": "rice_vit", "hidden_size": self.vision.embed_dim, "hidden_act": "gelu",
            "temporal_patch_size": 1, "text_hidden_size": self.hidden_size}
        return {"architectures": ["InnovatorVl_ForConditionalGeneration"], "model_type": "innovator_vl",
                **self.token_ids, "vocab_size": self.vocab_size, "tie_word_embeddings": self.tie_word_embeddings,
                "torch_dtype": dtype,
                "text_config": text | {"model_type": "InnovatorVl_text", "attention_bias": self.qkv_bias,
                                       "use_qk_norm": self.qk_norm},
                "vision_config": vision}


_QWEN25_7B = ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072, qkv_bias=True,
                         qk_norm=False)
_TINY = ModelConfig(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=1e4,
                    max_position_embeddings=2048)
_MINI = ModelConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                    num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192)


def upcycled(c: ModelConfig, groups: list[str], slices: int, top_k: int, **fields) -> ModelConfig:
    """A dense model's configuration with `slices` experts a discipline, each a slice of its MLP, and that MLP shared.
    """
    assert c.num_experts == 0, "the model is a MoE already"
    assert c.intermediate_size % slices == 0, \
        f"an MLP of {c.intermediate_size} does not divide into {slices} slices"
    return replace(c, num_experts=len(groups) * slices, num_experts_per_tok=top_k, expert_groups=list(groups),
                   moe_intermediate_size=c.intermediate_size // slices,
                   shared_expert_intermediate_size=c.intermediate_size, **fields)


_EIGHT = [f"discipline {i}" for i in range(8)]
_TINY_VIT = VisionConfig(depth=4, embed_dim=128, num_heads=4, intermediate_size=384)
PRESETS = {  # sizes: the released configurations; tiny and mini are ours
    "qwen2.5-7b": _QWEN25_7B,
    "qwen3-8b": ModelConfig(max_position_embeddings=40960),
    "innovator-vl-8b": ModelConfig(vision=VisionConfig()),
    "innovator-vl-4b": ModelConfig(hidden_size=2560, intermediate_size=9728, rope_theta=5e6,
                                   max_position_embeddings=262144, vision=VisionConfig()),
    "innovator-vl-14b": ModelConfig(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
                                    num_attention_heads=40, vision=VisionConfig()),
    # Qwen3-30B-A3B under RICE-ViT
    "innovator-vl-30b-a3b": ModelConfig(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_key_value_heads=4, rope_theta=1e7,
        num_experts=128, moe_intermediate_size=768, max_position_embeddings=40960, vision=VisionConfig()),
    # Qwen2.5-7B upcycled: eight disciplines in eight slices, top 8
    "innovator-53b-a13b": upcycled(_QWEN25_7B, _EIGHT, 8, 8),
    # a laptop CPU: the toy world in minutes
    "tiny": replace(_TINY, vision=_TINY_VIT),
    "tiny-moe": upcycled(replace(_TINY, qkv_bias=True, qk_norm=False), _EIGHT, 8, 8),
    # about 100M, one GPU: real tokenizer, real resolution
    "mini": replace(_MINI, vision=VisionConfig(depth=6, embed_dim=384, num_heads=6, intermediate_size=1536)),
    "mini-moe": upcycled(replace(_MINI, qkv_bias=True, qk_norm=False, tie_word_embeddings=False), _EIGHT, 8, 8),
}


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_TD, angles, docs, impl, cache=None):
        q, k, v = (p(x_TD).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)  # [T, H, d], [T, K, d]
        if cache is None:
            out = attend(q, k, v, docs, True, impl)
        else:
            out = cache.attend(q, k, v, docs, impl)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, D: int, F: int):
        super().__init__()
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if not c.num_experts else MoE(
            c, shared=MLP(c.hidden_size, c.shared_expert_intermediate_size) if c.shared_expert_intermediate_size
            else None)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.around = None  # with expert parallelism, the experts' own sharding unit

    def run(self, x_TD, angles, docs, impl, cache=None, labels=None, experts=None):
        """-> x [T, D]; and for experts with labels their routing (moe.MoE), else None."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), angles, docs, impl, cache)
        h_TD = self.post_attention_layernorm(x_TD)
        y_TD, routing = self.mlp(h_TD, labels, experts) if isinstance(self.mlp, MoE) else (self.mlp(h_TD), None)
        return x_TD + y_TD, routing

    def forward(self, *args):
        # training wraps `run` (checkpointing, compile) and leaves the hooks of sharding units outside
        return self.run(*args) if self.around is None else self.around(self.run, *args)


class Decoder(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.rope = (c.rope_theta, c.head_dim)

    def forward(self, x_TD, positions_T, docs, impl, cache=None, labels=None, experts=None):
        """-> hidden rows [T, D], and a MoE's routing over its layers or None: losses [L, 3], counts [L, S + 1, E], best
        experts [L, T, k]. experts [L, T, k]: replayed ones."""
        theta, d = self.rope
        inv = 1 / theta ** (torch.arange(0, d, 2, device=x_TD.device, dtype=torch.float32) / d)
        angles = positions_T[:, None].float() * inv  # [T, d/2]
        angles = (angles.cos()[:, None], angles.sin()[:, None])
        routing = []
        for layer, block in enumerate(self.layers):
            x_TD, r = block(x_TD, angles, docs, impl, cache and cache.layer(layer), labels,
                            None if experts is None else experts[layer])
            routing += [r] if r is not None else []
        return self.norm(x_TD), tuple(torch.stack(r) for r in zip(*routing)) or None


@dataclass
class Pack:
    """One micro-batch: several documents end to end, with their images and the rows that are supervised."""
    input_ids: torch.Tensor  # [T] int64
    docs: Documents
    positions: torch.Tensor  # [T] restart at 0 in every document
    rows: torch.Tensor  # [S] rows whose next token is supervised
    targets: torch.Tensor  # [S] that next token
    weights: torch.Tensor  # [S] fp32 weight of each in the loss
    pixels: torch.Tensor | None = None  # [P, 588] normalised patches
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    image_rows: torch.Tensor | None = None  # [M] rows that hold <|image_pad|>, in order
    labels: torch.Tensor | None = None  # [T] discipline of each token (moe.routing_losses); None: not counted
    experts: torch.Tensor | None = None  # [L, T, k] experts that a MoE uses in place of its own choice, -1: its own
    image_from: torch.Tensor | None = None  # [M] the merged row of each if documents share pictures; None: in order


class Innovator(nn.Module):
    """Decoder + vision tower + head. config, attention ('auto', 'flash-attn', 'varlen' or 'sdpa')."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attention = "auto"
        self.assets: Path | None = None  # folder whose tokenizer and processor files travel with the checkpoint
        self.model = Decoder(config)
        self.visual = VisionTower(config.vision, config.hidden_size) if config.vision else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:  # moving or converting makes new parameters: tie them again
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    @property
    def impl(self) -> str:
        w = self.model.norm.weight
        return choose(self.attention, w.device, self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(self, "mixed_dtype", None) or self.model.norm.weight.dtype  # sharded models have mixed_dtype

    def embed(self, ids_T, pixels=None, grids=(), image_rows=None, image_from=None):
        """Token rows with the merged image rows in the places of <|image_pad|>. -> [T, D]"""
        x_TD = self.model.embed_tokens(ids_T)
        if pixels is None:
            return x_TD
        rows_MD = self.visual(pixels, grids, self.impl)
        rows_MD = rows_MD if image_from is None else rows_MD[image_from]
        if image_rows is None:
            image_rows = (ids_T == self.config.image_token_id).nonzero()[:, 0]
        elif image_rows.numel() == 0:  # a training pack without images: all ranks still gather and reduce alike
            return x_TD + 0 * rows_MD.sum()
        assert image_rows.numel() == rows_MD.shape[0], \
            f"{image_rows.numel()} image tokens in the text, {rows_MD.shape[0]} image rows from grids {list(grids)}"
        return x_TD.index_copy(0, image_rows, rows_MD.to(x_TD.dtype))

    def hidden(self, p: Pack):
        x_TD = self.embed(p.input_ids, p.pixels, p.grids, p.image_rows, p.image_from)
        return self.model(x_TD, p.positions, p.docs, self.impl, labels=p.labels, experts=p.experts)

    def forward(self, p: Pack, entropy: bool | None = None, temperature: float = 1.0):
        """The weighted sum of -log p over the supervised rows and its unweighted twin (both fp32 scalars), or, with
        entropy given, the log-probability of each target and (entropy=True) its distribution's entropy, each [S], of
        the logits over `temperature`.
        Third: the routing of a MoE (Decoder.forward), if the pack has labels."""
        h_TD, routing = self.hidden(p)
        h_SD = h_TD.index_select(0, p.rows)  # the head runs on supervised rows only
        if entropy is None:
            return *linear_cross_entropy(h_SD, self.lm_head.weight, p.targets, p.weights), routing
        h_SD = h_SD if temperature == 1 else h_SD / temperature  # the head is linear
        return *token_logprobs(h_SD, self.lm_head.weight, p.targets, entropy), routing

    def logits(self, input_ids, pixel_values=None, image_grid_thw=None) -> torch.Tensor:
        """Logits of one document. input_ids [T], pixel_values [P, 588], image_grid_thw [N, 3]. -> [T, V] fp32"""
        ids = torch.as_tensor(input_ids, device=self.device).flatten()
        grids = [] if image_grid_thw is None else [tuple(g) for g in torch.as_tensor(image_grid_thw).tolist()]
        docs = Documents.of([len(ids)], ids.device, self.impl)
        x = self.embed(ids, None if pixel_values is None else pixel_values.to(ids.device), grids)
        return self.lm_head(self.model(x, docs.positions().to(ids.device), docs, self.impl)[0]).float()

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def train_flops(self, lengths: list[int], grids, supervised: int) -> float:
        """FLOPs that a training step needs for these documents: forward, gradient to inputs where it flows, gradient to
        weights where they train. Recomputation is not counted, nor the head on unsupervised rows."""
        c, trained = self.config, self._trained
        active = c.intermediate_size if not c.num_experts else \
            c.shared_expert_intermediate_size + c.num_experts_per_tok * c.moe_intermediate_size
        T, D, wide = sum(lengths), c.hidden_size, c.num_attention_heads * c.head_dim
        linear = 2 * T * c.num_hidden_layers * (
            D * (2 * wide + 2 * c.num_key_value_heads * c.head_dim) + 3 * D * active + D * c.num_experts)
        experts = 2 * T * c.num_hidden_layers * 3 * D * c.num_experts_per_tok * c.moe_intermediate_size
        scores = 2 * c.num_hidden_layers * wide * sum(n * n for n in lengths)  # causal: half of 4
        # the gradient passes through the decoder; routers alone (stage route) learn from losses at their own outputs
        flow = 2 if trained["decoder"] or trained["experts"] or trained["visual."] else 1
        total = linear * (flow + trained["decoder"]) + scores * (3 if flow == 2 else 1)
        total += experts if trained["experts"] and not trained["decoder"] else 0
        total += 2 * supervised * D * c.vocab_size * (
            flow + (trained["lm_head"] or c.tie_word_embeddings and trained["decoder"]))
        if self.visual is not None and grids:
            tower_flops, merger_flops = self.visual.flops(grids)
            total += tower_flops * (3 if trained["tower"] else 1)
            total += merger_flops * (1 + trained["visual.merger"] + trained["tower"])
        return float(total)

    @functools.cached_property
    def _trained(self) -> dict[str, bool]:
        """Which parts have parameters that train; asked first when training starts."""
        names = [n for n, p in self.named_parameters() if p.requires_grad]
        trained = {part: any(n.startswith(part) for n in names) for part in ("lm_head", "visual.merger", "visual.")}
        trained["tower"] = any(n.startswith("visual.") and not n.startswith("visual.merger") for n in names)
        trained["experts"] = any(".experts." in n for n in names)
        trained["decoder"] = any(n.startswith("model.layers.") and ".experts." not in n and ".mlp.gate." not in n
                                 for n in names)
        return trained

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(cls, path, dtype: torch.dtype | None = None, device="cpu",
                        attention: str = "auto") -> "Innovator":
        """Loads a Hugging Face folder (safetensors, single or sharded; released or in-memory names) in its own dtype or
        in `dtype`. Each tensor is read once, straight to the device."""
        model = cls.on_meta(config_of(path))
        model.attention = attention
        if dtype is None:
            saved = json.loads((checkpoint_folder(path) / "config.json").read_text())
            dtype = getattr(torch, saved.get("torch_dtype") or saved.get("dtype") or "float32")
        model.to(dtype).to_empty(device=device)
        load_weights(model, path)
        return model.eval()

    @classmethod
    def on_meta(cls, config: ModelConfig) -> "Innovator":
        """All names and shapes, no memory."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_config(cls, config: ModelConfig, dtype=torch.float32, device="cpu", seed: int = 0) -> "Innovator":
        """Random weights: N(0, 0.02), norms 1, biases 0."""
        model = cls.on_meta(config).to(dtype).to_empty(device=device)
        init_weights(model, seed)
        return model

    def save_pretrained(self, path, dtype: torch.dtype | None = None) -> None:
        """Writes the released layout with config, tokenizer and processor files; every rank of a sharded model
        calls it."""
        with atomic_dir(path) as tmp:
            save_weights(self, tmp, dtype)

    # ---- generation -------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], pixel_values=None, image_grid_thw=None, *, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, stop_ids=(), seed: int = 0,
                 use_cache: bool = True, on_token=None, logprobs: bool = False, n: int = 1, experts: bool = False):
        """Continues every prompt n times; returns the new tokens of each (B n lists, a prompt's together), ending with
        the stop id that ended it, if one did. With logprobs or experts, also (else None) the log-probability of each
        token at this temperature (before top_p and top_k), and a MoE's choices for each token that it read:
        [prompt + new - 1, L, k] int16.

        prompts: B lists of ids. pixel_values [P, 588], image_grid_thw [N, 3]: all prompts' images, in order of
        appearance. temperature 0 is greedy. top_p and top_k cut the distribution after temperature; 1.0 and 0 are off.
        on_token(b, id) is called as tokens come; where it returns true, that continuation ends. use_cache=False
        recomputes everything each step: the reference.
        """
        limit = self.config.max_position_embeddings
        longest = max(map(len, prompts)) + max_new_tokens
        assert min(map(len, prompts)) > 0, f"prompt {min(range(len(prompts)), key=lambda b: len(prompts[b]))} is empty"
        assert longest <= limit, f"prompt + max_new_tokens = {longest} tokens, the model's context is {limit}"
        assert use_cache or n == 1 and not experts, "without the cache: one continuation a prompt, no experts"
        assert not experts or self.config.num_experts, "the model has no experts"
        device, impl, B = self.device, self.impl, len(prompts)
        generator = torch.Generator(device=device).manual_seed(seed)
        grids = [] if image_grid_thw is None else [tuple(g) for g in torch.as_tensor(image_grid_thw).tolist()]
        flat = torch.tensor([t for p in prompts for t in p], device=device)
        pixels = None if pixel_values is None else pixel_values.to(device)
        docs = Documents.of([len(p) for p in prompts], device, impl)
        positions = docs.positions().to(device)
        cache = KVCache(self.config, B, longest, device, self.compute_dtype, docs, positions) if use_cache else None
        x = self.embed(flat, pixels, grids)
        last = docs.cu[1:].long() - 1
        new, alive, logps = [[] for _ in range(B * n)], [True] * B * n, [[] for _ in range(B * n)]
        rows, read = list(range(B * n)), []  # the sequence of every row of the batch; its choices of experts
        for step in range(max_new_tokens):
            labels = torch.full((len(x),), len(self.config.expert_groups), device=device) if experts else None
            h, routing = self.model(x, positions, docs, impl, cache, labels)
            read += [(rows, routing[2].transpose(0, 1))] if experts else []  # [prompts' tokens or rows, L, k]
            logits = self.lm_head(h[last]).float()  # [B n, V]
            if n > 1 and not step:
                logits = logits.repeat_interleave(n, 0)
                cache.repeat(n)
            ids = sample(logits, temperature, top_p, top_k, generator)
            said = (logits / (temperature or 1)).log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist() if logprobs \
                else ()
            for k, (b, t) in enumerate(zip(rows, ids.tolist())):
                if alive[b]:
                    new[b].append(t)
                    logps[b] += said[k:k + 1]
                    alive[b] = t not in stop_ids
                    if on_token and on_token(b, t):
                        alive[b] = False
            if not any(alive):
                break
            if use_cache and 2 * sum(alive) <= len(rows):  # those that ended leave the batch
                stay = torch.tensor([k for k, b in enumerate(rows) if alive[b]], device=device)
                rows, ids = [b for b in rows if alive[b]], ids[stay]
                cache.keep(stay)
            if use_cache:
                positions = cache.step()
                x, last = self.model.embed_tokens(ids), slice(None)
            else:
                full = [p + n + [0] * (len(new[0]) - len(n)) if n else p for p, n in zip(prompts, new)]
                docs = Documents.of([len(p) for p in full], device, impl)
                positions, last = docs.positions().to(device), docs.cu[1:].long() - 1
                x = self.embed(torch.tensor([t for p in full for t in p], device=device), pixels, grids)
        if not (logprobs or experts):
            return new
        return new, logps if logprobs else None, self._choices(read, prompts, new) if experts else None

    @staticmethod
    def _choices(read, prompts, new):
        """The experts of every token that generate read, one array a continuation."""
        of_prompts = read[0][1].cpu().split([len(p) for p in prompts])
        chosen = [[of_prompts[b * len(prompts) // len(new)]] for b in range(len(new))]
        for rows, choices in read[1:]:
            for b, own in zip(rows, choices.cpu().split(1)):
                chosen[b].append(own)
        return [torch.cat(c)[:len(p) + len(ids) - 1].numpy()
                for c, ids, p in zip(chosen, new, (p for p in prompts for _ in range(len(new) // len(prompts))))]


class KVCache:
    """Keys and values of B sequences, [layer][B, longest, K, d]; the first call is the packed prompt, later ones add
    one token a sequence."""
    def __init__(self, c: ModelConfig, B: int, longest: int, device, dtype, docs: Documents, positions):
        shape = (c.num_hidden_layers, B, longest, c.num_key_value_heads, c.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.rows = torch.repeat_interleave(torch.arange(B), torch.tensor(docs.lengths)).to(device)  # [T] sequence
        self.positions = positions  # [T] place of a row in its sequence
        self.next = torch.tensor(docs.lengths, device=device)  # [B]
        self.mask = None  # the prompt attends by documents

    def repeat(self, n: int) -> None:
        """After the prompts: n continuations of each."""
        self.k, self.v, self.next = (x.repeat_interleave(n, d) for x, d in ((self.k, 1), (self.v, 1), (self.next, 0)))

    def keep(self, rows: torch.Tensor) -> None:
        """These sequences only."""
        self.k, self.v, self.next = self.k[:, rows], self.v[:, rows], self.next[rows]

    def layer(self, i: int) -> "KVCache":
        self.i = i
        return self

    def step(self) -> torch.Tensor:
        """Moves to the next token of every sequence and returns its position. -> [B]"""
        self.rows, self.positions = torch.arange(len(self.next), device=self.next.device), self.next
        self.next = self.next + 1
        self.mask = torch.arange(self.k.shape[2], device=self.next.device) < self.next[:, None]  # [B, longest]
        return self.positions

    def attend(self, q, k, v, docs, impl):
        self.k[self.i, self.rows, self.positions] = k
        self.v[self.i, self.rows, self.positions] = v
        if self.mask is None:
            return attend(q, k, v, docs, True, impl)
        keys, values = (x[self.i].transpose(1, 2) for x in (self.k, self.v))  # [B, K, longest, d]
        o = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=self.mask[:, None, None],
                                           enable_gqa=q.shape[1] != keys.shape[1])
        return o[:, :, 0]  # [B, H, d]


def sample(logits_BV, temperature: float, top_p: float, top_k: int, generator) -> torch.Tensor:
    """Next ids [B]: greedy at temperature 0; otherwise from the k most likely whose mass before them is below top_p."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_p >= 1 and not top_k:
        return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]
    logits, order = (logits_BV / temperature).sort(-1, descending=True)
    p = logits.softmax(-1)
    drop = p.cumsum(-1) - p >= top_p  # the first token always stays
    if top_k:
        drop[:, top_k:] = True
    p = p.masked_fill(drop, 0)
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


# ---- loss -----------------------------------------------------------------------------------------------------------
def _chunks(S: int, V: int):
    """Row ranges whose fp32 logits take at most 1 GiB."""
    n = max(1, 2 ** 28 // V)
    return [slice(i, min(i + n, S)) for i in range(0, S, n)]


def _logp(z_sV, targets_S, entropy: bool):
    """Logits in any precision -> fp32 log of their sum, log p of the target, the distribution's entropy, each [s]."""
    z_sV = z_sV.float()
    lse = z_sV.logsumexp(-1)
    logp_sV = z_sV - lse[:, None]
    logp = logp_sV.gather(-1, targets_S[:, None])[:, 0]
    return lse, logp, -(logp_sV.exp() * logp_sV).sum(-1) if entropy else None


def _d_logits(z_sV, lse, targets_S, g_logp, entropies, g_ent):
    """The gradient of sum g_logp log p + g_ent entropy in the logits, in their precision."""
    logp_sV = z_sV.float() - lse[:, None]
    p_sV = logp_sV.exp()
    hot = torch.arange(z_sV.shape[1], device=z_sV.device) == targets_S[:, None]
    g_sV = torch.where(hot, 1 - p_sV, -p_sV) * g_logp[:, None]  # d log p_t / d z = onehot - p
    if g_ent is not None:  # d H / d z = -p (log p + H)
        g_sV = g_sV - g_ent[:, None] * p_sV * (logp_sV + entropies[:, None])
    return g_sV.to(z_sV.dtype)


@functools.cache
def _fused(fn):
    """On GPUs one pass over the logits in place of one for each operation."""
    return torch.compile(fn, dynamic=True)


def _on(fn, z_sV, *args):
    return (_fused(fn) if z_sV.is_cuda else fn)(z_sV, *args)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_s -weight_s log softmax(h_s W^T)[target_s] by chunks of rows. The gradient is linear in the one incoming
    scalar, so it is made in the forward pass while a chunk's logits exist: 6 S D V operations, not 8."""
    @staticmethod
    def forward(ctx, h_SD, w_VD, targets_S, weights_S):
        need_h, need_w = ctx.needs_input_grad[:2]
        loss, plain = (torch.zeros((), device=h_SD.device) for _ in range(2))
        dh = torch.zeros_like(h_SD) if need_h else None
        dw = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if need_w else None  # fp32: sums chunks
        for rows in _chunks(h_SD.shape[0], w_VD.shape[0]):
            h, t, w = h_SD[rows], targets_S[rows], weights_S[rows]
            z = F.linear(h, w_VD)
            lse, logp, _ = _on(_logp, z, t, False)
            loss -= (w * logp).sum()
            plain -= logp.sum()
            if need_h or need_w:
                g = _on(_d_logits, z, lse, t, -w, None, None)
                if need_h:
                    dh[rows] = g @ w_VD
                if need_w:
                    dw += g.T @ h
        ctx.save_for_backward(dh, dw.to(w_VD.dtype) if need_w else None)
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx, g_loss, _):
        dh, dw = ctx.saved_tensors
        return (dh if dh is None else dh * g_loss.to(dh.dtype), dw if dw is None else dw * g_loss.to(dw.dtype),
                None, None)


class _TokenLogprobs(torch.autograd.Function):
    """log p and entropy per row; the backward pass makes each chunk's logits again."""
    @staticmethod
    def forward(ctx, h_SD, w_VD, targets_S, entropy):
        parts = [_on(_logp, F.linear(h_SD[rows], w_VD), targets_S[rows], entropy)
                 for rows in _chunks(h_SD.shape[0], w_VD.shape[0])]
        empty = torch.zeros(0, device=h_SD.device)
        lse, logp, ent = (torch.cat([empty, *(x for x in part if x is not None)]) for part in zip(*parts)) \
            if parts else (empty, empty.clone(), empty.clone())
        ctx.save_for_backward(h_SD, w_VD, targets_S, lse, ent)
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs no backward pass
        return logp, ent

    @staticmethod
    def backward(ctx, g_logp, g_ent):
        h_SD, w_VD, targets_S, lse, ent = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        dh = torch.zeros_like(h_SD) if need_h else None
        dw = torch.zeros(w_VD.shape, dtype=torch.float32, device=w_VD.device) if need_w else None
        for rows in _chunks(h_SD.shape[0], w_VD.shape[0]):
            h = h_SD[rows]
            g = _on(_d_logits, F.linear(h, w_VD), lse[rows], targets_S[rows], g_logp[rows],
                    *((None, None) if g_ent is None else (ent[rows], g_ent[rows])))
            if need_h:
                dh[rows] = g @ w_VD
            if need_w:
                dw += g.T @ h
        return dh, dw.to(w_VD.dtype) if need_w else None, None, None


def linear_cross_entropy(h_SD, w_VD, targets_S, weights_S=None):
    """Cross-entropy of a linear head that never holds [S, V] in fp32. -> (weighted sum, plain sum), fp32 scalars.
    The count is S: divide outside by the count of the whole step, over ranks and micro-batches."""
    if weights_S is None:
        weights_S = torch.ones(h_SD.shape[0], device=h_SD.device)
    return _LinearCrossEntropy.apply(h_SD, w_VD, targets_S, weights_S)


def token_logprobs(h_SD, w_VD, targets_S, entropy: bool = False):
    """log p of each target and the entropy of its distribution (empty unless asked), both [S] fp32, differentiable."""
    return _TokenLogprobs.apply(h_SD, w_VD, targets_S, entropy)


# ---- checkpoint names, loading, saving ------------------------------------------------------------------------------
# Our names are the released ones; this table turns the in-memory layout of the released class into them.
NAMES = [(re.compile(r"^model\.language_model\."), "model."), (re.compile(r"^model\.visual\."), "visual.")]
SHARD_BYTES = 5 * 2 ** 30
PROCESSOR = {  # what the released stage 0 sets on Qwen2.5-VL's processor
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_pixels": 3136, "max_pixels": 2560000, "patch_size": 14, "temporal_patch_size": 1, "merge_size": 2}}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def released_name(name: str) -> str:
    for pattern, new in NAMES:
        name = pattern.sub(new, name)
    return name


def pieces(name: str, shape) -> list[tuple[str, tuple[slice, ...]]]:
    """Where the parts of a parameter are in a checkpoint: [(name there, region of the parameter)]. Stacked experts are
    one tensor per expert and projection there; everything else is one tensor of the same name."""
    found = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up|down)_proj", name)
    if not found:
        return [(name, tuple(slice(0, n) for n in shape))]
    E, rows, columns = shape
    parts = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)} if found[2] == "gate_up" else \
        {"down_proj": (0, rows)}
    return [(f"{found[1]}.{e}.{proj}.weight", (slice(e, e + 1), slice(*r), slice(0, columns)))
            for e in range(E) for proj, r in parts.items()]


def file_shape(name: str, region: tuple[slice, ...]) -> tuple[int, ...]:
    """Shape in the file: an expert's tensor has no axis of experts."""
    shape = tuple(r.stop - r.start for r in region)
    return shape[1:] if ".mlp.experts." in name else shape


def config_of(path) -> ModelConfig:
    """The configuration of a checkpoint folder, a run folder (its newest step), or 'preset:NAME'."""
    if str(path).startswith("preset:"):
        name = str(path).removeprefix("preset:")
        assert name in PRESETS, f"preset {name!r}: choose one of {', '.join(PRESETS)}"
        return replace(PRESETS[name])
    file = checkpoint_folder(path) / "config.json"
    if not file.exists():
        raise UserError(f"{file}: not found; give a Hugging Face checkpoint folder or preset:NAME "
                        f"({', '.join(PRESETS)})")
    return ModelConfig.from_hf(json.loads(file.read_text()))


def checkpoint_folder(path) -> Path:
    """A checkpoint folder as it is; for the folder of a training run, its newest checkpoint."""
    return Path(path) if (Path(path) / "config.json").exists() else latest(path) or Path(path)


def weight_files(path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else the single one, else an error."""
    path = checkpoint_folder(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / f for f in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [path / "model.safetensors"]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise UserError(f"{path}: missing weight file(s) {', '.join(missing)}")
    return files


def local_slice(p: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """This rank's part of a parameter and where it lies in the whole."""
    if not isinstance(p, DTensor):
        return p, tuple(slice(0, n) for n in p.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape))


@torch.no_grad()
def load_weights(model: nn.Module, path) -> None:
    """Fills a model (plain or sharded) from a checkpoint folder; each rank reads only its rows of each tensor. Missing,
    extra and misshapen tensors are one error that lists them; nothing is read before the names and shapes agree."""
    params = {name: (p, region) for full, p in model.named_parameters() for name, region in pieces(full, p.shape)}
    found, wrong = {}, []
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():
                    name = released_name(key)
                    shape = tuple(f.get_slice(key).get_shape())
                    if name in found:
                        wrong.append(f"twice: {name} in {found[name][0].name} and {file.name}")
                    found[name] = (file, key)
                    if name in params and file_shape(name, params[name][1]) != shape:
                        wrong.append(f"shape: {name} is {list(shape)}, the model needs "
                                     f"{list(file_shape(name, params[name][1]))}")
        except Exception as e:
            if isinstance(e, (KeyboardInterrupt, UserError)):
                raise
            raise UserError(f"{file}: not a readable safetensors file ({e}); download or copy it again") from None
    if "lm_head.weight" in found and "lm_head.weight" not in params:
        found.pop("lm_head.weight")  # tied models may carry their head twice
    wrong += [f"missing: {n}" for n in params if n not in found] + [f"extra: {n}" for n in found if n not in params]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{path}: {len(wrong)} tensors do not fit the configuration: {'; '.join(wrong[:8])}{more}")
    for file in weight_files(path):
        with safe_open(file, "pt") as f:
            for name, (_, key) in ((n, v) for n, v in found.items() if v[0] == file):
                p, region = params[name]
                local, where = local_slice(p)
                both = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(where, region)]
                if all(start < stop for start, stop in both):  # this rank holds a part of it
                    source = [slice(start - r.start, stop - r.start) for (start, stop), r in zip(both, region)]
                    mine = local[tuple(slice(start - w.start, stop - w.start) for (start, stop), w in zip(both, where))]
                    mine.copy_(f.get_slice(key)[tuple(source[len(source) - len(f.get_slice(key).get_shape()):])]
                               .view(mine.shape))
    folder = checkpoint_folder(path)
    model.assets = folder if (folder / "tokenizer.json").exists() else model.assets


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, prefix: str = "") -> None:
    """Random values for the parameters whose name starts with `prefix`. Each tensor has its own generator, seeded by
    its name, and every rank makes the whole tensor and keeps its rows, so values do not depend on the world size."""
    for name, p in model.named_parameters():
        if not name.startswith(prefix):
            continue
        local, where = local_slice(p)
        generator = torch.Generator(device=local.device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        whole = torch.empty(p.shape, dtype=torch.float32, device=local.device)
        if name.startswith("visual."):
            model.visual.init_weights(name.removeprefix("visual."), whole, generator)
        elif name.endswith("bias"):
            whole.zero_()
        elif "norm" in name:
            whole.fill_(1)
        else:
            whole.normal_(0, 0.02, generator=generator)
        local.copy_(whole[where])


@torch.no_grad()
def gathered(model: Innovator, dtype: torch.dtype):
    """(name, whole parameter in `dtype`) one after the other; every rank gathers all of them in the same order."""
    for name, p in model.named_parameters():
        whole = p.detach().to(dtype)
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


def split_pieces(named):
    """(name, parameter) pairs -> those of the checkpoint (pieces)."""
    for full, whole in named:
        for name, region in pieces(full, whole.shape):
            yield name, whole[region].reshape(file_shape(name, region))


def save_weights(model: Innovator, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Weights (in `dtype`, else as they are), config.json and the tokenizer and processor files, into `folder`. Shards
    of a distributed model are gathered one parameter at a time; rank 0 holds at most one output file in memory."""
    dtype = dtype or model.model.norm.weight.dtype
    write_checkpoint(folder, model.config, split_pieces(gathered(model, dtype)), dtype, model.assets)


def write_checkpoint(folder: Path, config: ModelConfig, tensors, dtype: torch.dtype,
                     assets: Path | None) -> None:
    """Streams (name, tensor) pairs to safetensors files of SHARD_BYTES, then writes config.json and the files that
    travel along. Every rank runs the stream; rank 0 writes."""
    files, pending, size, total = {}, {}, 0, 0

    def flush():
        nonlocal pending, size
        if pending:
            name = f"part-{len(files):05d}"
            files[name] = list(pending)
            save_file(pending, folder / name, metadata={"format": "pt"})
            pending, size = {}, 0

    for name, tensor in tensors:
        if not is_rank0():
            continue
        pending[name] = tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()
        size, total = size + pending[name].nbytes, total + pending[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if not is_rank0():
        return
    flush()
    names = ["model.safetensors"] if len(files) == 1 else \
        [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for part, name in zip(list(files), names):
        (folder / part).rename(folder / name)
    if len(files) > 1:
        weight_map = {t: name for (part, ts), name in zip(files.items(), names) for t in ts}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config.to_hf(dtype))
    ids = config.token_ids
    write_json(folder / "generation_config.json", {
        "do_sample": False, "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]],
        "pad_token_id": ids["bos_token_id"]})
    if config.vision is not None:
        for name, value in PROCESSOR.items():
            write_json(folder / name, value)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if assets:
        copy_assets(assets, folder)


def copy_assets(source: Path, folder: Path) -> None:
    """Tokenizer, processor, template and remote-code files: all small files but the weights and the configuration."""
    for file in sorted(Path(source).iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".py", ".model") and not file.name.endswith(".index.json") \
                and file.name not in ("config.json",):
            shutil.copyfile(file, folder / file.name)
