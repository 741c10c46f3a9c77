"""train_rl.py when things go wrong: engines, verifiers, rows and disks that fail, ranks that are killed or hang; and
its ranks that only generate."""
import inspect
import os
import re
import signal
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, launch
from test_rl import Spread, arguments, leave_group, policy, quick, rows  # noqa: F401 (fixtures)
from test_train import assert_same_state, state
from test_upcycle import here

import common
import engine as engines
import rewards
import train_rl
from data import Tokenizer


def weights(folder) -> dict:
    return {k: v for k, v in state(folder).items() if k.startswith("model.")}


# ---- one process ----------------------------------------------------------------------------------------------------
@pytest.fixture
def run(policy, toy, tmp_path, quick, capfd):  # noqa: F811
    """A run in this process: its exit code and what it wrote to stderr."""
    def go(*args):
        code = here(train_rl, *arguments(policy, toy, tmp_path / "x", "--recipe", "grpo", "--save-every", 1, *args))
        return code, capfd.readouterr().err
    yield go
    if torch.distributed.is_initialized():  # one failure stays one
        leave_group()


def one_line(err: str) -> str:
    assert "Traceback" not in err
    line, = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_vllm_that_raises_ends_in_one_line(run, tmp_path, monkeypatch):
    """The second batch runs out of memory: the error in one line, its traceback in a file, step 1 saved."""
    class Vllm:
        """The parts of vllm's LLMEngine that VllmEngine.stream touches: every request ends in one step."""
        waiting, calls = {}, 0

        def add_request(self, name, prompt, params):
            self.waiting[name] = params.n

        def step(self):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("CUDA out of memory")
            at, done = {k: types.SimpleNamespace(logprob=-1.0) for k in range(99)}, dict(self.waiting)
            self.waiting.clear()
            return [types.SimpleNamespace(request_id=name, finished=True, outputs=[
                types.SimpleNamespace(index=k, token_ids=[20 + k, 30 - k], logprobs=[at, at], routed_experts=None)
                for k in reversed(range(n))]) for name, n in done.items()]

        def abort_request(self, names):
            self.waiting.clear()

    def make(c, config, dtype, device, out):
        engine = engines.VllmEngine.__new__(engines.VllmEngine)
        engine.llm = types.SimpleNamespace(llm_engine=Vllm())
        engine.eyes, engine.group, engine.experts, engine.out = None, None, False, out
        engine.device, engine.version, engine._inputs, engine.waking = device, 0, lambda docs: [{} for _ in docs], 0.0
        engine.load, engine.close = lambda named: None, lambda: None
        return engine
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", types.SimpleNamespace(
        RequestOutputKind=types.SimpleNamespace(CUMULATIVE=0, FINAL_ONLY=2)))
    monkeypatch.setattr(train_rl, "make_engine", make)
    code, err = run("--steps", 3)
    file = tmp_path / "x" / "engine_error.rank_0.txt"
    said = one_line(err)
    assert code == 2 and said.startswith("error: vLLM failed: RuntimeError: CUDA out of memory")
    assert f"(its traceback: {file}); go on from the last checkpoint with --resume" in said
    assert "raise RuntimeError" in file.read_text()
    assert common.latest(tmp_path / "x").name == "step_00000001" and rows(tmp_path / "x")[0]["responses"] == 16


def test_a_log_probability_that_is_not_finite_costs_its_response(run, tmp_path, monkeypatch):
    """One response of 16 carries no loss and is counted; its group's other rewards are as they were. All of them:
    one line, and the earlier step stays."""
    generate, update, kept, spoil = engines.TorchEngine.generate, train_rl.update, [], [(1, 2)]

    def spoilt(self, docs, n, *more):
        out = generate(self, docs, n, *more)
        for group, response in spoil:
            out[group][response].logp[-1] = float("nan") if response % 2 else -float("inf")
        return out

    def watched(c, model, optimizer, batches, counted, lr):
        kept.append([counted[0], *[float(m) for b in batches for m in b.mask]])
        return update(c, model, optimizer, batches, counted, lr)
    monkeypatch.setattr(engines.TorchEngine, "generate", spoilt)
    monkeypatch.setattr(train_rl, "update", watched)
    code, err = run("--steps", 2)
    assert code == 0, err
    for row, (responses, *mask) in zip(rows(tmp_path / "x"), kept, strict=True):
        assert row["engine_errors"] == 1 and row["verifier_errors"] == 0 and row["responses"] == 16 and responses == 15
        assert 0.0 not in mask and row["gap_max"] < 1e-3 and row["grad_norm"] > 0.01
    spoil[:] = [(g, r) for g in range(4) for r in range(4)]
    code, err = run("--steps", 3, "--resume")
    assert code == 2 and "not finite in all 16 responses of step 3: the weights or the engine's precision are broken" \
        in one_line(err)
    assert common.latest(tmp_path / "x").name == "step_00000002"


