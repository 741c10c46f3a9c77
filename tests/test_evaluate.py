"""rewards.py by cases; evaluate.py and chat.py end to end on small models that are made here."""
import base64
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

import chat
import common
import evaluate
import results as numbers
import rewards
import scorers
import tasks
from conftest import launch
from data import Tokenizer
from engine import TorchEngine
from model import PRESETS, Innovator

# ---- rewards --------------------------------------------------------------------------------------------------------
EXTRACTED = [
    ("<think>2 or 3", None), ("<think>a</think>7", "7"), ("thought that the prompt opened</think>7", "7"),
    ("<think>a</think><answer>7</answer><think>more", None), ("<think>only this</think>", None), ("", None),
    ("  ", None), ("<answer>6</answer> no, <answer> 7 </answer>", "7"), ("<answer><answer>7</answer>", "7"),
    ("<answer></answer>", None), ("\\boxed{6}, then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{7} and \\boxed{8", "7"), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("\\boxed{6} <answer>7</answer>", "7"),
    ("<answer>\\boxed{7}</answer>", "7"), ("so 3\n#### 7\n", "7"), ("\\boxed{7}\n#### 8", "7"),
    ("The answer is (B).", "(B)"), ("**Answer:** B", "B"), ("Final answer: 3.5. Done", "3.5"),
    ("The answer is 4 because 2 + 2", "4"), ("The answer is not\nclear", "not"), ("red", "red"),
    ("several\nlines", None), ("x" * 301, None)]
SHAPES = ["circle", "triangle", "a cross", "square"]
CHOICES = [  # response, gold, options, right?
    ("B", "B", SHAPES, True), ("b", "B", SHAPES, True), ("(B)", "B", SHAPES, True), ("B.", "B", SHAPES, True),
    ("$\\text{B}$", "B", SHAPES, True), ("B. triangle", "B", SHAPES, True), ("(B) triangle", "B", SHAPES, True),
    ("B: a triangle", "B", SHAPES, True), ("b) triangle", "B", SHAPES, True), ("The answer is B", "B", SHAPES, True),
    ("the answer is: **(B)**.", "B", SHAPES, True), ("Option B", "B", SHAPES, True),
    ("B is right", "B", SHAPES, True), ("B, which has three corners", "B", SHAPES, True),
    ("Triangle", "B", SHAPES, True), ("the triangle.", "B", SHAPES, True), ("B", "triangle", SHAPES, True),
    ("triangle", "triangle", SHAPES, True), ("cross", "C", SHAPES, True),
    ("It has three corners.\nB", "B", SHAPES, True),
    ("It has three corners.\nSo the answer is (B)", "B", SHAPES, True), ("A triangle is drawn", "A", SHAPES, False),
    ("A", "B", SHAPES, False), ("a shape", "A", SHAPES, False), ("I am not sure", "A", None, False),
    ("I think so", "I", None, False), ("what a day", "A", SHAPES, False), ("E", "A", SHAPES, False),
    ("T", "A", SHAPES, False), ("B or C", "B", SHAPES, False), ("(B) or (C)", "B", SHAPES, False),
    ("The answer is not B", "B", SHAPES, False), ("<think>B", "B", SHAPES, False),
    ("<answer></answer>B", "B", SHAPES, False), ("", "A", SHAPES, False), ("A, C", "AC", None, True),
    ("C and A", "A, C", None, True), ("(A), (C)", "AC", None, True), ("AC", "AC", None, True),
    ("A", "AC", None, False), ("A, B, and C", "AC", None, False), ("BAD", "ABD", None, True),
    ("A, C", "C", None, False), ("The answers are A and C.", "AC", None, True), ("Apple", "A", None, False),
    ("C", "C", ["GDA", "ADG", "GAD"], True), ("ADG", "B", ["GDA", "ADG", "GAD"], True),
    ("E. C or D", "E", ["1", "2", "3", "4", "C or D"], True)]
NUMBERS = [  # response, gold, right?
    ("5", "5", True), ("5.0", "5", True), ("-5", "-5", True), ("−5", "-5", True), ("5", "-5", False),
    ("+5", "5", True), ("05", "5", True), ("1,250", "1250", True), ("$1,250.50", "1250.5", True),
    ("1{,}250", "1250", True), ("1.2e3", "1200", True), ("1.2 \\times 10^{3}", "1200", True),
    ("1.2×10⁻³", "0.0012", True), ("2^{10}", "1024", True), ("45%", "45", True), ("45%", "0.45", True),
    ("0.45", "45%", True), ("45", "4.5%", False), ("3/4", "0.75", True), ("\\frac{3}{4}", "0.75", True),
    ("-\\dfrac{3}{4}", "-0.75", True), ("1 3/4", "1.75", True), ("1/0", "1", False), ("5 apples", "5", True),
    ("12 m^2", "12", True), ("12 cm²", "12", True), ("about 60 km/h", "60", True), ("3 kg of H2O", "3", True),
    ("three", "3", True), ("Twenty-one", "21", True), ("<answer>5 of the 12</answer>", "5", True),
    ("<answer>3 + 4 = 7</answer>", "7", True), ("\\boxed{x = 7}", "7", True), ("3 boxes of 4 are 12", "12", True),
    ("She has 3.\nThen 9 * 2 = 18 dollars.", "18", True), ("first 18\n#### 17", "18", False),
    ("<think>18", "18", False), ("<answer></answer> 18", "18", False), ("none", "5", False), ("", "5", False),
    ("15", "5", False), ("5", "15", False), ("0.50", "5", False), ("5\\pi", "5", False), ("15π", "5", False),
    ("x2", "2", False), ("1000001", "1000000", False), ("0.3333333", "1/3", True), ("0.33", "1/3", False),
    ("9" * 30, "9" * 29 + "8", False), ("9^999999999", "9", False), ("9" * 5000, "9", False),
    ("1e" + "9" * 5000, "9", False)]
