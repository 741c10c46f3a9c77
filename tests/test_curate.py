"""curate.py: the rule by hand; interrupted, resumed and on two processes the same rows; bad rows; wrong flags."""
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, launch, needs_shared
from test_rl import policy  # noqa: F401, a fixture

import curate
from data import Tokenizer
from train_rl import Prompts

EVERY = ("--gap", 0, "--low", -1, "--high", 2)  # a model with random weights is hardly ever right


def arguments(policy, pool, out, *more):
    return ("curate.py", "select", "--model", policy, "--data", pool, "--out", out, "--group", 4, "--rollout-batch", 12,
            "--max-new-tokens", 6, "--plain", "--verifiers", 1, *more)


def select(policy, pool, out, *more, **how):
    return launch(*arguments(policy, pool, out, *more), **how)


@pytest.fixture(scope="module")
def straight(policy, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("select") / "straight"
    return out, select(policy, toy / "rl", out, *EVERY).stdout


def table(out): return pq.read_table(out / "kept.parquet")


def jsonl(file): return [json.loads(line) for line in file.read_text().splitlines() if line]


@pytest.mark.parametrize("accuracies, verdict, mean, pass_1, pass_n", [
    ([0, 0, 0, 0], "too hard", 0, 0, 0),
    ([1, 0, 0, 0], "kept", 0.25, 0.25, 1),
    ([1, 1, 0, 0], "kept", 0.5, 0.5, 1),
    ([1, 1, 1, 0], "too easy", 0.75, 0.75, 1),
    ([1, 1, 1, 1], "too easy", 1, 1, 1),
    ([1, 1, 1, 0, 0], "too easy", 0.6, 0.6, 1),  # the band is open at both ends
    ([1, None, 0, None], "kept", 0.5, 0.5, 1),  # errors count nowhere
    ([None, None], "bad row", 0, 0, 0),
    ([], "bad row", 0, 0, 0),
    ([0.4, 0.3, 0.2, 0.3], "small gap", 0.3, 0, 0),  # similarities: none is right
    ([0.5, 0.55, 0.6, 0.55], "small gap", 0.55, 1, 1),  # all are
    ([0.9, 0.4, 0.4, 0.3], "kept", 0.5, 0.25, 1),
    ([0.5, 0.5, 0.5, 0.4], "kept", 0.475, 0.75, 1)])  # a gap of exactly 0.25
def test_rule_by_hand(accuracies, verdict, mean, pass_1, pass_n):
    found, *values = curate.judged(curate.Select(model="", data=[""], out=""), accuracies)
    assert found == verdict and values == pytest.approx([mean, pass_1, pass_n])


def test_every_row_is_scored_and_what_is_kept_is_what_came_in(straight, toy):
    out, said = straight
    pool, kept, scores = pq.read_table(toy / "rl"), table(out), curate.read_scores(out)
    assert sorted(scores) == list(range(len(pool))) and all(len(s["accuracies"]) == 4 for s in scores.values())
    assert len({s["length"] for s in scores.values()}) > 1
    assert kept.column_names[:8] == pool.column_names and all(kept[c].equals(pool[c]) for c in pool.column_names)
    means = [np.mean(scores[i]["accuracies"]) for i in range(len(pool))]
    assert kept["avg_reward"].to_pylist() == pytest.approx(means)
    numbers = next(line.split()[1:] for line in said.splitlines() if line.startswith("all "))
    assert numbers == [str(len(pool)), "0", "0", "0", "0", str(len(pool)), "1.000"]
    assert "next: python train_rl.py" in said
    assert (out / "histogram.png").stat().st_size > 10_000 and (out / "bad_rows.jsonl").read_text() == ""


def test_killed_and_resumed_and_two_processes_equal_straight(policy, toy, straight, tmp_path):
    def same(out):
        assert table(out).equals(table(straight[0]))
        assert curate.read_scores(out) == curate.read_scores(straight[0])
    select(policy, toy / "rl", tmp_path / "two", *EVERY, nproc=2)
    assert len(list((tmp_path / "two").glob("scores.rank_*.jsonl"))) == 2
    same(tmp_path / "two")
    out, file = tmp_path / "killed", tmp_path / "killed/scores.rank_0.jsonl"
    process = launch(*arguments(policy, toy / "rl", out, *EVERY), background=True)
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "kept.parquet").exists()
    with open(file, "r+b") as f:  # as if the kill had come in the middle of a line
        f.truncate(file.stat().st_size - 40)
    done = curate.read_scores(out)
    assert 0 < len(done) < len(table(straight[0])) and not file.read_text().endswith("\n")
    assert "already holds scores" in select(policy, toy / "rl", out, *EVERY, check=False).stderr
    select(policy, toy / "rl", out, *EVERY, "--resume", nproc=2)  # on another number of processes
    same(out)


def test_other_thresholds_choose_anew_without_sampling(policy, toy, straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "again")
    before = (out / "scores.rank_0.jsonl").read_bytes()
    said = select(policy, toy / "rl", out, "--high", 1e-9, "--resume").stdout
    assert (out / "scores.rank_0.jsonl").read_bytes() == before
    assert len(table(out)) == 0 and "no prompt was kept" in said


