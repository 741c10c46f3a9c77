"""Makes new checkpoints out of old ones.

    python upcycle.py stage0 --vit rice-vit-large-patch14-560 --llm Qwen3-8B-Base --out stage0
    python upcycle.py induct --dense Qwen2.5-7B --discipline chemistry --out chemistry0
    python upcycle.py split --dense Qwen2.5-7B --expert chemistry=runs/chemistry --expert physics=DIR ... --out split
    python upcycle.py extract --model runs/integrate --discipline chemistry --out chemistry1
    python upcycle.py merge --model runs/integrate --discipline chemistry --out chemistry-dense
    python upcycle.py export runs/integrate OUT
    python upcycle.py import OUT runs/again

stage0   RICE-ViT + a Qwen decoder + a fresh PatchMerger -> Innovator-VL. The tower comes in the names of Transformers'
         MLCDVisionModel (MLCD below is the whole mapping; its post_layernorm is not used). The merger is N(0, 0.02)
         with zero biases, or comes from --adapter.
induct   every MLP -> the MLP, now the shared expert, + one expert, its copy (train it: train_sft.py --stage induct).
split    each discipline's expert -> N slices along the intermediate dimension, S x N experts of one router, and the
         dense model's MLP as shared expert. --expert NAME=DIR takes an induct run, or the dense model itself: a copy.
extract  one discipline's slices put together again: split's inverse, the form of induct.
merge    one discipline's slices and the shared expert as one wide MLP: a dense Qwen checkpoint.
export   the Qwen2-MoE form, which Transformers, vLLM and SGLang load without code of ours; import reverses it exactly.

All but stage0 go through the files tensor by tensor and hold one output file in memory.

References: ds/merge_model.py of the released repository; Innovator-VL report arXiv:2601.19325; Innovator
arXiv:2507.18671, sections 4.1 and 4.2.

Departures
1. A tied decoder is untied, its embedding copied into lm_head, as the released merge does (stage0).
2. The tokenizer is the decoder's own, unless --processor names another (the released merge always takes Qwen2.5-VL's).
3. Routing weights sum to 1, so that right after a split the chosen slices of one expert come out divided by top-k; the
   paper mentions no factor against this. --scale none is its literal equation. --scale topk multiplies the slices' down
   projections by top-k: equal weights on the top-k = N slices of a discipline then give exactly what was induced.
4. The new router is N(0, 0.02); the paper does not say. Its weights are near equal and its choices chance until it is
   trained.
"""
import json
import re
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from tqdm import tqdm

from common import UserError, atomic_dir, command, parse, run
from data import Tokenizer
from model import (PRESETS, Innovator, ModelConfig, checkpoint_folder, config_of, init_weights, released_name, upcycled,
                   weight_files, write_checkpoint)
from vision import VisionConfig

# MLCDVisionModel -> visual.; q, k and v are joined below
MLCD = [(re.compile(p), new) for p, new in (
    (r"^(vision_model\.)?embeddings\.class_embedding$", "class_embedding"),
    (r"^(vision_model\.)?embeddings\.patch_embedding\.weight$", "patch_embed.proj.weight"),
    (r"^(vision_model\.)?class_pos_emb$", "class_pos_emb"),
    (r"^(vision_model\.)?pre_layrnorm\.", "pre_layernorm."),
    (r"^(vision_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\2.norm\3."),
    (r"^(vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\2.attn.proj."),
    (r"^(vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\2.attn.\3."),
    (r"^(vision_model\.)?encoder\.layers\.(\d+)\.mlp\.", r"blocks.\2.mlp."))]
DROPPED = re.compile(r"post_layernorm\.|inv_freq$")


