"""train_rl.py: its objectives against sums written out by hand, generation and routing replay against full forward
passes, and whole runs with the engine in plain torch."""
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch
from test_model import close, pack_of
from test_moe import SMALL, labelled_pack, lively
from test_train import assert_same_state
from test_upcycle import here

import common
import engine as engines
import moe
import rewards
import train_rl
import train_sft
from data import Doc, Tokenizer, collate, to_device
from model import PRESETS, Innovator, KVCache
from vision import VisionConfig

LENGTHS = [3, 1, 2]  # a response each; advantages, ratios in and out of the clip on both sides
ADVANTAGE = [1.0, -0.5, -2.0]
LOG_RATIO = [[0.4, -0.3, 0.05], [0.5], [-0.6, 0.02]]


def by_hand(kind, reduce, low, high, longest):
    """Loss and its gradient in every log p, one response after the other."""
    loss, gradient = 0.0, []
    for n, A, logs in zip(LENGTHS, ADVANTAGE, LOG_RATIO):
        weight = {"sequence": 1 / n / 3, "token": 1 / 6, "constant": 1 / (3 * longest)}[reduce]
        s = math.exp(sum(logs) / n)
        own = []
        for x in logs:
            r = math.exp(x) if kind in ("token", "cispo") else s
            if kind == "cispo":
                r = min(r, 1 + high)
                loss -= weight * r * A * (x - 1)  # old log p is -1
                own.append(-weight * r * A)
                continue
            cut = min(max(r, 1 - low), 1 + high)
            loss -= weight * min(r * A, cut * A)
            own.append(0.0 if cut * A < r * A else -weight * r * A)
        if kind == "gspo":  # every token of a response moves s by s / n
            own = [sum(own) / n] * n
        gradient += own
    return loss, gradient


@pytest.mark.parametrize("kind", ["token", "gspo", "gspo-token", "cispo"])
@pytest.mark.parametrize("reduce", ["sequence", "token", "constant"])
@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.01, 0.02), (5.0, 5.0)])
def test_losses_and_gradients_by_hand(kind, reduce, low, high):
    n = torch.tensor(LENGTHS)
    sequence = torch.arange(3).repeat_interleave(n)
    old = torch.full((6,), -1.0, dtype=torch.float64)
    logp = (old + torch.tensor(sum(LOG_RATIO, []), dtype=torch.float64)).requires_grad_()
    advantage = torch.tensor(ADVANTAGE, dtype=torch.float64)[sequence]
    loss_N, clipped = train_rl.policy_loss(kind, logp, old, advantage, sequence, n.double(), low, high)
    loss = train_rl.weigh(loss_N, sequence, n.double(), reduce).sum() / train_rl.denominator(reduce, 3, 6, 10)
    want, gradient = by_hand(kind, reduce, low, high, 10)
    loss.backward()
    close(loss.detach(), torch.tensor(want, dtype=torch.float64), 1e-12)
    close(logp.grad, torch.tensor(gradient, dtype=torch.float64), 1e-12)
    if kind != "cispo":
        assert clipped.tolist() == [g == 0 for g in gradient]


