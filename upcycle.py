"""Makes new checkpoints out of old ones. stage0: RICE-ViT + a Qwen decoder + a fresh PatchMerger -> Innovator-VL.

    python upcycle.py stage0 --vit rice-vit-large-patch14-560 --llm Qwen3-8B-Base --out stage0

The vision tower comes in the names of Transformers' MLCDVisionModel (MLCD below is the whole mapping); its
post_layernorm is not used by Innovator-VL. The merger is N(0, 0.02) with zero biases, or comes from --adapter.

References: ds/merge_model.py of the released repository; Innovator-VL report arXiv:2601.19325.

Departures
1. A tied decoder is untied, its embedding copied into lm_head, as the released merge does.
2. The tokenizer is the decoder's own, unless --processor names another (the released merge always takes Qwen2.5-VL's).
"""
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from tqdm import tqdm

from common import UserError, command, parse, run
from data import Tokenizer
from model import PRESETS, Innovator, checkpoint_folder, config_of, init_weights, released_name, weight_files
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


def main() -> None:
    commands = {"stage0": (Stage0, stage0)}
    cls, fn = commands[command(commands, __doc__)]
    fn(parse(cls, sys.argv[2:], __doc__))


if __name__ == "__main__":
    run(main)
