"""Training: world sizes, resume, kills, bad losses, what moves, and the real formats."""
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import SHARED, launch, needs_shared
from safetensors.torch import load_file

import train_sft
from model import PRESETS, Innovator

SMALL = ("--seq-len", 256, "--workers", 0, "--lr", "1e-3", "--min-lr", "1e-4", "--warmup", 0.1, "--recompute", "none",
         "--threads", 1)


@pytest.fixture(scope="session")
def stage0(toy, tokenizer, tmp_path_factory) -> Path:
    """A random tiny Innovator-VL with the toy tokenizer, tied so that sharing parameters is tried too."""
    from dataclasses import replace
    folder = tmp_path_factory.mktemp("stage0") / "model"
    model = Innovator.from_config(replace(PRESETS["tiny"], token_ids=tokenizer.token_ids(), tie_word_embeddings=True),
                                  seed=1)
    model.assets = tokenizer.path.parent
    model.save_pretrained(folder)
    return folder


def train(stage, model, data, out, *args, **how):
    return launch("train_sft.py", "--stage", stage, "--model", model, "--data", data, "--out", out, *SMALL, *args,
                  **how)


def metrics(out): return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
def losses(out): return [row["loss"] for row in metrics(out)]
def samples(out): return [line for f in sorted(Path(out).glob("samples_rank*")) for line in f.read_text().splitlines()]


def state(folder) -> dict:
    """Every tensor of a checkpoint: weights, masters, moments."""
    out = load_file(folder / "model.safetensors")
    reader = dcp.FileSystemReader(folder / "state")
    want = {k: torch.empty(m.size, dtype=m.properties.dtype)
            for k, m in reader.read_metadata().state_dict_metadata.items()}
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
    got = {}
    _load_state_dict(got, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat = {}
    def walk(prefix, x):
        for k, v in x.items():
            walk(f"{prefix}{k}.", v) if isinstance(v, dict) else flat.__setitem__(prefix + k, v)
    walk("", got)
    assert len(flat) == len(want) > 0
    return out | flat


def assert_same_state(a, b):
    a, b = state(a), state(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])][:5]


@pytest.fixture(scope="session")
def one_process(toy, stage0, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train("instruct", stage0, toy / "instruct", out, "--steps", 6, "--batch", 12, "--save-every", 3, "--log-samples",
          "--keep", 9)
    return out


@pytest.mark.parametrize("nproc", [2, 4])
def test_any_number_of_processes_gives_the_same_loss_curve(toy, stage0, one_process, tmp_path, nproc):
    out = tmp_path / "run"
    train("instruct", stage0, toy / "instruct", out, "--steps", 6, "--batch", 12, "--save-every", 3, "--log-samples",
          nproc=nproc)
    assert len(losses(out)) == 6
    for a, b in zip(losses(one_process), losses(out)):
        assert abs(a - b) <= 1e-5 * max(1, abs(a)), (losses(one_process), losses(out))
    def ids(run): return sorted((s["step"], n) for line in samples(run) for s in [json.loads(line)]
                                for p in s["samples"] for n in p)
    assert ids(out) == ids(one_process)
    a, b = (load_file(r / "step_00000006" / "model.safetensors") for r in (one_process, out))
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-4


def test_resume_on_another_world_size_continues_the_order(toy, stage0, one_process, tmp_path):
    out = tmp_path / "run"
    os.makedirs(out)
    os.symlink(one_process / "step_00000003", out / "step_00000003")
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics(one_process)[:3]))
    done = train("instruct", stage0, toy / "instruct", out, "--steps", 6, "--batch", 12, "--keep", 9, "--log-samples",
                 "--resume", nproc=2)
    assert "resumed from" in done.stdout and "saved by 1 ranks" in done.stdout
    for a, b in zip(losses(one_process), losses(out)):
        assert abs(a - b) <= 1e-5 * max(1, abs(a))