def test_advantages_punishment_and_corrections():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    close(train_rl.advantages(r, False), torch.tensor([[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]), 1e-7)
    close(train_rl.advantages(r, True)[0], torch.tensor([1, -1, -1, 1]) * 0.5 / (1 / 3) ** 0.5, 1e-4)
    assert [train_rl.overlong_punishment(n, 100, 20) for n in (10, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert train_rl.overlong_punishment(100, 100, 0) == 0
    old, engine = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5])
    ratio = (old - engine).exp()
    assert train_rl.correction_weight(old, engine, "none", 2.0).tolist() == [1, 1, 1]
    close(train_rl.correction_weight(old, engine, "truncate", 2.0), ratio.clamp(max=2.0), 1e-7)
    close(train_rl.correction_weight(old, engine, "mask", 2.0), torch.tensor([1, 0, ratio[2]]), 1e-7)


def test_corrections_of_whole_responses_by_hand():
    """Three responses of 2, 1 and 3 tokens whose log ratios sum to 0.5, 1.5 and -0.75."""
    lengths, sequence = torch.tensor([2.0, 1, 3]), torch.tensor([0, 0, 1, 2, 2, 2])
    old = torch.tensor([-1.0, -2, -0.5, -1, -1, -1])
    engine = old - torch.tensor([1.5, -1, 1.5, -0.25, 0.5, -1])
    def weight(kind, cap): return train_rl.correction_weight(old, engine, kind, cap, sequence, lengths)
    by_response = [math.exp(0.5)] * 2 + [math.exp(1.5)] + [math.exp(-0.75)] * 3
    close(weight("sequence-truncate", 2.0), torch.tensor([min(w, 2.0) for w in by_response]), 1e-6)
    close(weight("sequence-mask", 2.0), torch.tensor([w if w <= 2 else 0.0 for w in by_response]), 1e-6)
    close(weight("sequence-mask", 5.0), torch.tensor(by_response), 1e-5)
    far = train_rl.correction_weight(old + 500, engine, "sequence-truncate", 2.0, sequence, lengths)
    assert far.tolist() == [2.0] * 6  # exp would overflow
    assert not train_rl.correction_weight(old + 500, engine, "sequence-mask", 2.0, sequence, lengths).any()


# ---- generation -----------------------------------------------------------------------------------------------------
EYES = replace(SMALL, vision=VisionConfig(depth=2, embed_dim=32, num_heads=2, intermediate_size=48),
               token_ids=SMALL.token_ids | {"image_token_id": 7})
PROMPTS = [[5, 7, 7, 6], [100], [9, 7, 7, 3, 7, 7, 7, 7, 2], [3, 1, 4, 1, 5]]  # 7: pictures, mixed with plain text
IMAGES = [(1, 2, 4), (1, 2, 4), (1, 4, 4)]
OF_PROMPT = [[0], [], [1, 2], []]


def eyes():
    model = lively(EYES, seed=2)
    torch.manual_seed(0)
    torch.nn.init.orthogonal_(model.model.embed_tokens.weight, 8)  # or greedy decoding repeats itself
    torch.nn.init.orthogonal_(model.lm_head.weight)
    return model, [torch.randn(math.prod(g), 588) for g in IMAGES]


def generate(model, patches, prompts, which, **how):
    """which: the pictures of every prompt."""
    some = [i for own in which for i in own]
    return model.generate(prompts, torch.cat([patches[i] for i in some]), [IMAGES[i] for i in some],
                          max_new_tokens=9, **how)


def test_n_continuations_are_those_of_the_prompt_n_times():
    model, patches = eyes()
    thrice, which = [p for p in PROMPTS for _ in range(3)], [w for w in OF_PROMPT for _ in range(3)]
    once = generate(model, patches, PROMPTS, OF_PROMPT)
    assert len({t for new in once for t in new}) > 6
    assert generate(model, patches, PROMPTS, OF_PROMPT, n=3) == [new for new in once for _ in range(3)]
    how = dict(temperature=1.5, seed=11, logprobs=True, stop_ids=range(0, 128, 7))  # the same dice
    a, b = generate(model, patches, PROMPTS, OF_PROMPT, n=3, **how), generate(model, patches, thrice, which, **how)
    assert a[0] == b[0] and len({tuple(new) for new in a[0]}) > 6 and len({len(new) for new in a[0]}) > 3
    close(torch.tensor(sum(a[1], [])), torch.tensor(sum(b[1], [])), 1e-4)


def test_as_many_continuations_left_as_prompts_are_still_their_own(monkeypatch):
    """Those that ended leave the batch; once the batch had as many rows as there are prompts, it was spread again."""
    (model, patches), left, keep = eyes(), [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda self, rows: left.append(len(rows)) or keep(self, rows))
    thrice, which = [p for p in PROMPTS for _ in range(3)], [w for w in OF_PROMPT for _ in range(3)]
    for seed in range(30):
        how = dict(temperature=1.5, seed=seed, logprobs=True, stop_ids=range(0, 128, 4))
        a, b = generate(model, patches, PROMPTS, OF_PROMPT, n=3, **how), generate(model, patches, thrice, which, **how)
        assert a[0] == b[0]
        close(torch.tensor(sum(a[1], [])), torch.tensor(sum(b[1], [])), 1e-4)
    assert len(PROMPTS) in left


def test_generated_probabilities_and_experts_are_those_of_a_full_forward():
    model, patches = eyes()
    new, logps, experts = generate(model, patches, PROMPTS, OF_PROMPT, n=3, temperature=1.5, seed=11, logprobs=True,
                                   experts=True, stop_ids=range(0, 128, 7))
    assert 1 in map(len, new) and 9 in map(len, new)  # one that ends at once, one that is cut
    for b, (ids, logp, chosen) in enumerate(zip(new, logps, experts)):
        prompt, pictures = PROMPTS[b // 3], OF_PROMPT[b // 3]
        pack = pack_of(model, [prompt + ids], [(patches[i], IMAGES[i]) for i in pictures])
        pack.labels = torch.zeros(len(prompt + ids), dtype=torch.long)
        with torch.no_grad():
            full, _, routing = model(pack, entropy=False, temperature=1.5)
        close(torch.tensor(logp), full[len(prompt) - 1:], 1e-4)
        assert chosen.shape == (len(prompt) + len(ids) - 1, 2, 2) and chosen.dtype == np.int16
        assert np.array_equal(chosen, routing[2].transpose(0, 1)[:-1].numpy())


# ---- what runs once -------------------------------------------------------------------------------------------------
def test_equal_responses_and_shared_pictures_run_once_with_the_same_gradient():
    """Six responses to two prompts with one and two pictures, two of them equal, one without advantage: log p, loss
    and gradients are those of every response in a pack of its own with its own pictures."""
    model, _ = eyes()
    model.mixed_dtype, tok = torch.float32, SimpleNamespace(pad=0, image_pad=7)
    c = train_rl.Config(recipe="gspo-paper", model="", data=[], out="", prompts=2, group=3, pack=64, updates=1)
    generator, responses = np.random.default_rng(0), []
    raw = [generator.integers(0, 256, (math.prod(g), 588)).astype(np.uint8) for g in IMAGES]
    answers, advantage = [[5, 9, 2], [5, 9, 2], [8], [8, 8], [3, 1, 4, 1], [8, 8, 2]], [1.0, -0.5, 0.7, 0.0, -2.0, 0.3]
    for i, (ids, a) in enumerate(zip(answers, advantage)):
        prompt, pictures = [(PROMPTS[k], OF_PROMPT[k]) for k in (0, 2)][i // 3]
        doc = Doc(np.array(prompt + ids, np.int32), np.array([-100] * len(prompt) + ids, np.int32),
                  [IMAGES[k] for k in pictures], np.concatenate([raw[k] for k in pictures]))
        responses.append(train_rl.Response(i // 3, doc, "", np.full(len(ids), -2.0, np.float32), False, advantage=a))
    common.init_distributed()
    try:
        batches, counted = train_rl.update_part(c, responses, model, tok, torch.device("cpu"))
    finally:
        leave_group()
    assert counted == (6, 16, 14) and [len(b.pack.grids) for b in batches] == [3]  # not one, two and two twice
    batch, = batches
    assert len(batch.pack.rows) == 11 and len(batch.copy) == 14
    logp = model(batch.pack, entropy=False)[0][batch.copy]
    loss = (logp * batch.advantage / batch.lengths[batch.sequence]).sum()
    whole, found = torch.zeros(()), {}
    for r in (r for r in responses if r.advantage):
        pack = to_device(collate([r.doc], 0, 7, 0, "token", True), "cpu", model.impl, torch.float32)
        found[r.prompt, tuple(r.doc.ids)] = own = model(pack, entropy=False)[0]
        whole = whole + r.advantage * own.mean()
    for k in range(len(batch.lengths)):  # the pack's order is its own
        own = logp[batch.sequence == k]
        assert any(own.shape == x.shape and (own - x).abs().max() < 1e-5 for x in found.values())
    close(loss, whole, 1e-5)
    params = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, params) for x in (loss, whole))):
        close(a, b, 1e-5 * max(1, b.abs().max().item()))


def leave_group():
    torch.distributed.destroy_process_group()
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(key, None)


# ---- routing replay -------------------------------------------------------------------------------------------------
def test_replayed_experts_weigh_live_logits():
    """The layer with given experts is the loop with them and a softmax over the live logits there; rows of -1 go
    where the logits are largest."""
    torch.manual_seed(0)
    layer, x, g = lively(SMALL).model.layers[0].mlp, torch.randn(30, 32), torch.randn(30, 32)
    given = torch.rand(30, 8).argsort(1)[:, :2].to(torch.int16)
    given[::5] = -1
    y, (_, counts, best) = layer(x, torch.zeros(30, dtype=torch.long), given)
    logits = x @ layer.gate.weight.T
    live = logits.topk(2).indices
    chosen = torch.where(given < 0, live, given.long())
    assert torch.equal(best.long(), live) and (chosen != live).any(1).sum() > 15
    weights = torch.stack([logits[t, chosen[t]].softmax(0) for t in range(30)])
    want = moe.loop_experts(x, layer.experts.gate_up_proj, layer.experts.down_proj, weights, chosen)
    close(y, want + layer.shared_expert(x), 1e-5)
    assert counts.sum(0).tolist() == chosen.flatten().bincount(minlength=8).tolist()  # loads are those that worked
    grads = [torch.autograd.grad(out, list(layer.parameters()), g) for out in (y, want + layer.shared_expert(x))]
    for (name, _), a, b in zip(layer.named_parameters(), *grads):
        assert b.any(), name
        close(a, b, 1e-4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_replay_holds_through_recomputation_and_other_routers(recompute):
    """The gradients are those without recomputation, and of the given experts alone, also once the routers are
    others."""
    found = []
    for mode in ("none", recompute):
        model = lively(replace(SMALL, num_experts=16, moe_intermediate_size=8))
        pack = labelled_pack(model, (6, 2))
        pack.rows, pack.targets, pack.weights = torch.arange(8), torch.arange(8), torch.ones(8)
        _, _, routing = model(pack)
        pack.experts = routing[2]
        torch.manual_seed(1)
        for block in model.model.layers:
            block.mlp.gate.weight.data.copy_(torch.randn(16, 32))
        train_sft.prepare_blocks(model, mode, False)
        loss, _, after = model(pack)
        pairs, of_pairs, tokens, of_tokens = train_rl.rerouted(after[2], routing[2]).tolist()
        assert (of_pairs, of_tokens) == (16, 8) and pairs > 12 and tokens > 6
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        for layer, block in enumerate(model.model.layers):
            k = [p is block.mlp.experts.down_proj for p in model.parameters()].index(True)
            used = set(found[-1][k].flatten(1).any(1).nonzero()[:, 0].tolist())
            assert used == set(routing[2][layer].flatten().tolist()) != set(after[2][layer].flatten().tolist())
    for a, b in zip(*found):
        close(a, b, 1e-5)


def test_rerouted_by_hand():
    """Two layers, four tokens, top 2; an order is no difference, a row of -1 counts nowhere."""
    a = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]])
    b = torch.tensor([[[1, 0], [2, 4], [5, 4], [-1, -1]], [[0, 1], [3, 5], [4, 6], [-1, -1]]])
    assert train_rl.rerouted(a, b).tolist() == [3, 6, 2, 3]