def read_tensors(path, rename=released_name) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder under new names; '' drops one."""
    out = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as f:
            out |= {name: f.get_tensor(k) for k in f.keys() if (name := rename(k))}
    return out


def mlcd_name(key: str) -> str:
    if DROPPED.search(key):
        return ""
    for pattern, new in MLCD:
        if pattern.match(key):
            return pattern.sub(new, key)
    raise UserError(f"--vit: tensor {key} is not one of an MLCDVisionModel")


def read_rice_vit(path) -> tuple[VisionConfig, dict[str, torch.Tensor]]:
    """A RICE-ViT folder in MLCD names -> its sizes and the tensors under our names (without merger)."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise UserError(f"{file}: not found; --vit takes the folder of a RICE-ViT (MLCDVisionModel) or preset:NAME")
    c = json.loads(file.read_text())
    c = c.get("vision_config", c)
    config = VisionConfig(depth=c["num_hidden_layers"], embed_dim=c["hidden_size"], num_heads=c["num_attention_heads"],
                          intermediate_size=c["intermediate_size"], in_channels=c["num_channels"],
                          patch_size=c["patch_size"], layer_norm_eps=c["layer_norm_eps"])
    tensors = read_tensors(path, mlcd_name)
    for i in range(config.depth):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blocks.{i}.attn.{x}.{kind}", None) for x in "qkv"]
            if None in parts:
                raise UserError(f"--vit {path}: layer {i} lacks a {kind} of q_proj, k_proj or v_proj")
            tensors[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return config, tensors


@dataclass
class Stage0:
    llm: str  # Qwen2.5 or Qwen3 checkpoint, or the folder of a pretrain run
    vit: str  # RICE-ViT folder in MLCD names, or preset:NAME for a random tower of that size
    out: str  # folder to write
    adapter: str = ""  # checkpoint whose PatchMerger to take instead of a fresh one
    processor: str = ""  # folder whose tokenizer files to take instead of the decoder's
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights
    seed: int = 1234  # of the fresh parts


def stage0(c: Stage0) -> None:
    text = config_of(c.llm)
    if text.vision is not None:
        raise UserError(f"--llm {c.llm} already has a vision tower")
    sources = {}
    if c.vit.startswith("preset:"):
        vision = config_of(c.vit).vision
        if vision is None:
            raise UserError(f"--vit {c.vit} has no vision tower; "
                            + ", ".join(k for k, v in PRESETS.items() if v.vision) + " have")
    else:
        vision, sources = read_rice_vit(c.vit)
        sources = {f"visual.{k}": v for k, v in sources.items()}
    tok = Tokenizer(c.processor or checkpoint_folder(c.llm))
    config = replace(text, vision=vision, tie_word_embeddings=False, token_ids=tok.token_ids())
    model = Innovator.on_meta(config).to(getattr(torch, c.dtype)).to_empty(device="cpu")
    init_weights(model, c.seed, "visual.")
    decoder = read_tensors(c.llm)
    decoder.setdefault("lm_head.weight", decoder["model.embed_tokens.weight"])
    sources |= decoder
    if c.adapter:
        sources |= {k: v for k, v in read_tensors(c.adapter).items() if k.startswith("visual.merger.")}
    fresh, wrong = [], []
    with torch.no_grad():
        for name, p in tqdm(list(model.named_parameters()), desc="stage 0", disable=None):
            source = sources.pop(name, None)
            if source is None and (name.startswith("visual.merger.")
                                   or c.vit.startswith("preset:") and name.startswith("visual.")):
                fresh.append(name)
            elif source is None or source.shape != p.shape:
                wrong.append(f"{name} needs {list(p.shape)}, "
                             + ("missing" if source is None else f"found {list(source.shape)}"))
            else:
                p.copy_(source)
    wrong += [f"{name} has no place" for name in sources]
    if wrong:
        raise UserError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:8])}")
    model.assets = tok.path.parent
    model.save_pretrained(c.out)
    print(f"wrote {c.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(fresh)} tensors fresh "
          f"({'merger' if all('merger' in n for n in fresh) else 'vision tower and merger'})")
    print(f"next: python train_sft.py --stage align --model {c.out} --data LLAVA_558K --out runs/align")


# ---- dense -> MoE ---------------------------------------------------------------------------------------------------
MLP = re.compile(r"(model\.layers\.\d+\.mlp)\.(gate|up|down)_proj\.weight")


class Tensors:
    """A checkpoint's tensors by our names, read when asked for."""
    def __init__(self, path):
        self.path, self.files, self.where = path, [], {}
        for file in weight_files(path):
            self.files.append(safe_open(file, "pt"))
            self.where |= {released_name(k): (self.files[-1], k) for k in self.files[-1].keys()}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.where:
            raise UserError(f"{self.path}: has no tensor {name}")
        file, key = self.where[name]
        return file.get_tensor(key)


