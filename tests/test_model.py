"""Model, vision tower, loss and checkpoints against independent references."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, launch
from safetensors.torch import load_file, save_file

import model as model_file
import upcycle
from common import UserError
from kernels.attention import Branches, Documents, attend, choose
from model import (PRESETS, Innovator, ModelConfig, Pack, config_of, linear_cross_entropy, sample, token_logprobs)
from vision import VisionConfig

TEXT = ModelConfig(vocab_size=211, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=16, rope_theta=1e4, max_position_embeddings=256)
SMALL = replace(TEXT, vision=VisionConfig(depth=2, embed_dim=32, num_heads=2, intermediate_size=48))
SMALL.token_ids = SMALL.token_ids | {"image_token_id": 7}


def close(a, b, tolerance):
    error = (a - b).abs().max().item()
    assert error <= tolerance, f"max abs error {error} > {tolerance}"


def pack_of(model, docs, images=()):
    """docs: lists of ids; every token but a document's first is supervised."""
    lengths, ids = [len(d) for d in docs], torch.tensor([t for d in docs for t in d])
    starts = [sum(lengths[:i]) for i in range(len(docs))]
    rows = torch.cat([torch.arange(s, s + n - 1) for s, n in zip(starts, lengths)])
    documents = Documents.of(lengths, ids.device, "sdpa")
    pixels, grids = (torch.cat([p for p, _ in images]), [g for _, g in images]) if images else (None, [])
    return Pack(ids, documents, documents.positions(), rows, ids[rows + 1], torch.ones(len(rows)), pixels, grids)