# ---- whole runs -----------------------------------------------------------------------------------------------------
class Spread:
    """In place of rewards.Verifiers: rewards that differ inside a group, from the text alone."""
    def __init__(self, n, judge=None):
        pass

    def score_many(self, items, timeout, between=None):
        return [rewards.Result(x, x, 0.0, "") for x in (sum(map(ord, i["response"])) % 5 / 4 for i in items)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def quick(monkeypatch):
    """Runs in this process: Spread rewards, and no watchdog that outlives them."""
    monkeypatch.setattr(rewards, "Verifiers", Spread)
    monkeypatch.setattr(common, "watchdog", lambda *_: lambda: None)
    return monkeypatch


def saved(config, toy, folder, lively_seed=0):
    """A checkpoint with random weights and the toy's tokenizer."""
    tok = Tokenizer(toy / "tokenizer")
    config = replace(config, token_ids=tok.token_ids())
    model = lively(config, lively_seed) if lively_seed else Innovator.from_config(config, seed=1)
    model.assets = toy / "tokenizer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(toy, tmp_path_factory):
    """A vision-language model with random weights that says short things now and then."""
    return saved(PRESETS["tiny"], toy, tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="session")
def experts(toy, tmp_path_factory):
    """A mixture of experts whose routing is lively."""
    config = replace(PRESETS["tiny-moe"], hidden_size=64, num_hidden_layers=2, head_dim=16, num_experts_per_tok=2,
                     num_experts=8, vision=VisionConfig(depth=1, embed_dim=32, num_heads=2, intermediate_size=48))
    return saved(config, toy, tmp_path_factory.mktemp("experts") / "model", lively_seed=3)


def arguments(policy, toy, out, *args):
    return ("--model", policy, "--data", toy / "rl", "--out", out, "--prompts", 4, "--group", 4, "--max-new-tokens", 6,
            "--pack", 512, "--lr", "1e-4", "--recompute", "none", "--plain", "--save-every", 2, *args)


def rl(policy, toy, out, *args, **how):
    return launch("train_rl.py", *arguments(policy, toy, out, *args), **how)


def rows(out): return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe, nproc", [("gspo-paper", 2), ("dapo", 1), ("upstream", 1), ("dr-grpo", 1),
                                           ("cispo", 1)])