OTHERS = [  # response, gold, type, right?
    ("yes", "Yes", "boolean", True), ("Yes, it lights.", "yes", "boolean", True),
    ("The answer is True", "yes", "boolean", True), ("no", "yes", "boolean", False),
    ("I know", "no", "boolean", False), ("I do not know", "no", "boolean", False),
    ("not true", "yes", "boolean", False), ("It is true", "true", "boolean", True),
    ("yesterday", "yes", "boolean", False), ("", "no", "boolean", False), ("Red.", "red", "any", True),
    ("the red  one", "red one", "any", True), ("carbon-dioxide", "carbon dioxide", "any", True),
    ("two dogs", "2 dogs", "any", True), ("reddish", "red", "any", False), ("-3", "3", "any", False),
    ("3.5", "35", "any", False), ("3.0", "3", "any", True), ("vitamin", "vitamin A", "any", False),
    ("", "A", "any", False), ("the", "A", "any", False), ("> 5", "< 5", "any", False),
    ("9" * 5000, "9", "any", False), ("CC(=O)O", "CC(=O)O", "any", True), ("CC=OO", "CC(=O)O", "any", False),
    ("c1ccccc1", "C1CCCCC1", "any", False), ("12", "12", "math-expressions", True),
    ("\\frac12", "\\frac{1}{2}", "math-expressions", True), ("0.5", "$\\frac{1}{2}$", "math-expressions", True),
    ("$90^\\circ$", "90", "math-expressions", True), ("x=5", "5", "math-expressions", True),
    ("(3, -4)", "$(3,-4)$", "math-expressions", True), ("5+\\sqrt{19}", "$5 + \\sqrt{19}$", "math-expressions", True),
    ("\\text{Evelyn}", "Evelyn", "math-expressions", True),
    ("So we get\nin total 12 cm", "12", "math-expressions", True),
    ("<answer>2n</answer>", "2", "math-expressions", False), ("2", "$2n$", "math-expressions", False),
    ("<answer>1, 3</answer>", "1", "math-expressions", False), ("x - 1", "x + 1", "math-expressions", False),
    ("<answer>5x - 7 = 0</answer>", "0", "math-expressions", False), ("52", "52_8", "math-expressions", False)]


@pytest.mark.parametrize("response,answer", EXTRACTED)
def test_extract_answer(response, answer):
    assert rewards.extract_answer(response) == answer


@pytest.mark.parametrize("response,gold,options,right", CHOICES)
def test_multiple_choice(response, gold, options, right):
    assert rewards.score(response, gold, "multiple-choice", options) is right


@pytest.mark.parametrize("response,gold,right", NUMBERS)
def test_number(response, gold, right):
    assert rewards.score(response, gold, "number") is right
    assert rewards.score(response, gold, "number") <= (rewards.predict(response, "number") is not None)


@pytest.mark.parametrize("response,gold,kind,right", OTHERS)
def test_other_types(response, gold, kind, right):
    assert rewards.score(response, gold, kind) is right


def test_number_tolerance_and_unknown_type():
    assert rewards.number("3.2", "3.14", rel_tol=0.05) and not rewards.number("3.2", "3.14")
    with pytest.raises(AssertionError, match="choose one of"):
        rewards.score("5", "5", "numeric")


@pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="the folder ../shared/data is not here")
def test_real_answers_score_themselves():
    for name in ("mathvision_reason_testmini_reasoning", "gsm8k_boxed"):
        docs = tasks.documents(name, SHARED)
        assert len(docs) == {"mathvision_reason_testmini_reasoning": 304, "gsm8k_boxed": 1319}[name]
        assert all(d["messages"][-1]["content"].count("<image>") == len(d["images"]) for d in docs)
        assert all(p.exists() for d in docs for p in d["images"])
        for d in docs:
            found = scorers.score(d["scorer"], f"<answer>{d['gold']}</answer>", d["gold"], d["metric"], **d["kw"])
            assert next(iter(found.numbers.values())) == 1, (d["id"], d["gold"], found)
    solutions = [json.loads(line)["answer"] for line in open(SHARED / "gsm8k" / "test.jsonl")]
    assert all(rewards.score(s, d["gold"], "number") for s, d in zip(solutions, docs))
    free = [s.replace("####", "so it is") for s in solutions]  # the last number of free text
    assert all(rewards.score(s, d["gold"], "number") for s, d in zip(free, docs))


# ---- a small world --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(["How many corners has the shape? three four red blue"] * 4, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    raw.add_special_tokens([AddedToken(f"<|{t}|>", special=True) for t in (
        "endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")])
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """Random weights."""
    return save(tokenizer, tmp_path_factory.mktemp("model") / "random")


def save(tokenizer: Path, folder: Path, says: str = "", seed: int = 0) -> Path:
    """A tiny checkpoint. `says`: its blocks do nothing and its head continues a prompt with these characters and
    stops."""
    tok = Tokenizer(tokenizer)
    model = Innovator.from_config(replace(PRESETS["tiny"], token_ids=tok.token_ids()), seed=seed)
    model.assets = tokenizer
    if says:
        chain = [*tok.encode("\n"), *(t for ch in says for t in tok.encode(ch)), tok.im_end]
        assert len(chain) == len(set(chain)), "each token decides the next"
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for before, after in zip(chain, chain[1:]):
                model.lm_head.weight[after] = model.model.embed_tokens.weight[before]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def world(tmp_path) -> Path:
    """A data root with eleven toy questions, in file order not sorted by length."""
    folder, rows = tmp_path / "data", []
    (folder / "heldout" / "images").mkdir(parents=True)
    for k in range(8):
        Image.new("RGB", (28 * (2 + k % 3), 56), (30 * k, 255 - 30 * k, 128)).save(folder / f"heldout/images/{k}.png")
        rows.append(dict(id=f"p{k}", question="How many corners has the shape?" + " really?" * (k % 4), options=None,
                         answer=str(3 + k % 2), answer_type="number", discipline=("mathematics", "physics")[k % 2],
                         template="x", image=f"images/{k}.png", chance=0.5))
    for k in range(3):
        rows.append(dict(id=f"t{k}", question="Which is red?" * (1 + k), options=["blue", "red"], answer="B",
                         answer_type="multiple-choice", discipline="general", template="y", image=None, chance=0.5))
    write_rows(folder, rows)
    return folder