# ---- the released model ---------------------------------------------------------------------------------------------
def test_reference_outputs():
    model, e = Innovator.from_pretrained(REFERENCE), load_file(REFERENCE / "expected.safetensors")
    grids = [tuple(g) for g in e["image_grid_thw"].tolist()]
    with torch.no_grad():
        close(model.visual(e["pixel_values"], grids), e["vision_out"], 2e-5)  # two images: class-token strip matters
        close(model.logits(e["input_ids"], e["pixel_values"], e["image_grid_thw"]), e["logits"][0], 2e-5)
        close(model.logits(e["text_ids"]), e["text_logits"][0], 2e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_reference_greedy_tokens(use_cache):
    model, e = Innovator.from_pretrained(REFERENCE), load_file(REFERENCE / "expected.safetensors")
    prompt = e["input_ids"][0].tolist()
    out = model.generate([prompt], e["pixel_values"], e["image_grid_thw"], max_new_tokens=16, use_cache=use_cache)
    assert out[0] == e["greedy"][0].tolist()
    # in a batch with shorter and longer text prompts the same tokens come out
    others = [[1, 2, 3], prompt, e["text_ids"][0].tolist()]
    out = model.generate(others, e["pixel_values"], e["image_grid_thw"], max_new_tokens=16, use_cache=use_cache)
    assert out[1] == e["greedy"][0].tolist()


def test_names_and_sizes_of_the_released_checkpoint():
    model = Innovator.on_meta(PRESETS["innovator-vl-8b"])
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert len(shapes) == 698 and sum(p.numel() for p in model.parameters()) == 8_527_214_624
    expected = {"model.embed_tokens.weight": (151936, 4096), "lm_head.weight": (151936, 4096),
                "model.norm.weight": (4096,), "visual.patch_embed.proj.weight": (1024, 3, 14, 14),
                "visual.class_embedding": (1024,), "visual.class_pos_emb": (1, 32),
                "visual.merger.mlp.0.weight": (4096, 4096), "visual.merger.mlp.0.bias": (4096,),
                "visual.merger.mlp.2.weight": (4096, 4096), "visual.merger.mlp.2.bias": (4096,)}
    for kind in ("weight", "bias"):
        expected |= {f"visual.pre_layernorm.{kind}": (1024,), f"visual.merger.ln_q.{kind}": (1024,)}
    for i in range(36):
        p = f"model.layers.{i}."
        expected |= {p + f"self_attn.{x}_proj.weight": s
                     for x, s in dict(q=(4096, 4096), k=(1024, 4096), v=(1024, 4096), o=(4096, 4096)).items()}
        expected |= {p + f"self_attn.{x}_norm.weight": (128,) for x in "qk"}
        expected |= {p + f"mlp.{x}_proj.weight": s
                     for x, s in dict(gate=(12288, 4096), up=(12288, 4096), down=(4096, 12288)).items()}
        expected |= {p + f"{x}_layernorm.weight": (4096,) for x in ("input", "post_attention")}
    for i in range(24):
        p = f"visual.blocks.{i}."
        for kind, one in (("weight", (1024,)), ("bias", ())):
            expected |= {p + f"norm{k}.{kind}": (1024,) for k in (1, 2)}
            expected |= {p + f"attn.qkv.{kind}": (3072, *one), p + f"attn.proj.{kind}": (1024, *one),
                         p + f"mlp.fc1.{kind}": (4096, *one), p + f"mlp.fc2.{kind}": (1024, 4096)[:1 + len(one)]}
    assert shapes == expected


# ---- Transformers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen2-tied", "Qwen3", "Qwen3-tied"])
def test_transformers_checkpoints_both_ways(tmp_path, kind):
    import transformers
    family, tied = kind.split("-")[0], "tied" in kind
    sizes = dict(vocab_size=199, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, rope_theta=1e5)
    if family == "Qwen3":
        sizes["head_dim"] = 20
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    for p in theirs.parameters():  # biases and norms are not left at their neutral start
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")  # several files and an index
    ours = Innovator.from_pretrained(tmp_path / "hf", torch.float32)
    ids = torch.randint(0, 199, (37,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        close(ours.logits(ids), expected, 2e-5)
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        assert type(back) is type(theirs)
        assert torch.equal(back(ids[None]).logits[0], expected)


def test_stage0_from_a_transformers_rice_vit(tmp_path, tokenizer):
    """RICE-ViT loads as MLCDVisionModel: our tower gives its features, in merge-window order, and the decoder is
    untouched."""
    import transformers
    torch.manual_seed(0)
    config = transformers.MLCDVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                           num_attention_heads=4, image_size=84, patch_size=14)
    vit = transformers.MLCDVisionModel(config).eval()
    for p in vit.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.1)
    vit.save_pretrained(tmp_path / "vit")
    llm = Innovator.from_config(replace(PRESETS["tiny"], vision=None, token_ids=tokenizer.token_ids()), seed=3)
    llm.assets = tokenizer.path.parent
    llm.save_pretrained(tmp_path / "llm")
    upcycle.stage0(upcycle.Stage0(llm=str(tmp_path / "llm"), vit=str(tmp_path / "vit"), out=str(tmp_path / "s0"),
                                  dtype="float32"))
    model = Innovator.from_pretrained(tmp_path / "s0")
    image = torch.randn(1, 3, 84, 84)
    patches = image.view(3, 3, 2, 14, 3, 2, 14).permute(1, 4, 2, 5, 0, 3, 6).reshape(36, 588)  # windows of 2 x 2
    with torch.no_grad():
        theirs = vit(image).last_hidden_state[0, 1:]  # before its post_layernorm, without the class token
        theirs = theirs.view(3, 2, 3, 2, 64).transpose(1, 2).reshape(36, 64)
        close(model.visual.features(patches, [(1, 6, 6)]), theirs, 2e-5)
    ids = torch.arange(30)
    assert torch.equal(model.logits(ids), llm.logits(ids))
    assert (tmp_path / "s0" / "preprocessor_config.json").exists() and (tmp_path / "s0" / "tokenizer.json").exists()
    with pytest.raises(UserError, match="already has a vision tower"):
        upcycle.stage0(upcycle.Stage0(llm=str(tmp_path / "s0"), vit=str(tmp_path / "vit"), out=str(tmp_path / "x")))


# ---- packing --------------------------------------------------------------------------------------------------------
def test_packed_equals_unpacked_with_images():
    """Log-probabilities and gradients of every document agree alone and in the pack."""
    model = Innovator.from_config(SMALL, seed=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.1)
    gen = torch.Generator().manual_seed(2)
    images = [(torch.randn(n * m, 588, generator=gen), (1, n, m)) for n, m in ((4, 6), (2, 2), (2, 8))]
    docs = [[3, *[7] * 6, 5, 9, 11], [4, 8, 15, 16, 23, 42], [2, *[7] * 1, 1, 0, *[7] * 4, 100], [77, 78]]
    theirs = [[images[0]], [], [images[1], images[2]], []]
    packed = model(pack_of(model, docs, images), entropy=False)[0]
    alone = torch.cat([model(pack_of(model, [d], im), entropy=False)[0] for d, im in zip(docs, theirs)])
    close(packed, alone, 1e-5)
    model.zero_grad()
    loss = model(pack_of(model, docs, images))[0]
    loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for d, im in zip(docs, theirs):
        model(pack_of(model, [d], im))[0].backward()
    for n, p in model.named_parameters():
        close(whole[n], p.grad, 1e-5 * max(1, p.grad.abs().max().item()))


def test_a_changed_token_changes_no_neighbour():
    model = Innovator.from_config(replace(SMALL, vision=None), seed=1)
    docs = [list(range(1, 14)), list(range(20, 52)), list(range(60, 64)), list(range(70, 90))]
    with torch.no_grad():
        before = model.hidden(pack_of(model, docs))[0].split([len(d) for d in docs])
        docs[1][0] = 150
        after = model.hidden(pack_of(model, docs))[0].split([len(d) for d in docs])
    for k, (a, b) in enumerate(zip(before, after)):
        assert torch.equal(a, b) == (k != 1)


def test_image_counts_are_checked():
    model = Innovator.from_config(SMALL)
    with pytest.raises(AssertionError, match="3 image tokens in the text, 1 image rows"):
        model.logits([1, 7, 7, 7], torch.zeros(4, 588), [(1, 2, 2)])
    with pytest.raises(AssertionError, match="0 image tokens in the text, 1 image rows"):
        model.logits([1, 2], torch.zeros(4, 588), [(1, 2, 2)])
    with pytest.raises(AssertionError, match="5 rows of pixels"):
        model.logits([1, 7], torch.zeros(5, 588), [(1, 2, 2)])


@pytest.mark.parametrize("causal", [True, False])
def test_attention_twin_against_the_formula(causal):
    lengths, H, K, d = [5, 1, 17, 16, 2, 33], 4, 2, 8
    T = sum(lengths)
    q, k, v = (torch.randn(T, n, d, dtype=torch.float64, requires_grad=True) for n in (H, K, K))
    out = attend(q, k, v, Documents.of(lengths, q.device, "sdpa"), causal, "sdpa")
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = doc[:, None] == doc
    if causal:
        allowed &= torch.arange(T)[:, None] >= torch.arange(T)
    kk, vv = (x.repeat_interleave(H // K, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, kk) * d ** -0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), vv)
    close(out, expected, 1e-12)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g)):
        close(a, b, 1e-12)


# ---- loss -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def head(monkeypatch):
    import model
    monkeypatch.setattr(model, "_chunks", lambda S, V: [slice(i, min(i + 7, S)) for i in range(0, S, 7)])  # chunks of 7
    torch.manual_seed(0)
    h, w = torch.randn(23, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    return h, w, torch.randint(0, 101, (23,))


@pytest.mark.parametrize("impl", ["sdpa", "varlen", "flash-attn"])
def test_branches_attend_as_whole_documents(impl):
    device = torch.device("cpu" if impl == "sdpa" else "cuda")
    dtype = torch.float32 if impl == "sdpa" else torch.bfloat16
    try:
        choose(impl, device, dtype)
    except (AssertionError, RuntimeError) as e:
        pytest.skip(str(e))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    contexts, branches = [5, 1, 130], [(0, 3), (2, 1), (0, 1), (2, 70)]
    docs = Branches.of(contexts, branches, device, impl)
    T = sum(contexts) + sum(n for _, n in branches)
    q, k, v = (torch.randn(T, heads, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
    out, at = attend(q, k, v, docs, True, impl), sum(contexts)
    for context, n in [*((c, 0) for c in range(3)), *branches]:
        start = sum(contexts[:context])
        rows = [*range(start, start + contexts[context]), *range(at, at + n)]
        assert docs.positions()[rows].tolist() == [*range(len(rows))]
        whole = attend(*(x[rows].float() for x in (q, k, v)), Documents.of([len(rows)], device, "sdpa"), True, "sdpa")
        torch.testing.assert_close(out[rows].float(), whole, atol=1e-5 if impl == "sdpa" else 2e-2, rtol=0)
        at += n


def test_linear_cross_entropy(head):
    h, w, t = head
    weights = torch.rand(23)
    loss, plain = linear_cross_entropy(h, w, t, weights)
    logp = F.log_softmax(h @ w.T, -1).gather(1, t[:, None])[:, 0]
    close(loss, -(weights * logp).sum(), 1e-4)
    close(plain, -logp.sum(), 1e-4)
    for a, b in zip(torch.autograd.grad(3 * loss, (h, w)), torch.autograd.grad(-3 * (weights * logp).sum(), (h, w))):
        close(a, b, 1e-5)
    empty, _ = linear_cross_entropy(h[:0], w, t[:0])
    assert empty.item() == 0 and torch.autograd.grad(empty, w)[0].abs().max() == 0


def test_token_logprobs_and_entropy(head):
    h, w, t = head
    logp, entropy = token_logprobs(h, w, t, entropy=True)
    full = F.log_softmax(h @ w.T, -1)
    expected_logp, expected_entropy = full.gather(1, t[:, None])[:, 0], -(full.exp() * full).sum(-1)
    close(logp, expected_logp, 1e-5)
    close(entropy, expected_entropy, 1e-5)
    a, b = torch.randn(23), torch.randn(23)
    got = torch.autograd.grad((a * logp.exp() + b * entropy).sum(), (h, w))
    want = torch.autograd.grad((a * expected_logp.exp() + b * expected_entropy).sum(), (h, w))
    for x, y in zip(got, want):
        close(x, y, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_one_pass_over_the_logits_equals_the_operations_one_by_one(dtype, tolerance):
    """What GPUs run is compiled; a loss that does not use the entropy has the gradient of the log-probabilities."""
    torch.manual_seed(0)
    for S in (23, 57):
        z, t = (torch.randn(S, 1031) * 3).to(dtype), torch.randint(0, 1031, (S,))
        g, g_ent = torch.randn(S), torch.randn(S)
        plain = model_file._logp(z, t, True)
        for a, b in zip(plain, model_file._fused(model_file._logp)(z, t, True)):
            close(a, b, tolerance)
        for more in ((plain[2], g_ent), (None, None)):
            one_by_one = model_file._d_logits(z, plain[0], t, g, *more)
            fused = model_file._fused(model_file._d_logits)(z, plain[0], t, g, *more)
            close(one_by_one.float(), fused.float(), tolerance)


# ---- sampling -------------------------------------------------------------------------------------------------------
def test_sampling_cuts_and_temperature():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    g = torch.Generator().manual_seed(0)
    share = lambda **k: torch.bincount(sample(logits, **{"temperature": 1, "top_p": 1.0, "top_k": 0} | k, generator=g),
                                       minlength=4) / 4000
    close(share(), torch.tensor([0.5, 0.3, 0.15, 0.05]), 0.03)
    close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), 0.03)
    close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), 0.03)
    close(share(top_p=0.4), torch.tensor([1.0, 0, 0, 0]), 0)
    assert share(temperature=0)[0] == 1
    cold = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    close(share(temperature=0.5), cold / cold.sum(), 0.03)


def test_generate_stops_and_streams():
    model = Innovator.from_config(TEXT, seed=5)
    free = model.generate([[1, 2, 3], [4]], max_new_tokens=8)
    stop = free[0][3]
    seen = []
    out = model.generate([[1, 2, 3], [4]], max_new_tokens=8, stop_ids=(stop,),
                         on_token=lambda b, t: seen.append((b, t)))
    assert out[0] == free[0][:free[0].index(stop) + 1]
    assert [t for b, t in seen if b == 0] == out[0] and [t for b, t in seen if b == 1] == out[1]
    a, b = (model.generate([[1, 2, 3]], max_new_tokens=8, temperature=1.0, seed=s)[0] for s in (0, 0))
    assert a == b
    with pytest.raises(AssertionError, match="context is 256"):
        model.generate([[1] * 250], max_new_tokens=7)


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def test_wrong_checkpoints_name_their_tensors(tmp_path):
    model = Innovator.from_config(SMALL)
    model.save_pretrained(tmp_path / "ok")
    tensors = load_file(tmp_path / "ok" / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(5)
    del tensors["visual.class_embedding"]
    save_file(tensors, tmp_path / "ok" / "model.safetensors")
    with pytest.raises(UserError) as e:
        Innovator.from_pretrained(tmp_path / "ok")
    for part in ("3 tensors", "missing: visual.class_embedding", "extra: model.extra.weight",
                 "shape: model.norm.weight is [5], the model needs [48]"):
        assert part in str(e.value)
    (tmp_path / "ok" / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Innovator.from_pretrained(tmp_path / "ok")
    with pytest.raises(UserError, match="config.json: not found"):
        Innovator.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AssertionError, match="preset 'innovator-vl-9b': choose one of"):
        config_of("preset:innovator-vl-9b")


def test_config_round_trip():
    for name, config in PRESETS.items():
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf(torch.bfloat16)))) == config, name


def test_save_in_several_files(tmp_path, monkeypatch):
    import model as m
    monkeypatch.setattr(m, "SHARD_BYTES", 20_000)
    model = Innovator.from_config(SMALL, seed=4)
    model.save_pretrained(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    again = Innovator.from_pretrained(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_loading_keeps_no_second_copy(tmp_path):
    """Peak memory of loading stays under what is kept + 1.15 x the largest file."""
    config = replace(TEXT, vocab_size=60_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    import model as m
    old, m.SHARD_BYTES = m.SHARD_BYTES, 64 * 2 ** 20
    Innovator.from_config(config).save_pretrained(tmp_path / "big")
    m.SHARD_BYTES = old
    files = [f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors")]
    code = f"""
import resource, sys, torch
sys.path.insert(0, '.')
from model import Innovator
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
m = Innovator.from_pretrained({str(tmp_path / 'big')!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base, sum(p.nbytes for p in m.parameters()))
"""
    grown, kept = map(int, launch("-c", code).stdout.split())
    assert grown <= kept + 1.15 * max(files), (
        f"grew by {grown / 2**20:.0f} MiB, keeps {kept / 2**20:.0f}, files {max(files) / 2**20:.0f}")