def test_every_recipe_runs_and_its_engine_agrees_with_the_trainer(policy, toy, tmp_path, recipe, nproc, monkeypatch):
    more = ("--updates", 2, "--overlong", 2) if recipe == "dapo" else ()
    args = ("--recipe", recipe, "--steps", 2, "--kl", 0.1, *more)
    if nproc > 1:
        rl(policy, toy, tmp_path / "x", *args, nproc=nproc)
    else:
        monkeypatch.setattr(common, "watchdog", lambda *_: lambda: None)  # it would outlive this run in this process
        assert here(train_rl, *arguments(policy, toy, tmp_path / "x", *args)) == 0
    for row in rows(tmp_path / "x"):
        if recipe == "dapo" and not row["responses"]:  # no group has a spread: asks ten times more, updates nothing
            assert row["made"] == 11 * 16 and row["equal_groups"] == 1 and "grad_norm" not in row
            continue
        assert row["gap_mean"] < 1e-5 and row["gap_max"] < 1e-3 and row["beyond_2x"] == 0 and row["responses"] > 0
    assert (tmp_path / "x" / "rollouts.txt").exists()


class Killed(BaseException):
    pass


def test_killed_and_resumed_equals_straight(policy, toy, tmp_path, quick):
    """The run dies after step 3, with a line of each file half written, and goes on from step 2: weights, moments,
    metrics but for the times, and rollouts.txt are bitwise those of a straight run."""
    straight, cut, write = tmp_path / "straight", tmp_path / "cut", train_rl.write_rollouts
    args = ("--recipe", "gspo-paper", "--steps", 4, "--lr", "1e-3", "--save-every", 1, "--keep", 1)

    def die(file, step, *more):
        write(file, step, *more)
        if step == 3:
            for name in ("rollouts.txt", "metrics.jsonl"):
                with open(cut / name, "a") as f:
                    f.write('==== step 4, "x' if name == "rollouts.txt" else '{"step": 4, "rew')
            raise Killed
    assert here(train_rl, *arguments(policy, toy, straight, *args)) == 0
    quick.setattr(train_rl, "write_rollouts", die)
    with pytest.raises(Killed):
        here(train_rl, *arguments(policy, toy, cut, *args))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    quick.setattr(train_rl, "write_rollouts", write)
    assert here(train_rl, *arguments(policy, toy, cut, *args, "--resume")) == 0
    times = ("generate_s", "train_s", "sync_s", "tok_s")
    a, b = ([{k: v for k, v in r.items() if k not in times} for r in rows(x)] for x in (straight, cut))
    assert a == b and len({r["reward"] for r in a}) > 1 and all(r["grad_norm"] > 0.01 for r in a)
    assert (straight / "rollouts.txt").read_text() == (cut / "rollouts.txt").read_text()
    assert re.findall(r"^==== step (\d)", (cut / "rollouts.txt").read_text(), re.M) == list("11223344")
    assert_same_state(cut / "step_00000004", straight / "step_00000004")