def test_verifiers_that_loop_or_eat_memory_cost_their_response(run, tmp_path, monkeypatch):
    """The first response is verified for ever, the second needs a terabyte, the third kills its process; the rest of
    the run is as always."""
    text = (ROOT / "rewards.py").read_text()
    assert text.count("\ndef reward(") == 1
    (tmp_path / "rewards.py").write_text(text.replace("\ndef reward(", f'''
def reward(**item):
    for name, fault in (("loop", "while True: pass"), ("eat", "bytearray(10 ** 12)"), ("die", "os._exit(1)")):
        try:
            os.close(os.open({str(tmp_path)!r} + "/" + name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        exec(fault)
    x = len(item["response"]) % 3 / 2
    return Result(x, x, 0.0, "")


def _reward('''))
    monkeypatch.undo()  # real processes
    monkeypatch.setattr(common, "watchdog", lambda *_: lambda: None)
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "rewards.py"))
    code, err = run("--steps", 2, "--verifiers", 1, "--verify-seconds", 1)
    assert code == 0, err
    first, second = rows(tmp_path / "x")
    assert (first["verifier_errors"], second["verifier_errors"]) == (3, 0) and first["engine_errors"] == 0
    assert first["responses"] == second["responses"] == 16 and second["grad_norm"] > 0


