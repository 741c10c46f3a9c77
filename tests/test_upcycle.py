"""Dense -> MoE and back, its three trained stages, and expert parallelism."""
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import launch
from safetensors.torch import load_file, save_file
from test_model import close
from test_train import assert_same_state, metrics

import common
import train_sft
import upcycle
from data import Limits, Loader, Source
from model import PRESETS, Innovator, checkpoint_folder, config_of

SIZES = dict(vision=None, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
RUN = ("--workers", 0, "--seq-len", 256, "--lr", "1e-3", "--min-lr", "1e-4", "--warmup", 0.1)
GROUPS = ["chemistry", "physics"]
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def here(module, *argv) -> int:
    """A script's command line, run in this process: its exit code."""
    before, term = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [module.__name__ + ".py", *map(str, argv)]
    try:
        common.run(module.main)
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, term)
        for key in ENVIRONMENT:
            os.environ.pop(key, None)


def train(stage, model, data, out, *args) -> int:
    return here(train_sft, "--stage", stage, "--model", model, "--data", *data, "--out", out, *RUN, *args)


def tensors(path): return load_file(checkpoint_folder(path) / "model.safetensors")
def hf(path): return json.loads((checkpoint_folder(path) / "config.json").read_text())


def edit(source, out, change):
    """A copy of a checkpoint with change(name, tensor) applied to its tensors."""
    shutil.copytree(checkpoint_folder(source), out)
    new = {name: change(name, t).contiguous() for name, t in tensors(source).items()}
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


def assert_same_checkpoint(a, b):
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys() and hf(a) == hf(b)
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


class World:
    """Checkpoints and data that the tests share."""
    def __init__(self, folder: Path, toy: Path, tokenizer):
        rows = [json.loads(line) for line in (toy / "pretrain" / "text.jsonl").read_text().splitlines()]
        self.folder, self.data = folder, {}
        for name in ("general", *GROUPS):
            own = [r for r in rows if r["discipline"] == name]
            self.data[name] = self.rows(name, own)
        self.val = toy / "pretrain_val" / "text.jsonl"
        for family, qwen2 in (("qwen2", True), ("qwen3", False)):
            model = Innovator.from_config(replace(PRESETS["tiny"], qkv_bias=qwen2, qk_norm=not qwen2, **SIZES,
                                                  token_ids=tokenizer.token_ids()), seed=1)
            for p in model.parameters():  # norms and biases leave their neutral start
                torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0, 0.1)
            model.assets = tokenizer.path.parent
            model.save_pretrained(folder / family)
            upcycle.induct(upcycle.Induct(str(folder / family), "chemistry", str(folder / f"{family}_induct")))
            for k, name in enumerate(GROUPS):  # what training would leave: other experts
                torch.manual_seed(k)
                edit(folder / f"{family}_induct", folder / f"{family}_{name}",
                     lambda n, t: t + 0.1 * torch.randn_like(t) if ".experts." in n else t)
            self.split(family, "none", folder / f"{family}_split")
        self.dense, self.induct, self.moe = folder / "qwen2", folder / "qwen2_induct", folder / "qwen2_split"
        self.three = [self.data[name] for name in ("general", *GROUPS)]

    def rows(self, name, rows):
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    def split(self, family, scale, out, **fields):
        upcycle.split(upcycle.Split(str(self.folder / family), [f"{n}={self.folder / f'{family}_{n}'}" for n in GROUPS],
                                    str(out), **dict(slices=4, top_k=4, scale=scale) | fields))
        return out


@pytest.fixture(scope="session")
def world(toy, tokenizer, tmp_path_factory) -> World:
    torch.manual_seed(0)
    return World(tmp_path_factory.mktemp("upcycle"), toy, tokenizer)


IDS = torch.randint(0, 1000, (60,), generator=torch.Generator().manual_seed(7))
FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen3"])


def logits(path, ids=IDS):
    with torch.no_grad():
        return Innovator.from_pretrained(checkpoint_folder(path), torch.float32).logits(ids)