def write_rows(world: Path, rows: list[dict]) -> None:
    (world / "heldout" / "toy.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, "rb")]


def run_here(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


def run_script(*args, nproc: int = 0, **options) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc else []
    return subprocess.run([sys.executable, *torchrun, str(ROOT / args[0]), *map(str, args[1:])], capture_output=True,
                          text=True, env=env | {"OMP_NUM_THREADS": "1"}, timeout=120, **options)


def final(out: Path, name: str = "toy") -> tuple[bytes, dict]:
    """All but times."""
    assert not list(out.glob("responses_*")) and not list(out.glob(".*.tmp"))
    results = json.loads((out / "results.json").read_text())
    return (out / f"samples_{name}.jsonl").read_bytes(), \
        {k: v for k, v in results.items() if k not in ("date", "total_evaluation_time_seconds")}


def texts(out: Path, name: str = "toy") -> list[str]:
    return [r["text"] for row in read_lines(out / f"samples_{name}.jsonl") for r in row["responses"]]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Sizes of the batches that a model was asked."""
    sizes, generate = [], TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate",
                        lambda self, docs, *rest: sizes.append(len(docs)) or generate(self, docs, *rest))
    return sizes


COMMON = ("--tasks", "toy", "--batch", "3", "--max-new-tokens", "6", "--device", "cpu")


# ---- evaluate -------------------------------------------------------------------------------------------------------
def test_scores_and_table(tokenizer, world, tmp_path, monkeypatch, capsys):
    """A model that always says 4 is right for half of the pictures."""
    four = save(tokenizer, tmp_path / "four", says="4")
    run_here(monkeypatch, four, *COMMON, "--data-root", world)
    rows, results = read_lines(four / "eval/samples_toy.jsonl"), json.loads((four / "eval/results.json").read_text())
    assert [r["id"] for r in rows] == [r["id"] for r in read_lines(world / "heldout/toy.jsonl")]
    assert all(r["responses"] == [{"text": "4", "tokens": 2, "truncated": False}] for r in rows)
    assert rows[1]["images"] == [str(world / "heldout/images/1.png")] and not rows[8]["images"]
    assert rows[8]["question"] == ("Which is red?\nA. blue\nB. red\n"
                                   "Answer with the option's letter from the given choices directly.")
    assert (rows[0]["numbers"], rows[1]["numbers"]) == ({"acc": 0.0, "strict": 0.0}, {"acc": 1.0, "strict": 0.0})
    assert (rows[1]["read"], rows[8]["read"], rows[8]["numbers"]) == ("4", None, {"acc": None})
    toy = results["results"]["toy"]
    assert {k: toy[k] for k in ("alias", "n", "unparsed", "truncated", "errors", "length", "chance")} == {
        "alias": "toy", "n": 11, "unparsed": 3 / 11, "truncated": 0, "errors": 0, "length": 2, "chance": 0.5}
    assert toy["by_group"] == {"mathematics": {"value": 0, "n": 4, "chance": 0.5},
                               "physics": {"value": 1, "n": 4, "chance": 0.5},
                               "general": {"value": 0, "n": 3, "chance": 0.5}}
    assert toy["acc,none"] == 4 / 11 and toy["acc_stderr,none"] == pytest.approx((4 / 11 * 7 / 11 / 10) ** 0.5)
    table = "|toy|1|0|acc|0.3636|0.1521|0.273|0.000|0.000|11|"
    assert table in capsys.readouterr().out and table in (four / "eval/results.md").read_text()
    assert results["higher_is_better"] == {"toy": {"acc": True}} and results["versions"] == {"toy": 1}
    assert results["n-samples"] == {"toy": {"original": 11, "effective": 11}} and results["n-shot"] == {"toy": 0}
    config = results["configs"]["toy"]
    assert config["generation_kwargs"]["max_new_tokens"] == 6 and config["metric"] == "acc"
    assert config["prompt"].endswith("<|vision_start|><|image_pad|>*4<|vision_end|>\nHow many corners has the shape?"
                                     "<|im_end|>\n<|im_start|>assistant\n")


def test_rescore_is_idempotent_and_reads_changed_answers(tokenizer, world, tmp_path, monkeypatch, capsys):
    rows = [r | {"answer": "5", "options": None, "answer_type": "number"}
            for r in read_lines(world / "heldout/toy.jsonl")]
    write_rows(world, rows)
    four = save(tokenizer, tmp_path / "four", says="4")
    run_here(monkeypatch, four, *COMMON, "--data-root", world)
    before, results = final(four / "eval"), (four / "eval/results.json").read_bytes()
    (four / "model.safetensors").unlink()
    for _ in range(2):
        run_here(monkeypatch, four, "--tasks", "toy", "--data-root", world, "--rescore")
        assert final(four / "eval") == before and (four / "eval/results.json").read_bytes() == results
    write_rows(world, [r | {"answer": "4"} for r in rows])
    run_here(monkeypatch, "--data-root", world, "--rescore", "--out", four / "eval")
    assert final(four / "eval")[1]["results"]["toy"]["acc,none"] == 1
    before = final(four / "eval")
    write_rows(world, [r | {"id": other["id"]} for r, other in zip(rows, rows[::-1])])
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, "--data-root", world, "--rescore", "--out", four / "eval")
    assert e.value.code == 3 and "documents were answered under another prompt" in capsys.readouterr().out
    assert final(four / "eval") == before
    with pytest.raises(common.UserError, match="has no bbh: run it again"):
        run_here(monkeypatch, "--data-root", world, "--rescore", "--out", four / "eval", "--tasks", "bbh")
    (four / "eval/results.json").write_text('{"results": {"to')
    with pytest.raises(common.UserError, match="results.json: damaged"):
        run_here(monkeypatch, "--data-root", world, "--rescore", "--out", four / "eval")


def test_batches_and_resume(checkpoint, world, tmp_path, monkeypatch, asked):
    """Rows do not change each other; killed in the middle of a line and resumed, the files are byte for byte the same,
    and only what is missing is generated."""
    def run(out, *more):
        run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / out, *more)
    run("straight")
    samples, results = final(tmp_path / "straight")
    run("alone", "--batch", "1")
    assert texts(tmp_path / "alone") == texts(tmp_path / "straight")

    del asked[:]
    generate = TorchEngine.generate
    def killed(*args):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(*args)
    monkeypatch.setattr(TorchEngine, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    part = tmp_path / "resumed/responses_toy.rank0.jsonl"
    part.write_bytes(part.read_bytes()[:-30])
    monkeypatch.setattr(TorchEngine, "generate", generate)
    run("resumed")
    assert final(tmp_path / "resumed") == (samples, results)
    assert asked == [3, 3, 3, 3, 2]  # the second batch lost a row and is generated whole again

    del asked[:]
    run("resumed")
    run("resumed", "--limit", "4")  # evenly spread: p0, p2, p5, t0; the other responses are kept
    assert [r["id"] for r in read_lines(tmp_path / "resumed/samples_toy.jsonl")] == ["p0", "p2", "p5", "t0"]
    run("resumed", "--samples", "toy:1,10")
    assert [r["id"] for r in read_lines(tmp_path / "resumed/samples_toy.jsonl")] == ["p1", "t2"]
    run("resumed")
    assert final(tmp_path / "resumed") == (samples, results) and asked == []
    run("resumed", "--no-resume")
    assert final(tmp_path / "resumed") == (samples, results) and sum(asked) == 11


def test_changed_checkpoint_or_budget_reads_no_old_response(checkpoint, world, tmp_path, monkeypatch, asked, capsys):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    model = Innovator.from_pretrained(other)
    with torch.no_grad():
        model.visual.merger.mlp[0].bias[0] += 1  # neither end of the file changes
    before = (other / "model.safetensors").read_bytes()
    model.save_pretrained(other)
    after = (other / "model.safetensors").read_bytes()
    assert before != after and before[:2 ** 16] == after[:2 ** 16] and before[-2 ** 16:] == after[-2 ** 16:]
    kept = "11 saved responses are of another checkpoint: they are kept and not read"
    for args, new, says in ((checkpoint, 11, False), (other, 11, True), (other, 0, True), (checkpoint, 0, True)):
        run_here(monkeypatch, args, *COMMON, "--data-root", world, "--out", tmp_path / "out")
        assert sum(asked) == new and (kept in capsys.readouterr().out) == says
        asked.clear()
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "out", "--max-new-tokens", "5")
    assert sum(asked) == 11 and "11 saved responses are of other prompts or settings" in capsys.readouterr().out


def test_one_two_and_four_processes(checkpoint, arc, tmp_path, monkeypatch):
    """Greedy, log-likelihoods, sampled."""
    for way, more in (("greedy", ("arc_easy", "--shots", "1")), ("sampled", ("--repeats", "2", "--temperature", "1"))):
        args = ("--tasks", "toy", *more, *COMMON[2:], "--data-root", arc, "--out")
        run_here(monkeypatch, checkpoint, *args, tmp_path / f"{way}1")
        for n in (2, 4):
            done = run_script("evaluate.py", checkpoint, *args, tmp_path / f"{way}{n}", "--threads", 1, nproc=n)
            assert done.returncode == 0, done.stderr[-2000:]
            for name in ("toy", "arc_easy")[:2 if way == "greedy" else 1]:
                assert final(tmp_path / f"{way}{n}", name) == final(tmp_path / f"{way}1", name)


def test_shuffled_images(checkpoint, world, tmp_path, monkeypatch):
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--shuffle-images", "--out", tmp_path / "a")
    group = {str(world / f"heldout/images/{k}.png"): ("mathematics", "physics")[k % 2] for k in range(8)}
    rows = read_lines(tmp_path / "a/samples_toy.jsonl")
    dealt = [r["images"][0] for r in rows if r["images"]]
    assert sorted(dealt) == sorted(group)
    for r in rows[:8]:
        assert group[r["images"][0]] == r["group"] and not r["images"][0].endswith(f"/{r['id'][1:]}.png")


def test_bad_images_are_counted_and_mended(checkpoint, world, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "good")
    good = {r["id"]: r for r in read_lines(tmp_path / "good/samples_toy.jsonl")}
    cut, gone = world / "heldout/images/2.png", world / "heldout/images/5.png"
    bytes_of = {p: p.read_bytes() for p in (cut, gone)}
    cut.write_bytes(bytes_of[cut][:60] + b"\0" * (len(bytes_of[cut]) - 60))
    gone.unlink()
    for _ in range(2):  # the second time nothing is left to generate
        run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"toy: error: p2, {cut}: image 0 cannot be decoded" in printed and "toy: error: p5" in printed
    assert "11 documents, 0 to answer" in printed
    rows = read_lines(tmp_path / "out/samples_toy.jsonl")
    toy = json.loads((tmp_path / "out/results.json").read_text())["results"]["toy"]
    assert toy["errors"] == 2 / 11 and toy["n"] == 11
    assert [r["id"] for r in rows if r["error"]] == ["p2", "p5"]
    assert all(r["numbers"] == {"acc": None, "strict": None} for r in rows if r["error"])
    assert all(r["responses"] == good[r["id"]]["responses"] for r in rows if not r["error"])
    for p, b in bytes_of.items():
        p.write_bytes(b)
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "out")
    assert final(tmp_path / "out") == final(tmp_path / "good")


def test_bad_questions_are_named_and_counted(checkpoint, world, tmp_path, monkeypatch, capsys):
    rows = read_lines(world / "heldout/toy.jsonl")
    rows[8] |= {"options": []}
    rows[9] |= {"answer": "E"}
    rows[10] |= {"question": "so long " * 3000}
    write_rows(world, rows)
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    for line in ("toy: error: 00008: toy.jsonl, row 9: no options",
                 "toy: error: t1: it cannot be scored: the right answer 'E' is none of", "toy: error: t2: prompt of "):
        assert line in printed
    assert json.loads((tmp_path / "out/results.json").read_text())["results"]["toy"]["errors"] == 3 / 11


def test_absent_data_and_user_errors(checkpoint, world, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, checkpoint, *COMMON[2:], "--tasks", "gsm8k_boxed", "toy", "--data-root", world,
                 "--out", tmp_path / "out")
    assert e.value.code == 3 and f"not evaluated: gsm8k_boxed needs gsm8k/test below {world} (openai/gsm8k, main, " \
        "test)" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out/results.json").read_text())["results"]) == ["toy"]
    run_here(monkeypatch, "--list", "--data-root", world)
    printed = capsys.readouterr().out
    assert f"{world}/heldout/toy.jsonl\n" in printed and "gsm8k needs gsm8k/test and gsm8k/train below" in printed
    monkeypatch.setitem(sys.modules, "vllm", None)
    for args, message in (((checkpoint, "--tasks", "toi"), "no task or group 'toi'"),
                          ((checkpoint, *COMMON, "--engine", "vllm"), "vLLM, .* is not installed: pip install"),
                          ((checkpoint,), "say what to evaluate"),
                          (("--tasks", "toy"), "usage:"), ((checkpoint, "--samples", "toy"), "give TASK:0,3"),
                          ((checkpoint, *COMMON, "--temperature", "-0.5"), "temperature -0.5"),
                          ((checkpoint, *COMMON, "--shots", "-3"), "shots -3"),
                          ((checkpoint, "--show", "text"), "--show text is a group"),
                          ((checkpoint, *COMMON, "--data-root", world, "--repeats", "2"),
                           "greedy responses are all the same"),
                          ((tmp_path / "nothing", *COMMON, "--data-root", world), "not found"),
                          ((checkpoint, *COMMON, "--data-root", world, "--rescore", "--out", tmp_path / "new"),
                           "not found")):
        with pytest.raises((AssertionError, common.UserError), match=message):
            run_here(monkeypatch, *args)


def test_documents_that_are_not_there_cost_no_other_task(checkpoint, world, arc, tmp_path, monkeypatch, capsys):
    shutil.copytree(arc, tmp_path / "both")
    shutil.copytree(world, tmp_path / "both", dirs_exist_ok=True)
    args = (checkpoint, *COMMON[2:], "--tasks", "toy", "arc_easy", "--data-root", tmp_path / "both", "--shots", "1",
            "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, *args, "--samples", "toy:11")
    printed = capsys.readouterr().out
    assert e.value.code == 3 and "not evaluated: --samples toy: its documents are 0 to 10" in printed
    def found(): return list(json.loads((tmp_path / "out/results.json").read_text())["results"])
    assert found() == ["arc_easy"]
    run_here(monkeypatch, *args)  # of other settings: said, not mixed
    assert "held arc_easy, of another checkpoint or with other settings" in capsys.readouterr().out
    assert found() == ["toy", "arc_easy"]
    before = (tmp_path / "out/results.json").read_bytes()
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, checkpoint, *COMMON[2:], "--tasks", "bbh", "--data-root", world, *args[-2:])
    assert e.value.code == 3 and "nothing was evaluated" in capsys.readouterr().out
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_unpublished_answers_are_no_errors(checkpoint, world, tmp_path, monkeypatch, capsys):
    """Such a task ends well, has no score, and an average of the others says that it is left out."""
    write_rows(world, [r | {"answer": None} for r in read_lines(world / "heldout/toy.jsonl")])
    def toy(row, i): return tasks.TASKS["toy"].load(row | {"answer": "x", "options": None}, i) | {"gold": None}
    monkeypatch.setitem(tasks.TASKS, "mmbench_en_test", replace(tasks.TASKS["toy"], load=toy))
    run_here(monkeypatch, checkpoint, *COMMON[2:], "--tasks", "mmbench_en_test", "--data-root", world,
             "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "the right answers to 11 documents are not published" in printed and "error:" not in printed
    result = json.loads((tmp_path / "out/results.json").read_text())["results"]["mmbench_en_test"]
    assert result["errors"] == 0 and result["acc,none"] is None
    scored = {name: {"acc,none": 0.5, "acc_stderr,none": 0.1, "n": 4} for name in tasks.GROUPS["general"].members}
    assert numbers.group_results(scored)["general"]["score,none"] == 0.5
    scored["mmbench_en_test"] = result
    found = numbers.group_results(scored)
    assert "general" not in found and found["general (without mmbench_en_test)"]["score,none"] == 0.5
    assert found["general (without mmbench_en_test)"]["n"] == 4 * (len(tasks.GROUPS["general"].members) - 1)


def test_a_judge_decides_where_rules_read_nothing(checkpoint, world, tmp_path, monkeypatch, asked, capsys):
    """An OpenAI-compatible server says CORRECT to every second request; then there is none."""
    said = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said.append(body["messages"][0]["content"])
            reply = {"choices": [{"message": {"content": ("CORRECT", "WRONG")[len(said) % 2]}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass
    monkeypatch.setitem(tasks.TASKS, "toy", replace(tasks.TASKS["toy"], judge=True))
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    args = (*COMMON, "--data-root", world, "--out", tmp_path, "--judge", f"http://127.0.0.1:{server.server_port}/v1",
            "--judge-model", "any")
    def found(): return json.loads((tmp_path / "results.json").read_text())["results"]["toy"]
    run_here(monkeypatch, checkpoint, *args)
    rows, n = read_lines(tmp_path / "samples_toy.jsonl"), len(said)
    assert n > 3 and "<right>" in said[0]
    right = [r["numbers"]["acc"] == 1.0 for r in rows if r["judge"] == ["judge"]]
    assert len(right) == n and sum(right) == n // 2 and found()["judged"] == n / 11 and found()["judge_failed"] == 0
    again = (tmp_path / "samples_toy.jsonl").read_bytes()
    run_here(monkeypatch, "--rescore", *args)  # verdicts are kept
    assert (tmp_path / "samples_toy.jsonl").read_bytes() == again and len(said) == n
    server.shutdown()
    shutil.rmtree(tmp_path / "judge")
    capsys.readouterr()
    run_here(monkeypatch, "--rescore", *args[:-4], "--judge", "http://127.0.0.1:9/v1", "--judge-model", "any")
    assert found()["judged"] == 0 and found()["judge_failed"] == n
    assert f"toy: the judge did not decide on {n} responses, the rule did: rule, no judge" in capsys.readouterr().out
    run_here(monkeypatch, "--rescore", *args[:-4])
    assert "judged" not in found() and found()["acc,none"] == 0 and sum(asked) == 11


def test_a_missing_library_loses_no_response(checkpoint, world, tmp_path, monkeypatch, asked, capsys):
    args = (checkpoint, *COMMON, "--data-root", world, "--out", tmp_path)
    score = scorers.score
    def lacks(*args, **kw): raise common.UserError("this needs rdkit")
    monkeypatch.setattr(scorers, "score", lacks)
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, *args)
    assert e.value.code == 3 and "toy: this needs rdkit; its responses are kept" in capsys.readouterr().out
    monkeypatch.setattr(scorers, "score", score)
    run_here(monkeypatch, *args)
    assert sum(asked) == 11 and json.loads((tmp_path / "results.json").read_text())["results"]["toy"]["n"] == 11


def test_show(checkpoint, world, monkeypatch, capsys):
    run_here(monkeypatch, checkpoint, "--show", "toy", "--data-root", world)
    printed = capsys.readouterr().out
    assert "<|im_start|>user\n<|vision_start|><|image_pad|>*4<|vision_end|>\nHow many corners" in printed
    assert f"{world}/heldout/images/0.png: 56 x 56" in printed and "right answer '3'" in printed


# ---- evaluate: log-likelihoods, few-shot prompts, samples ------------------------------------------------------------
def add(world: Path, name: str, rows: list[dict]) -> None:
    path = world / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def arc_rows(n: int = 6) -> list[dict]:
    """Every third question has an option of several tokens."""
    options = [["three", "four", "red"], ["blue", "red", "three"], ["red", "a blue shape", "three corners"]]
    return [{"id": f"q{k}", "question": f"What has the shape?{' really' * k}", "answerKey": "ABC"[k % 3],
             "choices": {"text": options[k % 3], "label": ["A", "B", "C"]}} for k in range(n)]


@pytest.fixture
def arc(world) -> Path:
    add(world, "arc/ARC-Easy/test.jsonl", arc_rows())
    add(world, "arc/ARC-Easy/train.jsonl", arc_rows(4))
    return world


ARC = ("--tasks", "arc_easy", "--shots", "2", "--batch", "4", "--device", "cpu")


def test_log_likelihoods_equal_unpacked_ones(checkpoint, arc, tmp_path, monkeypatch):
    """Options of one token are read from the context's last row, the others branch off it: as model.logits has them."""
    run_here(monkeypatch, checkpoint, *ARC, "--data-root", arc, "--out", tmp_path)
    model, tok = Innovator.from_pretrained(checkpoint), Tokenizer(checkpoint)
    rows, counts = read_lines(tmp_path / "samples_arc_easy.jsonl"), set()
    docs = tasks.documents("arc_easy", arc, 2)
    assert len(rows) == 6 and docs[0]["pairs"][0][0].count("Question:") == 3
    for doc, row in zip(docs, rows):
        sums = []
        for (context, option), (logp, characters, greedy) in zip(doc["pairs"], row["loglikelihood"], strict=True):
            before, both = tok.encode(context), tok.encode(context + option)
            counts.add(len(both) - len(before))
            logits = model.logits(both)[len(before) - 1:-1]
            target = torch.tensor(both[len(before):])
            sums.append(logits.log_softmax(-1).gather(1, target[:, None]).sum().item())
            assert logp == pytest.approx(sums[-1], abs=1e-4) and characters == len(option) - 1
            assert greedy == (logits.argmax(-1) == target).all().item()
        normed = [s / (len(o) - 1) for s, (_, o) in zip(sums, doc["pairs"])]
        assert row["numbers"] == {"acc_norm": float(normed.index(max(normed)) == doc["gold"]),
                                  "acc": float(sums.index(max(sums)) == doc["gold"])}
        assert row["read"] == doc["options"][normed.index(max(normed))] and row["responses"] == []
    assert 1 in counts and max(counts) > 2
    assert list(json.loads((tmp_path / "results.json").read_text())["results"]["arc_easy"])[1] == "acc_norm,none"


def test_token_boundary_moves_spaces_to_the_option(tokenizer):
    doc = {"error": None, "pairs": [("the shape ", "three"), ("the shape", " three"), ("", "red")]}
    tok = Tokenizer(tokenizer)
    first, second, third = evaluate.pairs_of(doc, False, tok, 99)
    assert first == second == (tok.encode("the shape"), tok.encode(" three"))
    assert third == ([tok.pad], tok.encode("red"))
    with pytest.raises(evaluate.BadRow, match="exceed the context 3"):
        evaluate.pairs_of(doc, False, tok, 3)


def test_bad_options_are_errors(checkpoint, arc, tmp_path, monkeypatch, capsys):
    rows = arc_rows()
    rows[1]["choices"] = {"text": [], "label": []}
    rows[2]["answerKey"] = "D"
    add(arc, "arc/ARC-Easy/test.jsonl", rows)
    run_here(monkeypatch, checkpoint, *ARC, "--data-root", arc, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "00001: test.jsonl, row 2: the right answer B is none of the options []" in printed
    assert "00002: test.jsonl, row 3: the right answer D is none of the options ['A', 'B', 'C']" in printed
    done = read_lines(tmp_path / "samples_arc_easy.jsonl")
    assert len(done) == 6 and [bool(r["error"]) for r in done] == [False, True, True, False, False, False]


def test_a_plain_prompt_is_continued_until_a_stop_string(tokenizer, world, tmp_path, monkeypatch):
    (world / "bbh/cot-prompts").mkdir(parents=True)
    (world / "bbh/sums.json").write_text(json.dumps({"examples": [{"input": "2 + 2?", "target": "4"}] * 2}))
    (world / "bbh/cot-prompts/sums.txt").write_text("canary\n-----\nAdd.\n\n" + "\n\n".join(
        f"Q: {k} + 0?\nA: Let's think step by step. So the answer is {k}." for k in range(3)))
    model = save(tokenizer, tmp_path / "model", says="4Q:7")
    run_here(monkeypatch, model, "--tasks", "bbh", "--data-root", world, "--device", "cpu", "--max-new-tokens", "9")
    rows = read_lines(model / "eval/samples_bbh.jsonl")
    assert [r["responses"] for r in rows] == [[{"text": "4", "tokens": 3, "truncated": False}]] * 2  # it ended early
    results = json.loads((model / "eval/results.json").read_text())
    assert results["results"]["bbh"]["exact,none"] == 1 and results["n-shot"] == {"bbh": 3}
    assert results["configs"]["bbh"]["prompt"].startswith("Add.\n\nQ: 0 + 0?\nA: Let's think step by step.\nSo")
    assert results["configs"]["bbh"]["prompt"].endswith("Q: 2 + 2?\nA: Let's think step by step.\n")
    run_here(monkeypatch, model, "--tasks", "bbh", "--data-root", world, "--device", "cpu", "--max-new-tokens", "9",
             "--chat", "--out", tmp_path / "chat")
    prompt = json.loads((tmp_path / "chat/results.json").read_text())["configs"]["bbh"]["prompt"]
    assert "<|im_start|>user\nAdd.\n\nQ: 0" in prompt and prompt.endswith("<|im_start|>assistant\n")
    assert texts(tmp_path / "chat", "bbh") == ["4Q:7"] * 2


def test_several_samples(checkpoint, world, tmp_path, monkeypatch):
    """avg@k and pass@k are those of the responses as they were saved."""
    model = Innovator.from_pretrained(checkpoint)
    with torch.no_grad():  # digits become likely, so that some answers are right
        for token in "34":
            model.lm_head.weight[Tokenizer(checkpoint).encode(token)[0]] *= 40
    model.assets = checkpoint
    model.save_pretrained(tmp_path / "model")
    run_here(monkeypatch, tmp_path / "model", *COMMON[:4], "--max-new-tokens", "1", "--device", "cpu", "--data-root",
             world, "--repeats", "4", "--temperature", "1", "--samples", "toy:0,1,2,3,4,5,6,7", "--out", tmp_path)
    rows = read_lines(tmp_path / "samples_toy.jsonl")
    right = [[r["text"] == row["gold"] for r in row["responses"]] for row in rows]
    assert all(len(r) == 4 for r in right) and len({str(r) for r in right}) > 1
    toy = json.loads((tmp_path / "results.json").read_text())["results"]["toy"]
    assert toy["avg@4,none"] == pytest.approx(sum(map(sum, right)) / 32)
    assert toy["pass@4,none"] == sum(map(any, right)) / 8 and toy["n"] == 8
    assert [r["numbers"]["acc"] or 0 for r in rows] == [sum(r) / 4 for r in right]


def test_groups_average_and_stand_beside_the_published(capsys):
    def result(v, e, n): return {"alias": "", "acc,none": v, "acc_stderr,none": e, "unparsed": 0.0, "truncated": 0.0,
                                 "errors": 0.0, "n": n}
    results = {"rxnbench_vqa_en": result(0.5, 0.1, 10), "rxnbench_vqa_zh": result(0.7, 0.2, 30),
               "agieval_choice": result(0.5, 0.1, 30), "agieval_math": result(0.2, 0.1, 10),
               "agieval_gaokao-mathcloze": result(0.0, 0.0, 10)}
    groups = numbers.group_results(results)
    assert list(groups) == ["rxnbench_vqa", "agieval"]
    assert groups["rxnbench_vqa"]["score,none"] == pytest.approx(0.6)
    assert groups["rxnbench_vqa"]["score_stderr,none"] == pytest.approx((0.05 ** 2 + 0.1 ** 2) ** 0.5)
    assert groups["agieval"]["score,none"] == pytest.approx(0.34) and groups["agieval"]["n"] == 50  # by size
    assert groups["agieval"]["score_stderr,none"] == pytest.approx((0.06 ** 2 + 0.02 ** 2) ** 0.5)
    text = numbers.tables({"results": results, "groups": groups, "versions": dict.fromkeys(results, 1),
                            "n-shot": dict.fromkeys(results, 0)}, with_published=True)
    assert "|rxnbench_vqa_en|50.00|82.36|79.80|" in text and "|agieval|0.3400|0.0632|50|" in text


def test_a_full_disk_loses_nothing(checkpoint, world, tmp_path, monkeypatch):
    args = ("--data-root", world, *COMMON)
    run_here(monkeypatch, checkpoint, *args, "--out", tmp_path / "good")
    full = run_script("evaluate.py", checkpoint, *args, "--out", tmp_path / "out",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)))
    assert full.returncode == 2 and "responses_toy.rank0.jsonl: File too large; finished responses" in full.stderr
    assert full.stderr.count("Traceback") == 0 and (tmp_path / "out/responses_toy.rank0.jsonl").stat().st_size == 1500
    done = run_script("evaluate.py", checkpoint, *args, "--out", tmp_path / "out")
    assert done.returncode == 0 and "11 documents, 11 to answer" not in done.stdout
    assert final(tmp_path / "out") == final(tmp_path / "good")


@pytest.mark.skipif(not (SHARED / "mathvision").exists(), reason="the folder ../shared/data is not here")
def test_mathvision_killed_anywhere_and_resumed(checkpoint, tmp_path, monkeypatch):
    """All 304 questions with their pictures; SIGKILL after some batches."""
    args = (checkpoint, "--tasks", "mathvision", "--data-root", SHARED, "--max-new-tokens", "4", "--min-pixels", "3136",
            "--max-pixels", "20000", "--device", "cpu", "--threads", "1", "--out")
    name = "mathvision_reason_testmini_reasoning"
    run_here(monkeypatch, *args, tmp_path / "good")
    process = subprocess.Popen([sys.executable, str(ROOT / "evaluate.py"), *map(str, args), str(tmp_path / "out")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, wanted = tmp_path / f"out/responses_{name}.rank0.jsonl", random.randrange(1, 250)
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n{") >= wanted):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = part.read_bytes().count(b"}\n") if part.exists() else 304
    assert before >= wanted
    run_here(monkeypatch, *args, tmp_path / "out")
    samples, results = final(tmp_path / "good", name)
    assert final(tmp_path / "out", name) == (samples, results) and results["results"][name]["n"] == 304
    assert results["results"][name]["errors"] == 0 and len(samples.splitlines()) == 304


@pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="the folder ../shared/data is not here")
def test_real_tasks_run(checkpoint, tmp_path, monkeypatch):
    run_here(monkeypatch, checkpoint, "--tasks", "mathvision", "gsm8k_boxed", "--data-root", SHARED,
             "--out", tmp_path / "out", "--limit", "3", "--max-new-tokens", "4", "--min-pixels", "3136",
             "--max-pixels", "50000", "--device", "cpu")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert list(results) == ["mathvision_reason_testmini_reasoning", "gsm8k_boxed"]
    assert all((r["n"], r["truncated"], r["errors"]) == (3, 1, 0) for r in results.values())
    with pytest.raises(SystemExit) as e:  # 2048 new tokens do not fit the context: nothing but errors is a failure
        run_here(monkeypatch, checkpoint, "--tasks", "mathvision", "--data-root", SHARED, "--out", tmp_path / "none",
                 "--limit", "2")
    assert e.value.code == 1


# ---- chat -----------------------------------------------------------------------------------------------------------
def test_chat(tokenizer, world, tmp_path, monkeypatch):
    says = save(tokenizer, tmp_path / "says", says="zé€😀")
    picture = world / "heldout/images/0.png"
    done = run_script("chat.py", says, "What", "is", "it?", "--device", "cpu", "--image", picture, picture)
    assert (done.returncode, done.stdout) == (0, "zé€😀\n"), done.stderr
    done = run_script("chat.py", says, "--device", "cpu",
                      input=f"Which?\n\n/image {picture}\nAnd this?\n/new\nAgain?\n")
    assert (done.returncode, done.stdout) == (0, "zé€😀\n" * 3), done.stderr
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:40])
    done = run_script("chat.py", says, "--image", broken, "What?", "--device", "cpu")
    assert (done.returncode == 2 and f"error: {broken}: not a readable picture" in done.stderr
            and done.stderr.count("\n") == 1)
    for args, message in (((tmp_path, "Hello"), "no checkpoint there"),
                          ((says, "x " * 3000), "the model's context is 2048"),
                          ((says, "--image", world, "What?"), "not a readable picture"), (("--seed", "1"), "usage:"),
                          ((says, "Hello", "--top-p", "0"), "--top-p 0.0 must lie in")):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, args)])
        with pytest.raises((AssertionError, common.UserError), match=message):
            chat.main()