def test_train_rl_reads_what_is_kept(policy, toy, straight, tmp_path):
    c = SimpleNamespace(data=[str(straight[0] / "kept.parquet")], min_pixels=3136, max_pixels=262144, plain=False,
                        max_new_tokens=6)
    tok = Tokenizer(policy)
    kept, pool = Prompts(c, tok, 4096), Prompts(SimpleNamespace(**{**vars(c), "data": [str(toy / "rl")]}), tok, 4096)
    for i in range(len(kept.data)):
        (row, doc), (given, want) = kept.read(i), pool.read(i)
        assert {k: row[k] for k in given} == given
        assert doc.ids.tolist() == want.ids.tolist() and np.array_equal(doc.pixels, want.pixels)
    launch("train_rl.py", "--recipe", "grpo", "--model", policy, "--data", straight[0] / "kept.parquet", "--out",
           tmp_path / "rl", "--prompts", 2, "--group", 2, "--max-new-tokens", 4, "--steps", 1, "--plain")


@needs_shared
def test_bad_rows_are_listed_and_the_rest_goes_on(policy, tmp_path):
    broken, pool, out = SHARED / "data/formats/broken", tmp_path / "pool", tmp_path / "out"
    pool.mkdir()
    good = dict(problem="<image>\nHow many?", answer=["3"], problem_type="counting", answer_type="number",
                source="made", prompt_type="default", images=[str(broken / "ok.jpg")])
    text = good | dict(problem="How many?", images=[])
    rows = {"": good, " ": text | dict(answer=3), "  ": text | dict(format_guidance="Say a number."),
            "image file": good | dict(images=["nothing.jpg"]),
            "cannot be opened": good | dict(images=[str(broken / "bad_lines.jsonl")]),
            "cannot be decoded": good | dict(images=[str(broken / "undecodable.jpg")]),
            "image 0 cannot be decoded": good | dict(images=[str(broken / "truncated.jpg")]),
            "aspect ratio": good | dict(images=[str(broken / "aspect_300_to_1.jpg")]),
            "image of 1 x 1": good | dict(images=[str(broken / "one_pixel.jpg")]),
            "0 <image> tag(s)": good | dict(problem="How many?"), "the answer is empty": text | dict(answer=[""]),
            "answer type 'riddle'": text | dict(answer_type="riddle"),
            "answer type None": text | dict(answer_type=None),
            "no problem": dict(question="How many?", answer="3", answer_type="number"),
            "no answer_type": dict(text="a"),
            "exceed the context": text | dict(problem="How many? " * 5000),
            "not verified: AssertionError": text | dict(answer=["no tags"], answer_type="html-code")}
    (pool / "rows.jsonl").write_text("".join(json.dumps({"id": f"row {k}"} | r) + "\n"
                                             for k, r in enumerate(rows.values())) + '{"id": "half')
    shutil.copy(broken / "truncated.parquet", pool)
    said = select(policy, pool, out, *EVERY, "--max-pixels", 20000).stdout
    bad = {b.get("at", b["row"]): b for b in jsonl(out / "bad_rows.jsonl")}
    for k, reason in enumerate(rows):
        assert (f"line {k + 1}" in bad) == bool(reason.strip()), (reason, bad.get(f"line {k + 1}"))
        assert not reason.strip() or reason in bad[f"line {k + 1}"]["reason"]
    assert "not valid JSON" in bad[f"line {len(rows) + 1}"]["reason"] and "not a readable parquet" in bad["-"]["reason"]
    assert "damaged files 1" in said
    kept = table(out).to_pylist()
    assert [k["id"] for k in kept] == ["row 0", "row 1", "row 2"] and kept[1]["answer"] == ["3"]
    assert kept[2]["format_guidance"] == "Say a number." and kept[1]["images"] == []
    assert kept[0]["images"][0]["bytes"] == (broken / "ok.jpg").read_bytes()


@needs_shared
def test_real_rows_of_the_published_format(policy, tmp_path):
    pool = SHARED / "data/formats/rl_172k"
    said = select(policy, pool, tmp_path / "x", "--max-pixels", 10000, "--group", 2, "--rollout-batch", 64).stdout
    assert "chebi20" in said and len(curate.read_scores(tmp_path / "x")) == 155


@pytest.mark.parametrize("text, given", [
    ("two responses or more", dict(group=1)), ("samples one response", dict(temperature=0)),
    ("must lie below", dict(low=0.7)), ("between 0 and 1", dict(gap=2)), ("between 0 and 1", dict(engine_memory=1.5))])
def test_wrong_settings(text, given):
    with pytest.raises(AssertionError, match=text):
        curate.Select(model="", data=[""], out="", **given)


def test_wrong_input_ends_in_one_line(policy, toy, straight, tmp_path):
    def says(text, *more, pool=toy / "rl", out=tmp_path / "x"):
        done = select(policy, pool, out, *more, check=False)
        assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr, done.stderr
    says("did you mean --gap", "--gapp", 1)
    says("lies inside --data", out=toy / "rl/selected")
    says("another --temperature (1.0, now 0.5)", "--resume", "--temperature", 0.5, out=straight[0])
    says("another --data", "--resume", pool=toy / "align", out=straight[0])
    other = shutil.copytree(policy, tmp_path / "other")
    with open(other / "model.safetensors", "r+b") as f:  # one weight
        f.seek(-1, os.SEEK_END)
        f.write(b"\x01")
    says("another --model", "--resume", "--model", other, out=straight[0])
