"""train_rl.py: its objectives against sums written out by hand, and whole runs with the engine in plain torch."""
import json
import math

import pytest
import torch
from conftest import launch
from test_model import close
from test_train import assert_same_state, losses

import train_rl
from data import Tokenizer
from model import PRESETS, Innovator

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


@pytest.fixture(scope="session")
def policy(toy, tmp_path_factory):
    """A vision-language model with random weights that says short things now and then."""
    tok = Tokenizer(toy / "tokenizer")
    config = PRESETS["tiny"]
    model = Innovator.from_config(type(config)(**{**vars(config), "token_ids": tok.token_ids()}), seed=1)
    model.assets = toy / "tokenizer"
    out = tmp_path_factory.mktemp("policy") / "model"
    model.save_pretrained(out)
    return out


def rl(policy, toy, out, *args, **how):
    return launch("train_rl.py", "--model", policy, "--data", toy / "rl", "--out", out, "--prompts", 4, "--group", 4,
                  "--max-new-tokens", 6, "--pack", 512, "--lr", "1e-4", "--recompute", "none", "--plain",
                  "--save-every", 2, *args, **how)


def rows(out): return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe, nproc", [("gspo-paper", 2), ("dapo", 1), ("upstream", 1), ("dr-grpo", 1), ("cispo", 1)])
def test_every_recipe_runs_and_its_engine_agrees_with_the_trainer(policy, toy, tmp_path, recipe, nproc):
    more = ("--updates", 2, "--overlong", 2) if recipe == "dapo" else ()
    rl(policy, toy, tmp_path / "x", "--recipe", recipe, "--steps", 2, "--kl", 0.1, *more, nproc=nproc)
    for row in rows(tmp_path / "x"):
        if recipe == "dapo" and not row["responses"]:  # no group has a spread: asks ten times more, updates nothing
            assert row["made"] == 11 * 16 and row["equal_groups"] == 1 and "grad_norm" not in row
            continue
        assert row["gap_mean"] < 1e-5 and row["gap_max"] < 1e-3 and row["beyond_2x"] == 0 and row["responses"] > 0
    assert (tmp_path / "x" / "rollouts.txt").exists()


def test_interrupted_equals_straight_bitwise(policy, toy, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    rl(policy, toy, straight, "--recipe", "gspo-paper", "--steps", 4)
    rl(policy, toy, cut, "--recipe", "gspo-paper", "--steps", 2)
    rl(policy, toy, cut, "--recipe", "gspo-paper", "--steps", 4, "--resume")
    assert losses(cut) == losses(straight)
    keys = ("reward", "length", "gap_mean", "ratio_max", "grad_norm")
    assert [[r[k] for k in keys] for r in rows(cut)] == [[r[k] for k in keys] for r in rows(straight)]
    assert_same_state(cut / "step_00000004", straight / "step_00000004")


def test_wrong_input_ends_in_one_line(policy, toy, tmp_path):
    def says(text, *args):
        done = rl(policy, toy, tmp_path / "x", *args, check=False)
        assert done.returncode == 2 and text in done.stderr, done.stderr
    says("needs two responses", "--recipe", "gspo-paper", "--group", 1)
    says("do not divide over 3 updates", "--recipe", "gspo-paper", "--updates", 3)
    says("no such file", "--recipe", "gspo-paper", "--data", toy / "nothing", "--steps", 1)
    says("choose from", "--recipe", "gspo-paper", "--trainable", "nothing")