def write(out: str, source: str, config: ModelConfig, tensors, dtype: torch.dtype, count: int) -> None:
    folder = checkpoint_folder(source)
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it")
    with atomic_dir(out) as tmp:
        write_checkpoint(tmp, config, tqdm(tensors, total=count, desc=Path(out).name, disable=None), dtype,
                         folder if (folder / "tokenizer.json").exists() else None)


def moe_tensors(dense: Tensors, experts: list[Tensors], slices: int, scale: float, router):
    """(name, tensor) pairs of the upcycled model. experts: one checkpoint a discipline, in induct's form or dense."""
    for name in dense.where:
        found = MLP.fullmatch(name)
        if not found:
            yield name, dense[name]
            continue
        mlp, proj = found[1], f"{found[2]}_proj"
        yield f"{mlp}.shared_expert.{proj}.weight", dense[name]
        if proj == "gate_proj":
            yield f"{mlp}.gate.weight", router(f"{mlp}.gate.weight", dense[name])
        for s, expert in enumerate(experts):
            induced = f"{mlp}.experts.0.{proj}.weight"
            whole = expert[induced if induced in expert else name]
            for i, part in enumerate(whole.chunk(slices, dim=1 if proj == "down_proj" else 0)):
                yield f"{mlp}.experts.{s * slices + i}.{proj}.weight", part * scale if proj == "down_proj" else part


def check_base(dense: Tensors, expert: Tensors, name: str) -> None:
    """All that induct keeps frozen is the dense model's, bit for bit (in the expert's precision)."""
    for key in tqdm(dense.where, desc=f"compare {name}", disable=None):
        frozen = MLP.sub(r"\1.shared_expert.\2_proj.weight", key)
        frozen = frozen if frozen in expert else key
        theirs = expert[frozen]
        if theirs.shape != dense[key].shape or not torch.equal(theirs, dense[key].to(theirs.dtype)):
            raise UserError(f"--expert {name}={expert.path}: {frozen} is not that of --dense {dense.path}; all "
                            "inductions must start from the model that is split")