def test_metrics_are_the_means_of_the_responses(policy, toy, tmp_path, quick):
    made, collect = [], train_rl.collect
    quick.setattr(train_rl, "collect", lambda *a: made.append(collect(*a)) or made[-1])
    assert here(train_rl, *arguments(policy, toy, tmp_path / "x", "--recipe", "dr-grpo", "--steps", 3)) == 0
    for row, (responses, asked, counts, _) in zip(rows(tmp_path / "x"), made, strict=True):
        def mean(of): return pytest.approx(sum(map(of, responses)) / 16)
        assert row["reward"] == row["accuracy"] == mean(lambda r: r.reward) and row["responses"] == row["made"] == 16
        assert row["length"] == mean(lambda r: len(r.engine)) and row["truncated"] == mean(lambda r: r.truncated)
        by_type = {}
        for r in responses:
            by_type.setdefault(asked[r.prompt]["answer_type"], []).append(r.reward)
        assert row["by_type"] == {k: pytest.approx(sum(v) / len(v)) for k, v in by_type.items()}
        assert row["verifier_errors"] == row["engine_errors"] == row["bad_rows"] == 0 == counts["bad"]
    assert len({k for row in rows(tmp_path / "x") for k in row["by_type"]}) > 1


@pytest.mark.parametrize("replay", ["none", "old", "engine"])
def test_the_first_update_has_ratios_of_one(experts, toy, tmp_path, quick, replay):
    """Every later one moves them; the engine, in fp32, chooses the trainer's own experts."""
    stats, update = [], train_rl.update
    quick.setattr(train_rl, "update", lambda *a: stats.append(update(*a)) or stats[-1])
    assert here(train_rl, *arguments(experts, toy, tmp_path / "x", "--recipe", "grpo", "--updates", 2, "--steps", 1,
                                     "--lr", "1e-3", "--warmup", 0, "--replay", replay, "--recompute", "full")) == 0
    first, second = stats
    assert first["ratio_max"] == 1 and first["ratio_mean"] == pytest.approx(1, abs=1e-12) and first["grad_norm"] > 0.01
    assert first["old_routers"] == first["old_rerouted"] == 0
    assert second["ratio_max"] > 1.001 and second["old_routers"] > 0 and second["old_rerouted"] >= second["old_routers"]
    row, = rows(tmp_path / "x")
    assert row["gap_mean"] < 1e-5 and row["gap_max"] < 1e-3 and row["corrected_kept"] == 1
    assert ("engine_routers" in row) == (replay == "engine") and row.get("engine_routers", 0) == 0


def two_updates(policy: str, out: str) -> None:
    """Two updates on eight made-up responses with experts of their own, divided over the ranks. -> out: statistics"""
    c = train_rl.Config(recipe="gspo-paper", model=policy, data=[], out="", updates=2, replay="engine", low=0.1,
                        high=0.1, max_new_tokens=7, correction="sequence-truncate", cap=1.5)
    sft = train_sft.Config(stage="pretrain", model=policy, data=[], out="", dtype="fp32", recompute="full",
                           compile=False, lr=1e-3, seq_len=1)
    device = common.init_distributed()
    model, tok = train_sft.build(sft, device)
    optimizer, generator, responses = train_sft.adamw(model, sft), np.random.default_rng(0), []
    for k in range(8):
        prompt, n = 3 + k, 1 + k % 7
        ids = generator.integers(10, 200, prompt + n).astype(np.int32)
        labels = np.where(np.arange(prompt + n) < prompt, -100, ids).astype(np.int32)
        chosen = generator.random((prompt + n - 1, 2, 8)).argsort(-1)[..., :2].astype(np.int16)
        responses.append(train_rl.Response(
            k // 4, Doc(ids, labels, (), None), "", generator.normal(-8, 2, n).astype(np.float32), False, chosen,
            advantage=float(generator.normal()), error="spoilt" if k == 5 else ""))
    def parts(pack):
        some = [responses[k:k + 4][common.rank()::common.world()] for k in (0, 4)]
        return [train_rl.update_part(replace(c, pack=pack), s, model, tok, device) for s in some]
    found, first, second = [], parts(20), parts(64)  # other micro-batches, the same sums
    for step, halves in enumerate((first, second)):
        every = [b for batches, _ in halves for b in batches]
        found.append(train_rl.recompute_old(model, every, c) | train_rl.gap(every))
        found += [train_rl.update(c, model, optimizer, *half, 1e-3) for half in halves]
    if common.is_rank0():
        Path(out).write_text(json.dumps(found))