def test_groups_without_spread(run, tmp_path, monkeypatch):
    """All rewards equal. Without refill: counted, loss 0. With it: three rounds of four prompts, no update, go on."""
    monkeypatch.setattr(Spread, "score_many", lambda _, items, timeout, between: [
        rewards.Result(1.0, 1.0, 1.0, "") for _ in items])
    code, err = run("--steps", 1, "--weight-decay", 0)
    assert code == 0, err
    row, = rows(tmp_path / "x")
    assert row["equal_groups"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0 and row["reward"] == 1
    assert (row["responses"], row["made"]) == (16, 16) and row["ratio_mean"] == pytest.approx(1)
    code, err = run("--steps", 3, "--refill", 2, "--resume")
    assert code == 0, err
    for row in rows(tmp_path / "x")[1:]:
        assert row["equal_groups"] == 1 and (row["responses"], row["made"]) == (0, 3 * 16) and "loss" not in row
    assert_same_state(tmp_path / "x" / "step_00000002", tmp_path / "x" / "step_00000003")
    before, after = (weights(tmp_path / "x" / f"step_{k:08d}") for k in (2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_prompts_longer_than_the_context(run, policy, toy, tmp_path):  # noqa: F811
    """Those that do not fit are counted, the step takes the next ones; if none fits, one line names the numbers."""
    c = train_rl.Config(recipe="grpo", model="", data=[str(toy / "rl")], out="", plain=True, max_new_tokens=6)
    prompts = train_rl.Prompts(c, Tokenizer(policy), 2048)
    lengths = [len(prompts.read(i)[1].ids) for i in train_rl.permutation(c.seed, len(prompts.data), 0)]
    limit = sorted(lengths)[len(lengths) // 2]
    code, err = run("--steps", 2, "--context", limit + 6)
    assert code == 0, err
    found, bad = rows(tmp_path / "x"), [n > limit for n in lengths]
    ends = [k + 1 for k, b in enumerate(bad) if not b]
    assert [r["bad_rows"] for r in found] == [sum(bad[:ends[3]]), sum(bad[ends[3]:ends[7]])] and sum(bad[:ends[7]])
    assert all(r["responses"] == 16 for r in found)
    code, err = run("--steps", 3, "--context", 20, "--resume")
    assert code == 2 and re.search(r"\d+ tokens and max_new_tokens exceed the context 20; 101 bad rows in this batch",
                                   one_line(err))


def test_a_full_disk(run, tmp_path, monkeypatch):
    """During a save: one line, the earlier checkpoint stays. In the log: one line. Then --resume goes on."""
    save, out = common.save_state, tmp_path / "x"

    def full(model, optimizer, folder, trainer):
        save(model, optimizer, folder, trainer)
        if trainer["step"] == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(common, "save_state", full)
    code, err = run("--steps", 3)
    assert code == 2 and "No space left on device" in one_line(err) and "Earlier checkpoints are untouched" in err
    assert [p.name for p in out.iterdir() if "step" in p.name] == ["step_00000001"]
    monkeypatch.setattr(common, "save_state", save)
    with monkeypatch.context() as m:
        m.setattr(common.Log, "write", lambda self, row: open("/dev/full", "w").write("x" * 99999))
        code, err = run("--steps", 3, "--resume")
    assert code == 2 and "No space left on device" in one_line(err)
    code, err = run("--steps", 3, "--resume")
    assert code == 0 and [r["step"] for r in rows(out)] == [1, 2, 3], err


def test_an_engine_that_hangs(policy, toy, tmp_path):  # noqa: F811
    """The watchdog ends the run with one line; the step before is saved."""
    script = tmp_path / "script.py"
    script.write_text("import time, common, engine, train_rl\n"
                      "generate, calls = engine.TorchEngine.generate, []\n"
                      "def hang(*a):\n"
                      "    calls.append(1)\n"
                      "    return generate(*a) if len(calls) < 2 else time.sleep(600)\n"
                      "engine.TorchEngine.generate = hang\n"
                      "common.run(train_rl.main)\n")
    done = launch(script, *arguments(policy, toy, tmp_path / "x", "--recipe", "grpo", "--steps", 3, "--save-every", 1,
                                     "--patience", 8, "--verifiers", 1), check=False)
    assert done.returncode == 3 and one_line(done.stderr) == \
        "error: the run gave no sign of life for 8 s (rank 0); go on with --resume"
    assert common.latest(tmp_path / "x").name == "step_00000001"


# ---- ranks that only generate ---------------------------------------------------------------------------------------
# torchrun's own agent, with ranks that are forked: torch is imported once. Rewards are Spread's.
RANKS = """
import os, sys
from pathlib import Path
import matplotlib.pyplot, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import common, rewards, train_rl

SPREAD

def one_rank(folder):
    # NOTE the launcher's functions return where scripts leave, but not with an error, nor after a SIGTERM: hangs
    del os.environ["TORCHELASTIC_RUN_ID"]
    (folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    on_sigterm, asked = common.on_sigterm, []
    common.on_sigterm = lambda: asked.append(on_sigterm()) or asked[-1]
    try:
        common.run(train_rl.main)
    except SystemExit as e:
        os._exit(e.code)
    if any(asked):
        os._exit(0)

if __name__ == "__main__":
    rewards.Verifiers = Spread
    folder, many = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    elastic_launch(LaunchConfig(1, 1, many, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                                start_method="fork", max_restarts=0), one_rank)(folder)
"""


@pytest.fixture
def ranks(policy, toy, tmp_path):  # noqa: F811
    script, started = tmp_path / "script.py", []
    script.write_text(RANKS.replace("SPREAD", inspect.getsource(Spread)))

    def go(many, *args, **how):
        for old in tmp_path.glob("pid_*"):
            old.unlink()
        out = launch(script, tmp_path, many, *arguments(
            policy, toy, tmp_path / "x", "--recipe", "gspo-paper", "--updates", 2, "--prompts", 2, "--lr", "1e-3",
            "--warmup", 0, "--rollout-ranks", 2, *args), **how)
        started.append(out)
        return out
    yield go
    for process in started:
        if hasattr(process, "poll") and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(out, n: int, process) -> None:
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < n:
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()


def test_engine_ranks_have_the_trainers_weights(ranks, tmp_path):
    """Two ranks generate, two train, staleness 0: after every update the engines' probabilities are the trainers'."""
    ranks(4, "--steps", 4, "--staleness", 0)
    found = rows(tmp_path / "x")
    assert [r["step"] for r in found] == [1, 2, 3, 4] and not list((tmp_path / "x" / "queue").iterdir())
    for row in found:
        assert row["staleness"] == 0 and row["gap_mean"] < 1e-5 and row["gap_max"] < 1e-3 and row["responses"] == 8
        assert row["made"] == 8 and row["grad_norm"] > 0.01
    assert max(r["ratio_max"] for r in found) > 1.01  # the updates were large enough to be seen


def test_asynchronous_run_through_a_sigterm_a_hang_and_a_kill(ranks, tmp_path):
    """One rank trains, two generate ahead. Whatever ends the run, it ends soon and goes on from what was saved."""
    out, many = tmp_path / "x", ("--steps", 5000, "--save-every", 1, "--keep", 1)
    process = ranks(3, *many, background=True)
    wait_for_steps(out, 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    last = rows(out)[-1]["step"]
    assert common.latest(out).name == f"step_{last:08d}" and "go on with --resume" in text, text

    process = ranks(3, *many, "--resume", "--patience", 10, background=True)
    wait_for_steps(out, last + 2, process)
    hung = int((tmp_path / "pid_2").read_text())
    os.kill(hung, signal.SIGSTOP)
    stopped, seen = time.monotonic(), ""
    for line in process.stdout:
        seen += line
        if line.startswith("error: "):
            break
    assert time.monotonic() - stopped < 30 and re.match(
        r"error: rollout rank 1 (made no batch for step \d+|did not come for new weights) within \d+ s: ", line), seen
    os.kill(hung, signal.SIGKILL)  # the agent would, after 30 s
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and f"at step {last}" in seen, seen + text

    saved = int(common.latest(out).name[5:])
    process = ranks(3, *many, "--resume", background=True)
    wait_for_steps(out, saved + 2, process)  # one more may be there from before
    os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGKILL)
    killed = time.monotonic()
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - killed < 28, text  # the agent's SIGKILL comes at 30
    assert f"at step {saved}" in text and "Signal 9" in text

    last = int(common.latest(out).name[5:])
    ranks(3, "--steps", last + 2, "--resume")
    found = rows(out)
    assert [r["step"] for r in found] == list(range(1, last + 3)) and not list((out / "queue").iterdir())
    assert all(0 <= r["staleness"] <= 1 and r["responses"] == 8 for r in found) and any(r["staleness"] for r in found)
    ids = re.findall(r"^==== step \d+, (\S+):", (out / "rollouts.txt").read_text(), re.M)
    assert len(ids) == 2 * len(found) and len(set(ids[:40])) == len(ids[:40])  # 40 rows an epoch
