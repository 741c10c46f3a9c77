"""The mixture of experts against its loop, its formulas and Transformers."""
import contextlib
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import launch
from test_model import close, pack_of
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moe
import train_sft
from model import PRESETS, Innovator, ModelConfig, file_shape, pieces, upcycled

DENSE = ModelConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, rope_theta=1e4, max_position_embeddings=128, qkv_bias=True,
                    qk_norm=False)
SMALL = upcycled(DENSE, ["a", "b"], 4, 2)  # 8 experts of 16, top 2


def lively(config, seed=1) -> Innovator:
    """Weights far from their neutral start, so that routing is decided and every gradient is felt."""
    model, generator = Innovator.from_config(config, seed=seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.2, generator=generator)
    return model


def labelled_pack(model, lengths=(9, 1, 14, 5)):
    generator = torch.Generator().manual_seed(3)
    pack = pack_of(model, [torch.randint(0, 128, (n,), generator=generator).tolist() for n in lengths])
    pack.labels = torch.arange(sum(lengths)) % 4  # both disciplines, others, padding
    return pack


# ---- experts --------------------------------------------------------------------------------------------------------
def bias(kind, E): return {"skewed": torch.linspace(6, -6, E), "empty": 50.0 * (torch.arange(E) % 2)}.get(kind, 0)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind, T, E, k", [("balanced", 40, 8, 2), ("skewed", 40, 8, 3), ("empty", 40, 8, 3),
                                           ("random", 1, 8, 2), ("random", 21, 4, 4), ("random", 21, 1, 1)])
def test_grouped_experts_equal_the_loop(kind, T, E, k, normalise):
    torch.manual_seed(0)
    logits = torch.randn(T, E) + bias(kind, E)
    if kind == "balanced":
        logits = 5 * F.one_hot(torch.arange(T) % E, E).float() + 4 * F.one_hot((torch.arange(T) + 1) % E, E)
    leaves = [torch.randn(T, 32), torch.randn(E, 48, 32) / 5, torch.randn(E, 32, 24) / 5, logits]
    leaves, g, found = [v.requires_grad_() for v in leaves], torch.randn(T, 32), []
    for experts in (moe.loop_experts, moe._GroupedExperts.apply, moe._GroupedExperts.apply):
        chosen = moe.choose_experts(leaves[3], k, normalise)[:2]
        out = experts(*leaves[:3], *chosen)
        found.append([out, *torch.autograd.grad(out, leaves, g)])
    loads = chosen[1].flatten().bincount(minlength=E)
    assert {"balanced": loads.unique().numel() == 1, "skewed": loads[0] >= T - 2,
            "empty": (loads == 0).sum() >= 4}.get(kind, True), loads
    for a, b, again in zip(*found):
        close(a, b, 1e-5)
        assert torch.equal(b, again)  # sums in a fixed order