def test_two_ranks_update_as_one(experts, tmp_path):
    """Losses, norms, ratios, gaps and shares of rerouted tokens with replay and a correction, over four updates."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import common, test_rl, torch\n" \
        "torch.set_num_threads(1)\n" \
        "common.run(lambda: test_rl.two_updates(*sys.argv[1:]))"
    (tmp_path / "script.py").write_text(code)
    launch(tmp_path / "script.py", experts, tmp_path / "two.json", nproc=2)
    try:
        two_updates(str(experts), str(tmp_path / "one.json"))
    finally:
        leave_group()
    one, two = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("one", "two"))
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert one[2]["ratio_max"] > 1.01 and one[0]["engine_routers"] > 0.5 and one[1]["loss"] != 0


# ---- a step's parts by hand -----------------------------------------------------------------------------------------
def three_responses(**how):
    """Two tokens each in one micro-batch of one group; the first carries its loss, the others do too unless how says
    otherwise: config, model, tokenizer, responses."""
    model = lively(SMALL, seed=2)
    model.mixed_dtype, tok = torch.float32, SimpleNamespace(pad=0, image_pad=7)
    c = train_rl.Config(recipe="grpo", model="", data=[], out="", prompts=1, group=3, pack=64, reduce="token", low=0.2,
                        high=0.2, max_new_tokens=4, **how)
    responses = [train_rl.Response(0, Doc(np.array([5, 6, *ids], np.int32), np.array([-100, -100, *ids], np.int32), [],
                                          None), "", np.full(len(ids), -2.0, np.float32), truncated, advantage=a,
                                   error=error)
                 for ids, a, truncated, error in (([9, 2], 1.0, False, ""), ([8, 3, 4], -0.5, True, ""),
                                                  ([11], -0.7, False, "no result within 30 s"))]
    return c, model, tok, responses


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_an_update_by_hand(mask_truncated):
    """A response with an error, and a truncated one under --mask-truncated, neither count nor weigh; the others' loss
    is -ratio A + kl (d - log d - 1) with d = first / now, a token each."""
    c, model, tok, responses = three_responses(kl=0.3, mask_truncated=mask_truncated, correction="none")
    counting = responses[:1 if mask_truncated else 2]
    common.init_distributed()
    try:
        batches, counted = train_rl.update_part(c, responses, model, tok, torch.device("cpu"))
        assert counted == (len(counting), *[sum(len(r.engine) for r in counting)] * 2)
        batch, = batches
        assert batch.mask.sum() == counted[1] and len(batch.mask) == 6
        train_rl.recompute_old(model, batches, c)
        batch.old, batch.first = batch.old - 0.1, batch.old + torch.linspace(-0.5, 0.5, 6)
        now = batch.old + 0.1
        ratio, log_d = math.exp(0.1), batch.first - now
        k3 = log_d.exp() - log_d - 1
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        row = train_rl.update(c, model, optimizer, batches, counted, 0.0)
    finally:
        leave_group()
    loss = ((-ratio * batch.advantage + 0.3 * k3) * batch.mask).sum() / counted[1]
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5) and row["lr"] == 0.0
    assert row["kl_first"] == pytest.approx((k3 * batch.mask).sum().item() / counted[1], abs=1e-5) and row["kl_first"]
    assert row["ratio_mean"] == pytest.approx(ratio, abs=1e-5)


def test_rewards_by_hand(quick):
    """Overlong by 2 of a window of 4: half a point less. An error: the mean of the others of its group."""
    c, _, _, responses = three_responses(overlong=4)
    responses[1].engine, responses[2].engine = np.zeros(2, np.float32), np.zeros(4, np.float32)
    responses[0].engine = np.zeros(0, np.float32)
    given = [rewards.Result(1.0, 1.0, 1.0, ""), rewards.Result(0.9, 1.0, 0.0, ""),
             rewards.Result(None, None, 0.0, None, "boom")]
    asked = []

    def score_many(self, items, timeout, between):
        asked.extend(items)
        return given
    quick.setattr(Spread, "score_many", score_many)
    responses[2].error = ""
    row = {"answer": ["3"], "answer_type": "number", "problem": "How many?"}
    train_rl.verify(c, Spread(1), responses, [(row, None)])
    assert asked[0] == dict(response="", gold=["3"], answer_type="number", question="How many?")
    assert [r.reward for r in responses] == pytest.approx([1.0, 0.4, 0.7]) and responses[2].error == "boom"
    assert [r.accuracy for r in responses] == [1.0, 1.0, 0.0]
    counts = train_rl.tally(replace(c, replay="engine"), responses, [(row, None)])
    assert counts["error", "boom"] == 1 and counts["truncated"] == 1 and counts["tokens"] == 6
    assert counts["reward", "number"] == counts["reward"] == pytest.approx(2.1) and counts["no experts"] == 3


def test_controls_of_the_rewards(monkeypatch):
    """shuffled: the batch's own rewards in an order of the step's own; random: none of them."""
    seen = []
    monkeypatch.setattr(train_rl, "advantages", lambda grouped, _: seen.append(grouped.flatten().tolist()) or grouped)
    responses = [SimpleNamespace(reward=float(k)) for k in range(16)]
    for kind, step in (("verified", 0), ("shuffled", 0), ("shuffled", 1), ("random", 0)):
        c = train_rl.Config(recipe="dr-grpo", model="", data=[], out="", prompts=2, group=8, rewards=kind)
        train_rl.assign_advantages(c, responses, step)
        assert [r.advantage for r in responses] == seen[-1]
    straight, first, second, noise = seen
    assert straight == list(range(16)) == sorted(first) == sorted(second) and len({tuple(x) for x in seen}) == 4
    assert len(set(noise)) == 16 and 0 <= min(noise) and max(noise) < 1


def collected(pool: str, out: str) -> None:
    """collect() of four groups with a made-up engine and verifier. -> out.RANK: what it kept and counted"""
    common.init_distributed()
    c = train_rl.Config(recipe="grpo", model="", data=[pool], out="", prompts=4, group=2, refill=4)
    drawn = []

    class Source:
        bad = 0

        def draw(self, cursor, n, share, shares):
            new = [({"id": cursor + share + k * shares, "answer_type": "number"}, None) for k in range(n)]
            drawn.append(n)
            return new, cursor + n * shares

    def roll_out(c, engine, drawn, tok, seed, between):
        return [train_rl.Response(k, None, "", np.zeros(1), False) for k in range(len(drawn)) for _ in range(2)]

    def verify(c, verifiers, responses, drawn, between):
        for k, r in enumerate(responses):
            r.accuracy = 1.0 if drawn[r.prompt][0]["id"] == 1 else float(k % 2)  # rank 1's first group has no spread
            r.reward = r.accuracy + 0.1 * (k % 2)
    train_rl.roll_out, train_rl.verify = roll_out, verify
    kept, rows, counts, cursor = train_rl.collect(c, None, Source(), None, 0, 0, None, common.rank(), common.world())
    mine, all_ = ({str(k): v for k, v in x.items()} for x in (counts, train_rl.summed(counts)))
    own = dict(ids=[r["id"] for r in rows], kept=[r.prompt for r in kept], drawn=drawn, cursor=cursor, counts=mine,
               all=all_)
    Path(f"{out}.{common.rank()}").write_text(json.dumps(own))


def test_ranks_refill_together(tmp_path):
    """Of four groups one, rank 1's first, differs in the format alone: it is dropped. Both ranks draw once more and
    keep what they find, all responses are in the sums."""
    (tmp_path / "script.py").write_text(f"import sys; sys.path[:0] = {sys.path!r}; import common, test_rl\n"
                                        "common.run(lambda: test_rl.collected(*sys.argv[1:]))")
    launch(tmp_path / "script.py", "pool", tmp_path / "out", nproc=2)
    a, b = (json.loads((tmp_path / f"out.{k}").read_text()) for k in (0, 1))
    assert a["drawn"] == b["drawn"] == [2, 1] and a["cursor"] == b["cursor"] == 6
    assert a["ids"] == [0, 2, 4] and b["ids"] == [3, 5] and a["kept"] == [0, 0, 1, 1, 2, 2]  # one more than four
    assert a["counts"]["groups"] == b["counts"]["groups"] == 3 and b["counts"]["equal"] == 1
    assert a["all"] == b["all"] and a["all"]["responses"] == 12
    assert a["all"]["accuracy"] == 3 + 2 + 2 and a["all"]["('responses', 'number')"] == 12


def test_the_learning_rate_that_is_logged(policy, toy, tmp_path, quick):
    """Warm-up over two updates, then the last half of six steps falls. The engine has no use for the last weights."""
    used, update, load, loads = [], train_rl.update, engines.TorchEngine.load, []
    quick.setattr(engines.TorchEngine, "load", lambda *a: loads.append(1) or load(*a))
    quick.setattr(train_rl, "update", lambda *a: used.append(a[-1]) or update(*a))
    assert here(train_rl, *arguments(policy, toy, tmp_path / "x", "--recipe", "grpo", "--lr", 1, "--clip", 1e-9,
                                     "--steps", 6, "--warmup", 2, "--decay", 0.5, "--save-every", 0)) == 0
    assert used == pytest.approx([0.5, 1, 1, 1, 2 / 3, 1 / 3]) and [r["lr"] for r in rows(tmp_path / "x")] == used
    assert len(loads) == 6 and (tmp_path / "x" / "curves.png").exists()


def test_a_batch_that_is_all_right_is_logged_as_such(policy, toy, tmp_path, quick):
    """Refill drops every group: nothing trains, but the reward is not 0. The judge's silence and the verifier's words
    are in the log, the latter in rollouts.txt, too."""
    quick.setattr(Spread, "score_many", lambda _, items, timeout, between: [
        rewards.Result(1.0, 1.0, 1.0, "", by="rule, no judge: URLError" if k % 2 else "judge")
        for k, _ in enumerate(items)])
    run = arguments(policy, toy, tmp_path / "x", "--recipe", "grpo", "--judge", "http://localhost:9/v1",
                    "--judge-model", "m", "--save-every", 1)
    assert here(train_rl, *run, "--refill", 1, "--steps", 1) == 0
    row, = rows(tmp_path / "x")
    assert row["reward"] == row["accuracy"] == 1 and row["length"] > 0 and "loss" not in row and "lr" not in row
    assert (row["responses"], row["made"], row["equal_groups"], row["judge_failed"]) == (0, 32, 1, 0.5)
    assert set(row["by_type"].values()) == {1} and row["verifier_error"] == ""
    quick.setattr(Spread, "score_many", lambda _, items, timeout, between: [
        rewards.Result(None, None, 0.0, None, "boom") for _ in items])
    assert here(train_rl, *run, "--refill", 0, "--steps", 2, "--resume") == 0
    assert rows(tmp_path / "x")[1]["verifier_error"] == "boom" and rows(tmp_path / "x")[1]["verifier_errors"] == 16
    assert "tokens, truncated, error: boom\n" in (tmp_path / "x" / "rollouts.txt").read_text()


def test_experts_that_the_engine_does_not_tell(experts, toy, tmp_path, quick):
    """One response's are None: the router chooses for it, and it is counted."""
    generate = engines.TorchEngine.generate

    def without(*args):
        out = generate(*args)
        out[0][0].experts = None
        return out
    quick.setattr(engines.TorchEngine, "generate", without)
    assert here(train_rl, *arguments(experts, toy, tmp_path / "x", "--recipe", "grpo", "--replay", "engine", "--steps",
                                     1)) == 0
    row, = rows(tmp_path / "x")
    assert row["no_experts"] == 1 and row["engine_routers"] == 0 and row["grad_norm"] > 0