def router_init(E: int, std: float, seed: int):
    """name, gate projection of the layer -> that layer's router [E, D], the same for a seed and name everywhere."""
    def make(name: str, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        return torch.empty(E, like.shape[1]).normal_(0, std, generator=generator).to(like.dtype)
    return make


def upcycle(dense: str, experts: dict[str, str], slices: int, top_k: int, scale: float, std: float, seed: int,
            shared: bool, out: str) -> ModelConfig:
    for name in experts:
        assert name not in ("", "other", "all"), f"discipline {name!r}: give it a name of its own"
    base, sources = Tensors(dense), {name: Tensors(path) for name, path in experts.items()}
    config = upcycled(config_of(dense), list(experts), slices, top_k, expert_scale=scale)
    for name, path in experts.items():
        if checkpoint_folder(path) != checkpoint_folder(dense):
            theirs = config_of(path)
            if theirs.num_experts > 1:
                raise UserError(f"--expert {name}={path} has {theirs.num_experts} experts; give an induct run, or one "
                                "discipline of it: python upcycle.py extract -h")
            check_base(base, sources[name], name)
    if not shared:
        config = replace(config, shared_expert_intermediate_size=0)
    tensors = moe_tensors(base, list(sources.values()), slices, scale, router_init(config.num_experts, std, seed))
    write(out, dense, config, (t for t in tensors if shared or ".shared_expert." not in t[0]),
          base["model.norm.weight"].dtype, len(base.where) + config.num_hidden_layers * (3 * config.num_experts + 1))
    return config


@dataclass
class Induct:
    dense: str  # Qwen2.5, Qwen3 or Innovator-VL checkpoint, or the folder of a run
    discipline: str  # name of the expert, as in the data's field discipline
    out: str  # folder to write


def induct(c: Induct) -> None:
    upcycle(c.dense, {c.discipline: c.dense}, 1, 1, 1.0, 0.0, 0, True, c.out)
    print(f"wrote {c.out}: {c.dense} and a copy of every MLP, named {c.discipline}")
    print(f"next: python train_sft.py --stage induct --model {c.out} --data {c.discipline}.jsonl "
          f"--out runs/induct_{c.discipline}")


@dataclass
class Split:
    dense: str  # the checkpoint that all experts were induced from
    expert: list[str]  # NAME=DIR, once for each discipline; their order is that of the experts
    out: str  # folder to write
    slices: int = 8  # experts that each discipline's expert becomes
    top_k: int = 8  # experts a token goes to
    scale: Literal["none", "topk"] = "none"  # factor on the slices' down projections: 1 (the paper), or top-k
    shared: bool = True  # keep the dense MLP as shared expert
    router_std: float = 0.02  # of the new router
    seed: int = 1234  # of the new router


def split(c: Split) -> None:
    experts = {}
    for item in c.expert:
        name, _, path = item.partition("=")
        assert name and path, f"--expert {item}: write NAME=DIR"
        assert name not in experts, f"--expert {name} is given twice"
        experts[name] = path
    scale = float(c.top_k) if c.scale == "topk" else 1.0
    config = upcycle(c.dense, experts, c.slices, c.top_k, scale, c.router_std, c.seed, c.shared, c.out)
    print(f"wrote {c.out}: {config.num_experts} experts of {config.moe_intermediate_size} "
          f"({', '.join(experts)}: {c.slices} each), top {c.top_k}")
    print(f"next: python train_sft.py --stage route --model {c.out} --data LABELLED --out runs/route")


# ---- MoE -> one discipline ------------------------------------------------------------------------------------------
@dataclass
class Extract:
    model: str  # a MoE from split, or a run that trained it
    out: str  # folder to write
    discipline: str = ""  # whose experts; needed where there are several


def coarse_expert(source: Tensors, c: ModelConfig, discipline: str):
    """A function (layer's mlp, projection) -> the discipline's whole expert, as it was before the split."""
    if not c.num_experts or not c.expert_groups:
        raise UserError(f"{source.path} has no experts that belong to disciplines")
    discipline = discipline or (c.expert_groups[0] if len(c.expert_groups) == 1 else "")
    if discipline not in c.expert_groups:
        raise UserError(f"--discipline {discipline or '(none)'}: choose one of {', '.join(c.expert_groups)}")
    N = c.num_experts // len(c.expert_groups)
    first = c.expert_groups.index(discipline) * N

    def whole(mlp: str, proj: str) -> torch.Tensor:
        down = proj == "down_proj"
        parts = [source[f"{mlp}.experts.{e}.{proj}.weight"] for e in range(first, first + N)]
        return torch.cat(parts, dim=1) / c.expert_scale if down else torch.cat(parts)
    return discipline, whole


def single(c: Extract, dense: bool) -> None:
    source, config = Tensors(c.model), config_of(c.model)
    name, whole = coarse_expert(source, config, c.discipline)
    width = config.moe_intermediate_size * config.num_experts // len(config.expert_groups)

    def tensors():
        for key in source.where:
            mlp, _, proj = key.removesuffix(".weight").rpartition(".")
            if ".mlp.experts." in key or ".mlp.gate." in key and dense:
                continue
            if ".mlp.gate." in key:
                yield key, torch.zeros_like(source[key][:1])
            elif ".mlp.shared_expert." in key:
                mlp = mlp.removesuffix(".shared_expert")
                if not dense:
                    yield key, source[key]
                    yield f"{mlp}.experts.0.{proj}.weight", whole(mlp, proj)
                else:
                    yield f"{mlp}.{proj}.weight", torch.cat([source[key], whole(mlp, proj)], int(proj == "down_proj"))
            else:
                yield key, source[key]
    if not config.shared_expert_intermediate_size or config.shared_expert_gate:
        raise UserError(f"{c.model}: extract and merge need an ungated shared expert, as split makes it")
    one = dict(num_experts=1, num_experts_per_tok=1, expert_groups=[name], moe_intermediate_size=width)
    none = dict(num_experts=0, expert_groups=[], moe_intermediate_size=0, shared_expert_intermediate_size=0,
                num_experts_per_tok=8, intermediate_size=config.shared_expert_intermediate_size + width)
    dtype = source["model.norm.weight"].dtype
    write(c.out, c.model, replace(config, expert_scale=1.0, **(none if dense else one)), tensors(), dtype,
          len(source.where))
    print(f"wrote {c.out}: {name} of {c.model} as " + (f"a dense model with MLPs of {none['intermediate_size']}"
                                                       if dense else "shared expert + one expert"))
    print(f"next: python chat.py {c.out}" if dense else f"next: python upcycle.py merge --model {c.out} --out DENSE")


# ---- Qwen2-MoE ------------------------------------------------------------------------------------------------------
def to_qwen2_moe(name: str, tensor: torch.Tensor):
    """(name, tensor) of ours -> those of Qwen2-MoE. Its shared expert has a sigmoid gate: a gate of zeros is 1/2, and
    the doubled down projection takes it back (a power of two: exact in every precision)."""
    if name.endswith(".mlp.shared_expert.down_proj.weight"):
        yield name, tensor * 2
        yield name.replace("shared_expert.down_proj", "shared_expert_gate"), torch.zeros_like(tensor[:1, :1]).expand(
            1, tensor.shape[0])
    else:
        yield name, tensor


def from_qwen2_moe(name: str, tensor: torch.Tensor):
    if name.endswith(".mlp.shared_expert_gate.weight"):
        if tensor.any():
            raise UserError(f"{name} is not zero: this Qwen2-MoE is no export of ours; it can be used as it is")
    else:
        yield name, tensor / 2 if name.endswith(".mlp.shared_expert.down_proj.weight") else tensor


def why_not_qwen2_moe(config: ModelConfig) -> str | None:
    """Why a model cannot take the form of Qwen2-MoE, or None."""
    if not config.num_experts:
        return "it has no experts"
    if config.vision is not None:
        return "it has a vision tower, which Qwen2-MoE has not; upcycle its decoder alone"
    if config.qk_norm or not config.qkv_bias:
        return ("it was made from Qwen3, and no released architecture has Qwen3's attention with a shared expert. Ways "
                "out: use it with chat.py and evaluate.py as it is; make one discipline a dense Qwen3 with upcycle.py "
                "merge; or upcycle a Qwen2.5 model")
    if not config.shared_expert_intermediate_size or config.shared_expert_gate:
        return "it has no ungated shared expert"


def convert(source: str, out: str, to_qwen2: bool) -> None:
    tensors, config = Tensors(source), config_of(source)
    if to_qwen2:
        why = why_not_qwen2_moe(config)
    else:
        why = None if config.num_experts and config.shared_expert_gate else "it is not in the Qwen2-MoE form"
    if why:
        raise UserError(f"{source} cannot be {'exported' if to_qwen2 else 'imported'}: {why}")
    one = to_qwen2_moe if to_qwen2 else from_qwen2_moe
    dtype = tensors["model.norm.weight"].dtype
    config = replace(config, shared_expert_gate=to_qwen2)
    write(out, source, config, (pair for name in tensors.where for pair in one(name, tensors[name])), dtype,
          len(tensors.where))
    print(f"wrote {out}: " + ("Qwen2MoeForCausalLM, for Transformers, vLLM and SGLang" if to_qwen2
                              else "the form that train_sft.py trains"))
    print(f"next: vllm serve {out}" if to_qwen2 else f"next: python train_sft.py --stage integrate --model {out} ...")


def main() -> None:
    commands = {"stage0": (Stage0, stage0), "induct": (Induct, induct), "split": (Split, split),
                "extract": (Extract, lambda c: single(c, dense=False)),
                "merge": (Extract, lambda c: single(c, dense=True))}
    word, argv = command((*commands, "export", "import"), __doc__), sys.argv[2:]
    if word in commands:
        cls, fn = commands[word]
        fn(parse(cls, argv, __doc__))
    elif len(argv) == 2 and not any(a.startswith("-") for a in argv):
        convert(*argv, to_qwen2=word == "export")
    else:
        raise UserError(f"write: python upcycle.py {word} DIR OUT; python upcycle.py -h says more")


if __name__ == "__main__":
    run(main)