@pytest.mark.parametrize("normalise", [True, False])
def test_choice_is_softmax_over_all_then_top_k(normalise):
    torch.manual_seed(0)
    logits, g = (3 * torch.randn(50, 16)).requires_grad_(), torch.randn(50, 4)
    weights, experts, _ = moe.choose_experts(logits, 4, normalise)
    p, best = logits.softmax(-1).topk(4)
    p = p / p.sum(-1, keepdim=True) if normalise else p
    assert torch.equal(experts, best)
    close(weights, p, 1e-6)
    close(*(torch.autograd.grad(w, logits, g)[0] for w in (weights, p)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_keep_inputs_and_one_product_for_the_backward_pass(dtype):
    T, D, E, k, n = 64, 32, 8, 3, 24
    layer, kept = moe.Experts(E, D, n).to(dtype), {}
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weights, experts, _ = moe.choose_experts(torch.randn(T, E, requires_grad=True), k, True)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x, weights, experts)
    N, size = T * k, x.element_size()
    assert out.requires_grad and own <= kept.keys()
    assert sum(b for p, b in kept.items() if p not in own) <= (T * D + N * 2 * n) * size + N * (8 + 4) + 4 * E


DISPATCH = """
import torch, torch.distributed as dist, common, moe

def main():
    dist.init_process_group("gloo")
    r = dist.get_rank()
    for bias in ([0, 0, 0, 0], [50, 50, 0, 0], [0, 0, 0, 50]):  # anywhere; rank 1 gets nothing; both, mostly rank 1
        torch.manual_seed(0)
        x, logits, g = torch.randn(2, 12, 16), torch.randn(2, 12, 4) + torch.tensor(bias), torch.randn(2, 12, 16)
        leaves = [v.requires_grad_() for v in (x, logits, torch.randn(4, 32, 16) / 4, torch.randn(4, 16, 16) / 4)]
        chosen = moe.choose_experts(logits.flatten(0, 1), 2, True)[:2]
        want = moe.loop_experts(x.flatten(0, 1), *leaves[2:], *chosen).view(2, 12, 16)
        grads = [v[r] if k < 2 else v[2 * r:2 * r + 2] for k, v in enumerate(torch.autograd.grad(want, leaves, g))]
        mine = moe.Experts(2, 16, 16)
        mine.gate_up_proj.data, mine.down_proj.data = (v[2 * r:2 * r + 2].detach() for v in leaves[2:])
        mine.group = dist.group.WORLD
        got = mine(x[r], *moe.choose_experts(logits[r], 2, True)[:2])
        again = torch.autograd.grad(got, [x, logits, mine.gate_up_proj, mine.down_proj], g[r])
        for a, b in zip([want[r], *grads], [got, again[0][r], again[1][r], *again[2:]]):
            assert (a - b).abs().max() <= 1e-5, (bias, (a - b).abs().max())

common.run(main)
"""


def test_experts_on_two_ranks_equal_the_loop(tmp_path):
    (tmp_path / "script.py").write_text(DISPATCH)
    launch(tmp_path / "script.py", nproc=2)


# ---- losses and load ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_routing_losses_by_hand(kind):
    S, E, k, labels = 2, 4, 2, [0, 1, 1, 2, 3, 0, 3]  # 2: another discipline, 3: padding
    torch.manual_seed(0)
    logits = 2 * torch.randn(len(labels), E)
    top = logits.topk(k).indices
    losses, counts = moe.routing_losses(logits, top, torch.tensor(labels), S, kind)
    R, L, f, p, z, label = 5, 4, [0] * E, [0] * E, 0, 0
    table = [[0] * E for _ in range(S + 1)]
    for t, own in enumerate(labels):
        if own == 3:
            continue
        soft = (logits[t].exp() / logits[t].exp().sum()).tolist()
        for e in range(E):
            p[e] += soft[e] / R
        for e in top[t].tolist():
            f[e] += 1 / (R * k)
            table[own][e] += 1
        z += logits[t].exp().sum().log().item() ** 2 / R
        if own < 2:
            mine = [2 * own, 2 * own + 1]
            s = logits[t].sigmoid()
            bce = sum(-(s[e] if e in mine else 1 - s[e]).log().item() for e in range(E)) / E
            ce = sum(-torch.tensor(soft[e]).log().item() / 2 for e in mine)
            label += (bce if kind == "bce" else ce) / L
    close(losses, torch.tensor([E * sum(a * b for a, b in zip(f, p)), z, label]), 1e-5)
    assert counts.tolist() == table
    padded = torch.tensor([3, 3])  # nothing but padding: no losses, no counts, and finite
    empty, none = moe.routing_losses(logits[:2], top[:2], padded, S, kind)
    assert empty.tolist() == [0, 0, 0] and not none.any()


def test_balance_is_one_when_uniform_and_load_statistics():
    top = (torch.arange(24)[:, None] + torch.arange(3)) % 8
    losses, counts = moe.routing_losses(torch.zeros(24, 8), top, torch.zeros(24, dtype=torch.long), 2, "bce")
    close(losses, torch.tensor([1.0, torch.tensor(8.0).log() ** 2, torch.tensor(2.0).log()]), 1e-6)
    even = moe.load_statistics(counts[None], ["a", "b"])
    assert even["load_max"] == 1 and even["load_entropy"] == pytest.approx(1) and even["share"] == {"a": [0.5, 0.5]}
    uneven = torch.tensor([[6, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4]])  # a, b, other: loads 6 0 2 4
    found = moe.load_statistics(torch.stack([uneven, 3 * uneven * 0 + 1]), ["a", "b"])
    assert found["load_max"] == 2
    entropy = -sum(p * torch.tensor(p).log().item() for p in (1 / 2, 1 / 6, 1 / 3)) / torch.tensor(4.0).log().item()
    assert found["load_entropy"] == pytest.approx((entropy + 1) / 2)
    assert found["share"] == {"a": [round(8 / 12, 4), round(4 / 12, 4)], "b": [0.5, 0.5], "other": [0.25, 0.75]}
    none = moe.routing_losses(torch.zeros(2, 8), top[:2], torch.zeros(2, dtype=torch.long), 0, "bce")
    assert none[1].shape == (1, 8) and none[0][2] == 0  # no disciplines: all tokens are others


# ---- training: recomputation and compilation ------------------------------------------------------------------------
def loss_and_gradients(model, pack):
    loss, _, routing = model(pack)
    whole = loss + (routing[0].sum(0) @ torch.tensor([0.5, 0.1, 0.7]))
    grads = torch.autograd.grad(whole, list(model.parameters()))
    return [whole.detach(), routing[0].detach(), routing[1].float(), *grads]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_changes_nothing(recompute):
    found = []
    for mode in ("none", recompute):
        model = lively(replace(SMALL, shared_expert_gate=True))
        train_sft.prepare_blocks(model, mode, False)
        found.append(loss_and_gradients(model, labelled_pack(model)))
    for a, b in zip(*found):
        assert a.abs().max() > 0
        close(a, b, 1e-5 * max(1, a.abs().max().item()))


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compilation_changes_nothing(recompute):
    """Documents of one length, so that attention's CPU path is one graph; bf16, in which training is compiled."""
    found = []
    torch._dynamo.reset()
    counters.clear()
    for fast in (False, True):
        model = lively(SMALL).bfloat16()
        train_sft.prepare_blocks(model, recompute, fast)
        found.append(loss_and_gradients(model, labelled_pack(model, (10, 10, 10))))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    for a, b in zip(*found):
        assert a.abs().max() > 0
        close(a.float(), b.float(), 0.06 * a.abs().max().item())


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_routers_alone_learn_from_their_own_layer(recompute):
    """Stage route: no gradient reaches a router through the text's loss or a later layer, and its own one is the same.
    """
    found = []
    for alone in (False, True):
        model = lively(SMALL)
        for name, p in model.named_parameters():
            p.requires_grad_(not alone or ".mlp.gate." in name)
        for block in model.model.layers:
            block.mlp.router_only = alone
        train_sft.prepare_blocks(model, recompute, False)
        gates = [block.mlp.gate.weight for block in model.model.layers]
        for layer in range(2):
            loss, _, (losses, *_) = model(labelled_pack(model))
            found.append(torch.autograd.grad(losses[layer].sum(), gates, materialize_grads=True))
            assert loss.requires_grad != alone
    whole0, whole1, own0, own1 = found
    close(own0[0], whole0[0], 1e-6)
    close(own1[1], whole1[1], 1e-6)
    assert whole1[0].abs().max() > 1e-4 and own0[0].any() and own1[1].any() and not own1[0].any() and not own0[1].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_compiled_layer_equals_the_layer(dtype, tolerance):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = lively(SMALL).model.layers[0].mlp.to(dtype), torch.randn(30, 32, dtype=dtype, requires_grad=True)
    labels, found = torch.arange(30) % 4, []
    for run in (layer, torch.compile(layer)):
        y, (losses, counts, _) = run(x, labels)
        found.append([y, losses, counts, *torch.autograd.grad(y.float().square().sum() + losses.sum(),
                                                              [x, *layer.parameters()])])
    for a, b in zip(*found):
        close(a.float(), b.float(), tolerance * max(1, a.abs().max().item()))


class Count(TorchDispatchMode):
    """Counts the operations that really run; those a checkpoint answers from memory do not come here."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran = getattr(self, "ran", []) + [func]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute, compiled", [("plain", False), ("selective", False), ("full", False),
                                                 ("selective", True), ("full", True)])
def test_recomputation_never_chooses_again(recompute, compiled, monkeypatch):
    """The router turns round between forward and backward: the experts chosen before get the gradients. ('plain',
    a checkpoint without our choices, shows that the test can fail.) Compiled: with inductor's partition, not its code.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = lively(replace(SMALL, num_experts=16, moe_intermediate_size=8)).to(torch.bfloat16 if compiled else None)
    if recompute == "plain":
        for block in model.model.layers:
            block.run = lambda *a, run=block.run: checkpoint(run, *a, use_reentrant=False)
    else:
        train_sft.prepare_blocks(model, recompute, compiled)
    pack = labelled_pack(model, (4,))
    pack.labels[:] = 2  # all tokens count, and all are supervised
    pack.rows, pack.targets, pack.weights = torch.arange(4), torch.arange(4), torch.ones(4)
    loss, _, (_, counts, *_) = model(pack)
    for block in model.model.layers:
        block.mlp.gate.weight.data.neg_()
    with contextlib.nullcontext() if compiled else Count() as count:
        loss.backward()
    used = torch.stack([b.mlp.experts.down_proj.grad.flatten(1).any(1) for b in model.model.layers])
    chosen = counts.sum(1) > 0
    assert not chosen.all()
    assert torch.equal(used, chosen) == (recompute != "plain")
    if not compiled:
        topk, products = (sum(op is o for op in count.ran) for o in (torch.ops.aten.topk.default,
                                                                     torch.ops.aten._grouped_mm.default))
        assert topk == (2 if recompute == "plain" else 0)
        assert products == 2 * {"plain": 6, "full": 6, "selective": 5}[recompute]  # a layer: 4 backward, 2 or 1 again


# ---- Transformers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, normalise", [("Qwen2", False), ("Qwen2", True), ("Qwen3", True), ("Qwen3", False)])
def test_transformers_checkpoints_both_ways(tmp_path, kind, normalise):
    import transformers
    sizes = dict(vocab_size=131, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, num_experts=6,
                 num_experts_per_tok=3, norm_topk_prob=normalise, rope_theta=1e5, attn_implementation="eager")
    sizes |= dict(shared_expert_intermediate_size=40) if kind == "Qwen2" else dict(head_dim=20)
    torch.manual_seed(0)
    cls = getattr(transformers, f"{kind}MoeForCausalLM")
    theirs = cls(getattr(transformers, f"{kind}MoeConfig")(**sizes)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    ours, ids = Innovator.from_pretrained(tmp_path / "hf", torch.float32), torch.randint(0, 131, (37,))
    assert ours.config.norm_topk_prob == normalise and ours.config.shared_expert_gate == (kind == "Qwen2")
    assert kind == "Qwen3" or all(b.mlp.shared_expert_gate.weight.any() for b in ours.model.layers)
    with torch.no_grad():
        close(ours.logits(ids), theirs(ids[None]).logits[0], 2e-5)
        mine = lively(ours.config, seed=5)
        mine.save_pretrained(tmp_path / "ours")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32,
                                                                 attn_implementation="eager")
        assert type(back) is cls
        close(back(ids[None]).logits[0], mine.logits(ids), 2e-5)


# ---- presets --------------------------------------------------------------------------------------------------------
def checkpoint_shapes(config):
    named = Innovator.on_meta(config).named_parameters()
    return {name: file_shape(name, region) for full, p in named for name, region in pieces(full, p.shape)}


def test_names_and_sizes_of_innovator_53b_a13b():
    shapes, D, n, W = checkpoint_shapes(PRESETS["innovator-53b-a13b"]), 3584, 2368, 18944
    expected = {"model.embed_tokens.weight": (152064, D), "lm_head.weight": (152064, D), "model.norm.weight": (D,)}
    for i in range(28):
        p = f"model.layers.{i}."
        expected |= {f"{p}self_attn.{x}_proj.{kind}": (rows, D)[:1 + (kind == "weight")]
                     for x, rows in dict(q=D, k=512, v=512).items() for kind in ("weight", "bias")}
        expected |= {f"{p}self_attn.o_proj.weight": (D, D), f"{p}mlp.gate.weight": (64, D),
                     f"{p}input_layernorm.weight": (D,), f"{p}post_attention_layernorm.weight": (D,)}
        for where, rows in (("shared_expert", W), *((f"experts.{e}", n) for e in range(64))):
            expected |= {f"{p}mlp.{where}.gate_proj.weight": (rows, D), f"{p}mlp.{where}.up_proj.weight": (rows, D),
                         f"{p}mlp.{where}.down_proj.weight": (D, rows)}
    assert shapes == expected
    assert sum(".experts." in name for name in shapes) == 28 * 64 * 3
    total = 2 * 152064 * D + D + 28 * (2 * D * D + D + 2 * (512 * D + 512) + 2 * D + 64 * D + 3 * D * (W + 64 * n))
    active = total - 28 * 3 * D * 56 * n
    assert sum(torch.Size(s).numel() for s in shapes.values()) == total == 53_247_677_952
    assert active == 13_325_243_904


def test_names_and_sizes_of_the_other_presets():
    shapes = checkpoint_shapes(PRESETS["innovator-vl-30b-a3b"])
    experts = {f"model.layers.{i}.mlp.experts.{e}.{x}_proj.weight": (2048, 768) if x == "down" else (768, 2048)
               for i in range(48) for e in range(128) for x in ("gate", "up", "down")}
    assert {k: v for k, v in shapes.items() if ".experts." in k} == experts
    assert shapes["model.layers.0.mlp.gate.weight"] == (128, 2048) and not any("shared_expert" in k for k in shapes)
    for name, vocab, width in (("tiny-moe", 1024, 48), ("mini-moe", 151936, 192)):
        shapes = checkpoint_shapes(PRESETS[name])
        last = "model.layers.3.mlp.experts.{}.up_proj.weight".format
        assert shapes["lm_head.weight"][0] == vocab and shapes[last(63)][0] == width and last(64) not in shapes
        assert "model.layers.3.self_attn.q_proj.bias" in shapes


@pytest.mark.parametrize("fields, text", [
    (dict(num_experts_per_tok=9), r"top-k 9 must lie in 1\.\.8, the number of experts"),
    (dict(num_experts_per_tok=0), r"top-k 0 must lie in 1\.\.8"),
    (dict(moe_intermediate_size=0), "experts need a moe_intermediate_size above 0"),
    (dict(expert_groups=["a", "b", "c"]), "8 experts do not divide over 3 disciplines")])
def test_wrong_sizes_name_both_numbers(fields, text):
    with pytest.raises(AssertionError, match=text):
        replace(SMALL, **fields)
    with pytest.raises(AssertionError, match="an MLP of 64 does not divide into 7 slices"):
        upcycled(DENSE, ["a"], 7, 2)


# ---- generation -----------------------------------------------------------------------------------------------------
def test_cached_generation_equals_uncached():
    model, prompts = lively(SMALL, seed=2), [[5, 6, 7, 8, 9], [100], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]]
    torch.manual_seed(0)
    torch.nn.init.orthogonal_(model.model.embed_tokens.weight, 8)  # or greedy decoding repeats itself
    torch.nn.init.orthogonal_(model.lm_head.weight)
    batch = model.generate(prompts, max_new_tokens=12)
    assert len({t for new in batch for t in new}) > 6
    assert model.generate(prompts, max_new_tokens=12, use_cache=False) == batch
    for prompt, new in zip(prompts, batch):  # the result does not depend on the neighbours
        assert [new] == model.generate([prompt], max_new_tokens=12) == \
            model.generate([prompt], max_new_tokens=12, use_cache=False)