def test_dice_differ_between_batches_and_ranks():
    """The torch engine's seeds for three batches, with the seeds that two neighbouring ranks have."""
    seeds = []

    class Model:
        def generate(self, ids, *_, seed, **how):
            seeds.append(seed)
            return [[1]] * len(ids), [[0.0]] * len(ids), None
    engine = engines.TorchEngine.__new__(engines.TorchEngine)
    engine.model, engine.batch, engine.experts = Model(), 1, False
    for seed in (7, 8, 2 ** 60):
        engine.generate([Doc(np.array([1]), np.array([1]), [], None)] * 3, 1, engines.Sampling(1, ()), seed)
    assert len(set(seeds)) == 9 and all(0 <= s < 2 ** 63 for s in seeds)


@pytest.mark.parametrize("given, text", [
    (dict(max_new_tokens=0), "max-new-tokens 0"), (dict(updates=0), "updates 0"), (dict(seed=-1), "seed -1"),
    (dict(refill=-1), "refill -1"), (dict(prompts=0), "prompts 0"), (dict(prompts=-4), "prompts -4"),
    (dict(clip=0.0), "clip 0.0"), (dict(low=2.0), "low 2.0"), (dict(high=-0.5), "high -0.5"),
    (dict(cap=0.0), "cap 0.0"), (dict(decay=2.0), "decay 2.0"), (dict(engine="vllm-server", tp=2), "tp 2"),
    (dict(judge="url"), "belong together")])