def test_chat_words():
    assert chat.split_words(["What", "--seed", "1", "is", "--image", "a.png", "b.JPG", "it?"]) == \
        (["--seed", "1", "--image", "a.png", "b.JPG"], ["What", "is", "it?"])


@pytest.fixture
def server(checkpoint):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = launch("chat.py", checkpoint, "--serve", port, "--device", "cpu", "--max-new-tokens", 6, background=True)
    assert f"http://127.0.0.1:{port}/v1" in process.stdout.readline()
    yield f"http://127.0.0.1:{port}/v1"
    process.send_signal(signal.SIGTERM)  # as Ctrl-C, which programs started in the background of a shell ignore
    assert process.wait(20) == 0


def ask(server: str, body) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(
                f"{server}/chat/completions", json.dumps(body).encode()), timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def test_server_answers_as_evaluate_does(server, checkpoint, world, tmp_path, monkeypatch):
    """Requests that come at once, with pictures in their places; answers are evaluate.py's."""
    run_here(monkeypatch, checkpoint, *COMMON, "--data-root", world, "--out", tmp_path / "out")
    documents = evaluate.documents("toy", world)
    rows = {row["id"]: row["responses"][0] for row in read_lines(tmp_path / "out/samples_toy.jsonl")}

    def asked(d):
        (head, *rest), parts = d["messages"][-1]["content"].split("<image>"), []
        for picture, text in zip(d["images"], rest, strict=True):
            data = base64.b64encode(Path(picture).read_bytes()).decode()
            parts += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                      {"type": "text", "text": text}]
        return ask(server, {"model": "any", "seed": 3, "temperature": 0, "messages": [
            *d["messages"][:-1], {"role": "user", "content": [{"type": "text", "text": head}, *parts]}]})
    with ThreadPoolExecutor(99) as pool:
        for d, (status, reply) in zip(documents * 9, pool.map(asked, documents * 9)):
            choice, = reply["choices"]
            assert (status, choice["message"]["content"], reply["usage"]["completion_tokens"],
                    choice["finish_reason"] == "length") == (200, *rows[d["id"]].values())