def test_kill_and_resume_is_bitwise(toy, stage0, tmp_path):
    args = ("--steps", 12, "--batch", 4, "--unit", "packs", "--save-every", 3, "--log-samples", "--keep", 99)
    train("mid", stage0, toy / "mid", tmp_path / "straight", *args)
    process = train("mid", stage0, toy / "mid", tmp_path / "killed", *args, background=True)
    while not list((tmp_path / "killed").glob("step_*")):
        time.sleep(0.005)
        assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = len(list((tmp_path / "killed").glob("step_*")))
    assert 1 <= saved < 4, "the run ended before it was killed"
    done = train("mid", stage0, toy / "mid", tmp_path / "killed", *args, "--resume")
    assert "resumed from" in done.stdout
    assert_same_state(tmp_path / "straight" / "step_00000012", tmp_path / "killed" / "step_00000012")
    a, b = metrics(tmp_path / "straight"), metrics(tmp_path / "killed")
    assert ([(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in a]
            == [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in b])
    by_step = {}
    for line in samples(tmp_path / "killed"):  # steps after the last save ran twice, on the same samples
        row = json.loads(line)
        assert by_step.setdefault(row["step"], row["samples"]) == row["samples"]
    assert ([json.loads(line)["samples"] for line in samples(tmp_path / "straight")]
            == [by_step[k] for k in range(1, 13)])


def test_a_kill_during_a_save_leaves_the_earlier_checkpoint(toy, stage0, tmp_path):
    out, args = tmp_path / "run", ("--steps", "4", "--batch", "4", "--save-every", "2")
    code = ("import os, sys, common, train_sft\n"
            "save = common.save_state\n"
            "def die(model, optimizer, folder, trainer):\n"
            "    save(model, optimizer, folder, trainer)\n"
            "    if trainer['step'] == 4: os.kill(os.getpid(), 9)\n"  # everything is written, nothing is renamed
            "common.save_state = die\n"
            "sys.argv = ['train_sft.py', *sys.argv[1:]]\n"
            "common.run(train_sft.main)\n")
    command = ("--stage", "instruct", "--model", stage0, "--data", toy / "instruct", "--out", out, *SMALL, *args)
    killed = launch("-c", code, *command, check=False)
    assert killed.returncode == -9
    assert [p.name for p in out.glob("step_*")] == ["step_00000002"] and (out / ".step_00000004.tmp").exists()
    launch("train_sft.py", *command, "--resume")
    assert (out / "step_00000004" / "model.safetensors").exists() and not (out / ".step_00000004.tmp").exists()


def test_a_full_disk_names_itself_and_keeps_the_earlier_checkpoint(toy, stage0, tmp_path):
    out = tmp_path / "run"
    code = ("import sys, common, train_sft\n"
            "save = common.save_state\n"
            "def full(model, optimizer, folder, trainer):\n"
            "    if trainer['step'] == 4: raise OSError(28, 'No space left on device')\n"
            "    save(model, optimizer, folder, trainer)\n"
            "common.save_state = full\n"
            "common.run(train_sft.main)\n")
    script = tmp_path / "script.py"
    script.write_text(code)
    args = ("--stage", "mid", "--model", stage0, "--data", toy / "mid", "--out", out, *SMALL, "--steps", 4,
            "--batch", 1, "--save-every", 2)
    done = launch(script, *args, check=False)
    assert done.returncode == 2 and "could not be written" in done.stderr and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and [p.name for p in out.iterdir() if "step" in p.name] == ["step_00000002"]
    launch("train_sft.py", *args, "--resume")
    assert (out / "step_00000004").exists()


def test_sigterm_saves_and_exits_0(toy, stage0, tmp_path):
    out = tmp_path / "run"
    process = train("instruct", stage0, toy / "instruct", out, "--steps", 5000, "--batch", 4, background=True)
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
        time.sleep(0.02)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    last = metrics(out)[-1]["step"]
    assert (out / f"step_{last:08d}" / "trainer.json").exists() and "go on with --resume" in text


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_non_finite_loss_stops_before_the_update(toy, stage0, tmp_path, nproc):
    out = tmp_path / "run"
    code = ("import sys, torch, common, train_sft\n"
            "to_device, count = train_sft.to_device, 0\n"
            "def poison(p, *a):\n"
            "    global count\n"
            "    count += 1\n"
            "    if count == 3 and common.rank() == common.world() - 1:\n"
            "        p.weights[0] = float('nan'); print('POISONED', p.names[0])\n"
            "    return to_device(p, *a)\n"
            "train_sft.to_device = poison\n"
            "common.run(train_sft.main)\n")
    script = tmp_path / "script.py"
    script.write_text(code)
    done = launch(script, "--stage", "mid", "--model", stage0, "--data", toy / "mid", "--out", out, *SMALL,
                  "--steps", 4, "--batch", 2, "--unit", "packs", "--save-every", 1, check=False, nproc=nproc)
    assert done.returncode != 0
    assert "is not finite; nothing was updated" in done.stderr
    name = done.stdout.split("POISONED ")[1].split("\n")[0]
    step = len(metrics(out))
    assert name in json.loads((out / f"non_finite_step_{step}.json").read_text())
    assert sorted(p.name for p in out.glob("step_*"))[-1] == f"step_{step:08d}"  # the bad step was not saved
    assert all(torch.isfinite(v).all() for v in load_file(out / f"step_{step:08d}" / "model.safetensors").values())


def test_align_moves_only_the_merger(toy, stage0, tmp_path):
    train("align", stage0, toy / "align", tmp_path / "run", "--steps", 3, "--batch", 2)
    before, after = (load_file(stage0 / "model.safetensors"),
                     load_file(tmp_path / "run" / "step_00000003" / "model.safetensors"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith("visual.merger.")), name


def test_bf16_trains_masters_in_fp32(toy, stage0, tmp_path):
    """bf16 compute and fp32 masters: an update far below bf16's resolution is kept."""
    train("mid", stage0, toy / "mid", tmp_path / "run", "--steps", 2, "--batch", 2, "--dtype", "bf16", "--lr", "1e-7",
          "--min-lr", 0)
    weights = load_file(tmp_path / "run" / "step_00000002" / "model.safetensors")
    full = state(tmp_path / "run" / "step_00000002")
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    master, old = (full["model.lm_head.weight" if "model.lm_head.weight" in full else
                        "model.model.embed_tokens.weight"],
                   load_file(stage0 / "model.safetensors")["model.embed_tokens.weight"])
    assert master.dtype == torch.float32 and 0 < (master - old).abs().max() < 1e-6


@pytest.mark.parametrize("recompute, compiled", [("selective", False), ("full", False), ("selective", True)])
def test_recomputation_and_compilation_change_nothing(tokenizer, recompute, compiled):
    """Loss and gradients with recomputation (and compiled blocks) equal the plain ones."""
    from test_model import close, pack_of
    from dataclasses import replace
    config = replace(PRESETS["tiny"], num_hidden_layers=2, vision=replace(PRESETS["tiny"].vision, depth=1),
                     token_ids=tokenizer.token_ids())
    image = config.image_token_id
    docs, images = [[1, *[image] * 2, 4, 5], [6, 7, 8]], [(torch.randn(8, 588), (1, 2, 4))]
    grads = []
    for mode, fast in (("none", False), (recompute, compiled)):
        model = Innovator.from_config(config, seed=2)
        train_sft.prepare_blocks(model, mode, fast)
        loss = model(pack_of(model, docs, images))[0]
        loss.backward()
        grads.append([loss.detach(), *[p.grad for p in model.parameters()]])
    for a, b in zip(*grads):
        close(a, b, 1e-5)


def test_released_loss_average_weighs_packs_alike(toy, stage0, tmp_path):
    for average in ("token", "pack", "document"):
        train("mid", stage0, toy / "mid", tmp_path / average, "--steps", 1, "--batch", 2, "--loss-average", average,
              "--log-samples")
    rows = [metrics(tmp_path / a)[0] for a in ("token", "pack", "document")]
    documents = sum(len(p) for line in samples(tmp_path / "token") for p in json.loads(line)["samples"])
    assert rows[1]["supervised"] == 2 and rows[2]["supervised"] == documents and rows[0]["supervised"] > documents
    assert len({r["loss"] for r in rows}) == 3


PINNED = [6.9322, 6.6854, 6.55, 6.4168, 6.291, 6.2264, 6.1377, 6.077, 6.086, 6.0359]


def test_ten_pinned_losses(toy, tmp_path):
    """A change that moves these says why."""
    launch("train_sft.py", "--stage", "pretrain", "--model", "preset:tiny", "--tokenizer", toy / "tokenizer",
           "--data", toy / "pretrain", "--out", tmp_path / "run", *SMALL, "--steps", 10, "--batch", 4, "--seed", 0)
    assert [round(x, 4) for x in losses(tmp_path / "run")] == pytest.approx(PINNED, abs=2e-3)


@needs_shared
@pytest.mark.parametrize("folder", [
    "llava_558k", "wds_packed", "wds_sft", "instruct_46m", "rl_172k", "midtraining_85m"])
def test_real_rows_train(folder, tmp_path):
    """Fifty steps of tiny on the real rows with the real tokenizer: the loss falls."""
    out = tmp_path / "run"
    launch("train_sft.py", "--stage", "instruct", "--model", "preset:tiny",
           "--tokenizer", SHARED / "data" / "qwen_tokenizer", "--data", SHARED / "data" / "formats" / folder,
           "--out", out, "--steps", 50, "--batch", 4, "--seq-len", 2048, "--max-pixels", 28 * 28 * 16, "--lr", "2e-3",
           "--min-lr", "2e-4", "--warmup", 0.1, "--workers", 0, "--recompute", "none", "--threads", 1)
    curve = losses(out)
    assert len(curve) == 50 and sum(curve[-5:]) < 0.7 * sum(curve[:5]), curve


def test_wrong_arguments_end_in_one_line(toy, stage0, tmp_path):
    def says(text, *args, nproc=1):
        done = launch("train_sft.py", *args, check=False, nproc=nproc)
        assert done.returncode != 0 and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr or nproc > 1
    base = ("--stage", "mid", "--model", stage0, "--data", toy / "mid", "--out", tmp_path / "x", "--workers", "0")
    says("did you mean --weight-decay", *base, "--weigt-decay", "1")
    says("invalid choice", *base, "--attention", "magic")
    says("has no tokenizer", "--stage", "pretrain", "--model", "preset:tiny", "--data", toy / "pretrain",
         "--out", tmp_path / "x")
    says("exceeds the model's 2048", *base)
    says("no such file or folder", *base[:4], "--data", toy / "nothing", *base[6:], "--seq-len", "256")
    says("does not divide over 2 ranks", *base, "--seq-len", "256", "--batch", "3", nproc=2)
    (tmp_path / "x" / "step_00000001").mkdir(parents=True)
    says("already holds step_00000001: go on with --resume", *base, "--seq-len", "256")