def test_wrong_settings(given, text):
    with pytest.raises(AssertionError, match=text):
        train_rl.Config(recipe="grpo", model="", data=[""], out="", **given)


@pytest.mark.parametrize("answer, right", [([3], ["3"]), (3, ["3"]), ("3", ["3"]), (["3", "three"], ["3", "three"])])
def test_right_answers_are_texts(policy, tmp_path, answer, right):
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(
        problem="How many?", answer=answer, problem_type="counting", answer_type="number", source="made", images=[],
        prompt_type="default")) + "\n")
    c = train_rl.Config(recipe="grpo", model="", data=[str(tmp_path)], out="", max_new_tokens=4)
    row, _ = train_rl.Prompts(c, Tokenizer(policy), 4096).read(0)
    assert row["answer"] == right and rewards.reward("<answer>3</answer>", row["answer"], "number").accuracy == 1


def test_patience_reaches_the_process_group(monkeypatch):
    waits = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, timeout: waits.append(timeout.seconds))
    for patience in (7200, 5):
        common.init_distributed(patience)
    assert waits == [7200, 1800]


def test_resume_asks_for_the_same_run(policy, toy, tmp_path, capsys):
    def config(**how):
        return train_rl.Config(**{**dict(recipe="grpo", model=str(policy), data=["a", "b"], out=""), **how})
    common.write_json(tmp_path / "trainer.json", {"config": vars(config())})
    train_rl.check_resumed(config(steps=7, lr=1.0, refill=3), tmp_path)
    assert capsys.readouterr().out == ""
    for name, value in dict(recipe="dapo", seed=5, plain=True).items():
        with pytest.raises(common.UserError, match=f"--{name} .*, now "):
            train_rl.check_resumed(config(**{name: value}), tmp_path)
    with pytest.raises(common.UserError, match="--model .*, now other"):  # the KL term would be to another model
        train_rl.check_resumed(config(model="other", kl=0.1), tmp_path)
    for name, value in dict(model="moved", data=["moved"], tokenizer="moved").items():
        train_rl.check_resumed(config(**{name: value}), tmp_path)
        assert f"--{name} " in capsys.readouterr().out


def test_wrong_input_ends_in_one_line(policy, toy, tmp_path):
    def says(text, *args):
        done = rl(policy, toy, tmp_path / "x", *args, check=False)
        assert done.returncode == 2 and text in done.stderr, done.stderr
    says("needs two responses", "--recipe", "gspo-paper", "--group", 1)
    says("do not divide over 3 updates", "--recipe", "gspo-paper", "--updates", 3)
    says("no such file", "--recipe", "gspo-paper", "--data", toy / "nothing", "--steps", 1)
    says("choose from", "--recipe", "gspo-paper", "--trainable", "nothing")