def test_server_samples_stops_and_refuses(server):
    hello = {"messages": [{"role": "user", "content": "<image> Which is red?"}]}
    _, whole = ask(server, hello)
    text = whole["choices"][0]["message"]["content"]
    assert len(text) > 1 and whole["choices"][0]["finish_reason"] == "length"
    _, cut = ask(server, hello | {"stop": ["never said", text[-1]]})
    assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == \
        (text[:text.find(text[-1])], "stop")
    _, several = ask(server, hello | {"n": 4, "temperature": 2.0, "max_completion_tokens": 9})
    assert len({c["message"]["content"] for c in several["choices"]}) == 4
    assert several["usage"]["completion_tokens"] <= 36
    picture = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
    def user(text): return {"role": "user", "content": text}
    for body, message in (({}, "messages"), ([], "list"), (hello | {"stream": True}, "stream"),
                          (hello | {"n": 2}, "n 1 to 128, and 1 at temperature 0"),
                          (hello | {"temperature": float("nan")}, "temperature is 0 or"),
                          (hello | {"max_tokens": float("inf")}, "OverflowError"),
                          (hello | {"stop": [5]}, "stop a string"),
                          (hello | {"max_tokens": 5000}, "exceed the context 2048"), (hello | {"top_p": 0}, "top_p"),
                          ({"messages": [{"role": "assistant", "content": "Hi"}]}, "user last"),
                          ({"messages": [user("a"), user("b")]}, "in turns"), ({"messages": []}, "in turns"),
                          ({"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]}, "in turns"),
                          ({"messages": [user([picture])]}, "message 0: a part is neither")):
        status, reply = ask(server, body)
        assert status == 400 and message in reply["error"]["message"]
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    for length in ("abc", "-1", str(10 ** 12)):
        with socket.create_connection((host, int(port)), 20) as s:
            s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
            assert s.makefile("rb").readline().startswith(b"HTTP/1.1 411")
    long = json.dumps(hello | {"n": 64, "temperature": 2.0, "max_tokens": 30}).encode()
    for _ in range(3):  # who asks and leaves stops nobody else
        with socket.create_connection((host, int(port)), 20) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(long), long))
    assert ask(server, hello)[1]["choices"] == whole["choices"]


def test_server_that_cannot_start(checkpoint, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        for args, message in ((("--serve", s.getsockname()[1]), "Address already in use"),
                              (("What?", "--serve", "1"), "takes no question"), (("--serve", "-1"), "is no port")):
            monkeypatch.setattr(sys, "argv", ["chat.py", str(checkpoint), *map(str, args)])
            with pytest.raises((AssertionError, common.UserError), match=message):
                chat.main()