def their_logits(path, cls):
    import transformers
    model = getattr(transformers, cls).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def coarse(x, t, prefix):
    gate, up, down = (t[f"{prefix}.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# ---- induct ---------------------------------------------------------------------------------------------------------
@FAMILIES
def test_induction_starts_as_twice_the_mlp(world, family):
    model = Innovator.from_pretrained(world.folder / family)
    for block in model.model.layers:
        block.mlp.forward = lambda x, mlp=type(block.mlp).forward, own=block.mlp: mlp(own, x) + mlp(own, x)
    with torch.no_grad():
        close(logits(world.folder / f"{family}_induct"), model.logits(IDS), 1e-6)


def test_induction_moves_only_the_experts(world, tmp_path):
    assert train("induct", world.induct, [world.data["chemistry"]], tmp_path, "--steps", 5, "--batch", 2) == 0
    dense, before, after = tensors(world.dense), tensors(world.induct), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, t in after.items():
        assert torch.equal(t, before[name]) == (".experts." not in name), name
        if ".experts." not in name and ".mlp.gate." not in name:
            assert torch.equal(t, dense[name.replace(".shared_expert", "")]), name
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]
    upcycle.split(upcycle.Split(str(world.dense), [f"chemistry={tmp_path}", f"copy={world.dense}"],
                                str(tmp_path / "split"), slices=3, top_k=2))
    got = tensors(tmp_path / "split")
    assert torch.equal(torch.cat([got[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(6)]),
                       torch.cat([after["model.layers.1.mlp.experts.0.up_proj.weight"],
                                  dense["model.layers.1.mlp.up_proj.weight"]]))


# ---- split, extract, merge ------------------------------------------------------------------------------------------
@FAMILIES
def test_slices_sum_to_the_expert(world, family):
    split, x = tensors(world.folder / f"{family}_split"), torch.randn(20, 64)
    for s, name in enumerate(GROUPS):
        whole = tensors(world.folder / f"{family}_{name}")
        for i in range(2):
            mlp = f"model.layers.{i}.mlp"
            expected = coarse(x, whole, f"{mlp}.experts.0")
            parts = sum(coarse(x, split, f"{mlp}.experts.{4 * s + e}") for e in range(4))
            close(parts, expected, 1e-5 * expected.abs().max().item())
            assert torch.equal(coarse(x, split, f"{mlp}.shared_expert"), coarse(x, whole, f"{mlp}.shared_expert"))


@pytest.mark.parametrize("scale, factor", [("topk", 1), ("none", 1 / 4)])
@pytest.mark.parametrize("s", [0, 1])
def test_equal_weights_on_one_discipline_give_its_induction(world, tmp_path, scale, factor, s):
    layer = Innovator.from_pretrained(world.split("qwen2", scale, tmp_path / "split")).model.layers[1].mlp
    whole, x = tensors(world.folder / f"qwen2_{GROUPS[s]}"), torch.randn(20, 64)
    x[:, 0] = x[:, 0].abs() + 1  # the router looks at this column alone
    with torch.no_grad():
        layer.gate.weight.zero_()[4 * s:4 * s + 4, 0] = 3
        shared, expert = (coarse(x, whole, f"model.layers.1.mlp.{e}") for e in ("shared_expert", "experts.0"))
        expected = shared + factor * expert
        close(layer(x)[0], expected, 2e-6 * expected.abs().max().item())


@FAMILIES
@pytest.mark.parametrize("scale, fields", [("none", {}), ("none", dict(slices=3, top_k=2)), ("topk", {}),
                                           ("topk", dict(slices=6, top_k=3))])
def test_extract_reverses_split_and_merge_is_dense(world, tmp_path, family, scale, fields):
    moe = world.split(family, scale, tmp_path / "moe", **fields)
    for name in GROUPS:
        original, back, dense = world.folder / f"{family}_{name}", tmp_path / f"{name}_back", tmp_path / f"{name}_dense"
        assert here(upcycle, "extract", "--model", moe, "--discipline", name, "--out", back) == 0
        a, b = tensors(original), tensors(back)
        assert a.keys() == b.keys() and hf(back) == hf(original) | {"expert_groups": [name]}
        for k in a:
            exact = scale == "none" or not fields or ".experts.0.down_proj" not in k  # x 4 / 4 is exact, x 3 / 3 is not
            assert torch.equal(a[k], b[k]) if exact else (a[k] - b[k]).abs().max() <= 1e-6 * a[k].abs().max(), k
        assert here(upcycle, "merge", "--model", back if fields else moe, "--discipline", name, "--out", dense) == 0
        assert config_of(dense) == replace(config_of(world.folder / family), intermediate_size=192)
        close(logits(dense), logits(original), 2e-5)
        close(their_logits(dense, f"Q{family[1:]}ForCausalLM"), logits(original), 2e-5)


# ---- export ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_loads_in_transformers_and_import_reverses_it(world, tmp_path, dtype):
    Innovator.from_pretrained(world.moe).save_pretrained(tmp_path / "moe", dtype)
    assert here(upcycle, "export", tmp_path / "moe", tmp_path / "theirs") == 0
    assert here(upcycle, "import", tmp_path / "theirs", tmp_path / "again") == 0
    assert_same_checkpoint(tmp_path / "moe", tmp_path / "again")
    assert hf(tmp_path / "theirs")["architectures"] == ["Qwen2MoeForCausalLM"]
    assert all((tmp_path / d / "tokenizer.json").exists() for d in ("theirs", "again"))
    assert {t.dtype for t in tensors(tmp_path / "theirs").values()} == {dtype}
    expected = logits(tmp_path / "moe")
    assert torch.equal(logits(tmp_path / "theirs"), expected)
    close(their_logits(tmp_path / "theirs", "Qwen2MoeForCausalLM"), expected, 2e-5)


def test_export_of_what_has_no_released_form_names_ways_out(world, tmp_path, capsys):
    def says(code, *parts, argv):
        capsys.readouterr()
        assert here(upcycle, *argv) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(p in err for p in ("error: ", *parts)), err
    says(2, "made from Qwen3", "Ways out", "merge", "evaluate.py", "upcycle a Qwen2.5 model",
         argv=("export", world.folder / "qwen3_split", tmp_path / "x"))
    says(2, "has no experts", argv=("export", world.dense, tmp_path / "x"))
    says(2, "is not in the Qwen2-MoE form", argv=("import", world.moe, tmp_path / "x"))
    upcycle.convert(str(world.moe), str(tmp_path / "out"), True)
    gated = edit(tmp_path / "out", tmp_path / "gated", lambda n, t: t + 1 if "shared_expert_gate" in n else t)
    says(2, "shared_expert_gate.weight is not zero", argv=("import", gated, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


# ---- route and integrate --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_route_moves_only_the_routers(world, tmp_path, kind):
    data = [world.data[name] for name in GROUPS]
    assert train("route", world.moe, data, tmp_path, "--steps", 40, "--batch", 4, "--label-loss", kind, "--lr", "1e-2",
                 "--val", *data) == 0
    before, after = tensors(world.moe), tensors(tmp_path)
    for name in before:
        assert torch.equal(before[name], after[name]) == (".mlp.gate." not in name), name
    rows = metrics(tmp_path)
    start = np.log(2) if kind == "bce" else np.log(8)  # of a router that knows nothing
    assert abs(rows[0]["label"] - start) < 0.01
    assert sum(r["label"] for r in rows[-8:]) / 8 < rows[0]["label"] - 0.005
    first, last = (json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (0, 40) and first["loss"].keys() == set(GROUPS)
    own = lambda row: sum(row["share"][name][k] for k, name in enumerate(GROUPS))
    assert own(last) > own(first) + 0.1  # the routers learn whose tokens these are


def test_route_learns_nothing_from_the_text(world, tmp_path):
    nothing = ("--balance", 0, "--z", 0, "--label", 0)
    assert train("route", world.moe, world.three, tmp_path, "--steps", 2, "--batch", 2, *nothing) == 0
    assert [r["grad_norm"] for r in metrics(tmp_path)] == [0, 0]
    a, b = tensors(world.moe), tensors(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_integrate_moves_everything(world, tmp_path):
    assert train("integrate", world.moe, world.three, tmp_path, "--steps", 3, "--batch", 2) == 0
    before, after = tensors(world.moe), tensors(tmp_path)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert metrics(tmp_path)[-1]["loss"] < metrics(tmp_path)[0]["loss"]


# ---- weighted sources -----------------------------------------------------------------------------------------------
def steps_of(world, tokenizer, n, ranks=1, state=None, window=16, weights=(0.5, 0.3, 0.2)):
    """[per step: sorted row ids], state after each step."""
    out, states = [[] for _ in range(n)], [None] * n
    for r in range(ranks):
        source = Source([str(p) for p in world.three], str(tokenizer.path), Limits(), 256)
        loader = Loader(source, 4, weights=list(weights), seed=5, rank=r, world=ranks, window=window)
        if state:
            loader.load_state(state)
        with contextlib.closing(iter(loader)) as it:
            for k in range(n):
                step = next(it)
                out[k] += [name for p in step.packs for name in p.names]
                states[k] = step.state
    return [sorted(names) for names in out], states


def test_weights_give_exact_shares_of_the_rows(world, tokenizer):
    source = Source([str(p) for p in world.three], str(tokenizer.path), Limits(), 256)
    loader = Loader(source, 4, weights=[5, 3, 2], seed=5, window=10)
    ranges, seen = source.data.ranges, np.zeros(len(source.data), int)
    for w in range(60):
        rows, last = loader._window(0, w)
        assert np.histogram(rows, ranges)[0].tolist() == [5, 3, 2] and not last
        np.add.at(seen, rows, 1)
    for a, b in zip(ranges, ranges[1:]):  # a path is used up before it begins again
        assert seen[a:b].max() - seen[a:b].min() <= 1
    loader, n = Loader(source, 4, weights=[0, 0, 2], seed=5, window=1), ranges[3] - ranges[2]
    rows = [int(loader._window(0, w)[0][0]) for w in range(2 * n)]
    assert sorted(rows[:n]) == sorted(rows[n:]) == [*range(ranges[2], ranges[3])] and rows[:n] != rows[n:]  # anew
    loader = Loader(source, 4, weights=[0.7, 0, 1 / 3], seed=5, window=7)  # shares of no whole number: within one row
    rows = np.concatenate([loader._window(0, w)[0] for w in range(100)])
    asked = 700 * np.array([0.7, 0, 1 / 3]) / (0.7 + 1 / 3)
    assert len(rows) == 700 and np.abs(np.histogram(rows, ranges)[0] - asked).max() <= 1


def test_weighted_order_is_the_same_for_any_ranks_and_resumes(world, tokenizer):
    straight, states = steps_of(world, tokenizer, 12)
    for ranks in (2, 4):
        assert steps_of(world, tokenizer, 12, ranks)[0] == straight
    for k in (1, 4, 7):
        assert steps_of(world, tokenizer, 12 - k, 2, states[k - 1])[0] == straight[k:]


# ---- expert parallelism ---------------------------------------------------------------------------------------------
PARALLEL = ("--stage", "integrate", *RUN, "--steps", 5, "--batch", 4, "--weights", 0.5, 0.25, 0.25, "--save-every", 3,
            "--keep", 9, "--threads", 1)


def same(world): return ("--model", world.moe, "--data", *world.three, "--val", world.val)


def assert_same_curves(a, b):
    for name in ("metrics.jsonl", "val.jsonl"):
        x, y = ([json.loads(line) for line in (run / name).read_text().splitlines()] for run in (a, b))
        assert [r["step"] for r in x] == [r["step"] for r in y]
        for r, s in zip(x, y):
            for key in ("loss", "balance", "z", "grad_norm", "load_entropy", "mean"):
                p, q = (v if isinstance(v, dict) else {"": v} for v in (r.get(key, 0), s.get(key, 0)))
                assert p.keys() == q.keys()
                for k in p:
                    assert abs(p[k] - q[k]) <= 1e-5 * max(1, abs(p[k])), (name, r["step"], key, k, p[k], q[k])


@pytest.fixture(scope="session")
def straight(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert here(train_sft, *PARALLEL, *same(world), "--out", out) == 0
    return out


@pytest.mark.parametrize("nproc, ep, recompute", [(2, 1, "selective"), (4, 2, "none"), (4, 4, "full")])
def test_expert_parallelism_gives_the_same_curves(world, straight, tmp_path, nproc, ep, recompute):
    launch("train_sft.py", *PARALLEL, *same(world), "--out", tmp_path, "--ep", ep, "--recompute", recompute,
           nproc=nproc)
    assert_same_curves(straight, tmp_path)


def test_a_checkpoint_of_expert_parallelism_resumes_on_other_ranks(world, straight, tmp_path):
    def go(name, *args, nproc):
        launch("train_sft.py", *PARALLEL, *same(world), "--out", tmp_path / name, *args, nproc=nproc)
        assert_same_curves(straight, tmp_path / name)
    go("both", "--ep", 2, "--recompute", "selective", nproc=2)
    a, b = tensors(straight / "step_00000003"), tensors(tmp_path / "both" / "step_00000003")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-4
    for name, nproc in (("again2", 2), ("again1", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step_00000003").symlink_to(tmp_path / "both" / "step_00000003")
        for log in ("metrics.jsonl", "val.jsonl"):
            (tmp_path / name / log).write_text("".join((tmp_path / "both" / log).read_text().splitlines(True)[:3]))
        go(name, "--resume", "--recompute", "none", nproc=nproc)


def test_kill_and_resume_of_integrate_is_bitwise(world, tmp_path):
    args = ("train_sft.py", *PARALLEL, "--model", world.moe, "--data", *world.three, "--steps", 12, "--keep", 99)
    launch(*args, "--out", tmp_path / "straight")
    killed = tmp_path / "killed"
    process = launch(*args, "--out", killed, background=True)
    while not list(killed.glob("step_*")):
        time.sleep(0.005)
        assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(list(killed.glob("step_*"))) < 4, "the run ended before it was killed"
    assert "resumed from" in launch(*args, "--out", killed, "--resume").stdout
    assert_same_state(tmp_path / "straight" / "step_00000012", killed / "step_00000012")
    a, b = ([{k: v for k, v in r.items() if k not in ("tok_s", "wait_s", "seconds")} for r in metrics(tmp_path / d)]
            for d in ("straight", "killed"))
    assert a == b and len(a) == 12


# ---- wrong input ----------------------------------------------------------------------------------------------------
def test_wrong_input_ends_in_one_line_before_training(world, tmp_path, capsys, monkeypatch):
    def says(text, module, *argv):
        out = tmp_path / "out"
        capsys.readouterr()
        assert here(module, *argv, "--out", out) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and re.search(text, err), err
        assert not list(out.rglob("metrics.jsonl")) and not list(out.rglob("config.json"))
    run = lambda stage, model, *data: ("--stage", stage, "--model", model, "--data", *data, *RUN, "--batch", 2)
    chemistry = world.data["chemistry"]
    expert = lambda name, path: ("--expert", f"{name}={path}")
    split = ("split", "--dense", world.dense, *expert("chemistry", world.folder / "qwen2_chemistry"), "--slices", 4)
    says("--ep 3 does not divide 1 ranks", train_sft, *run("integrate", world.moe, chemistry), "--ep", 3)
    says("has no experts", train_sft, *run("pretrain", world.dense, chemistry), "--ep", 2)
    says("has 0 experts; induct trains one", train_sft, *run("induct", world.dense, chemistry))
    says("has 8 experts; induct trains one", train_sft, *run("induct", world.moe, chemistry))
    for stage in ("route", "integrate"):
        says("has 0 experts; make a MoE", train_sft, *run(stage, world.dense, chemistry))
        says("has 1 experts; make a MoE", train_sft, *run(stage, world.induct, chemistry))
    says("2 weights for 1 data paths", train_sft, *run("integrate", world.moe, chemistry), "--weights", 1, 2)
    says("must not be negative", train_sft, *run("integrate", world.moe, chemistry), "--weights", -1)
    bare = world.rows("bare", [{"id": "r1", "text": "a b c", "discipline": "physics"}, {"id": "r2", "text": "a b c"}])
    says(r"bare\.jsonl, r2 .*no discipline label", train_sft, *run("route", world.moe, chemistry, bare))
    says(r"general\.jsonl, .*discipline 'general' owns no experts; the model has chemistry, physics", train_sft,
         *run("route", world.moe, chemistry, world.data["general"]))
    says("top-k 5 must lie in 1..4, the number of experts", upcycle, *split, "--top-k", 5)
    says("an MLP of 96 does not divide into 7 slices", upcycle, *split, "--slices", 7, "--top-k", 2)
    other = edit(world.folder / "qwen2_physics", tmp_path / "other",
                 lambda n, t: t + 1e-3 if n == "model.layers.1.self_attn.q_proj.weight" else t)
    says(r"layers\.1\.self_attn\.q_proj\.weight is not that of --dense .*all inductions must start from", upcycle,
         *split, *expert("physics", other), "--top-k", 4)
    other = edit(world.folder / "qwen2_physics", tmp_path / "shared",
                 lambda n, t: t * 2 if n == "model.layers.0.mlp.shared_expert.up_proj.weight" else t)
    says(r"layers\.0\.mlp\.shared_expert\.up_proj\.weight is not that of --dense", upcycle, *split,
         *expert("physics", other), "--top-k", 4)
    says("has 8 experts; give an induct run", upcycle, *split, *expert("physics", world.moe), "--top-k", 4)
    says("chemistry is given twice", upcycle, *split, *expert("chemistry", world.dense), "--top-k", 4)
    says("is a MoE already", upcycle, "induct", "--dense", world.moe, "--discipline", "x")
    says("choose one of chemistry, physics", upcycle, "extract", "--model", world.moe)
    says("has no experts that belong to disciplines", upcycle, "merge", "--model", world.dense)
    monkeypatch.setattr(common, "world", lambda: 3)
    says("8 experts do not divide over --ep 3 ranks", train_sft, *run("integrate", world.moe, chemistry), "--ep", 3)
    says("--ep 2 does not divide 3 ranks", train_sft, *run("integrate", world.moe, chemistry), "--ep", 2)


def test_the_experiment_runs_goes_on_and_reports(world, toy, tmp_path):
    data = [world.data[n] for n in ("general", *GROUPS)]
    command = ("bench.py", "upcycle", "--train", *data, "--val", *data, "--tokenizer", toy / "tokenizer", "--out",
               tmp_path / "x", "--pretrain", 2, "--induct", 1, "--route", 1, "--integrate", 2, "--seq-len", 256)
    launch(*command)
    first = {f: f.stat().st_mtime for f in (tmp_path / "x").glob("seed_*/*/val.jsonl")}
    assert sorted(f.parent.name for f in first) == ["dense", "dense_same", "induct_chemistry", "induct_physics",
                                                    "moe_8", "pretrain", "route_8"]
    again = launch(*command).stdout  # nothing is trained twice
    assert {f: f.stat().st_mtime for f in (tmp_path / "x").glob("seed_*/*/val.jsonl")} == first
    report = (tmp_path / "x" / "report.md").read_text()
    assert all(row in report and row in again for row in ("| dense, all tokens | 1 |", "| MoE, 8 slices | 1 |"))
    steps = {n: len(metrics(tmp_path / "x" / "seed_0" / n)) for n in ("dense", "dense_same", "moe_8")}
    assert steps == {"dense": 2 * 1 + 1 + 2, "dense_same": 2, "moe_8": 2}
    for picture in ("routing.png", "granularity.png"):
        assert (tmp_path / "x" / picture).stat().st_size > 10_000
