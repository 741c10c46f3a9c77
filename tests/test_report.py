"""report.py: the paired interval by hand, clusters, refusals; one safe page of all there is, with what is absent."""
import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from conftest import launch
from PIL import Image

import report
import tasks

A, B = [1, 0, 0, 1, 0, None, 0, 1], [1, 1, 1, 1, 0, 1, 0, 0]


def row(i, value, **more):
    return {"id": f"d{i}", "key": "k", "group": "even" if i % 2 == 0 else "odd", "cluster": f"d{i}", "gold": "A",
            "prompt_hash": f"p{i}", "responses": [{"text": f"answer {i}", "tokens": 10 + i, "truncated": False}],
            "loglikelihood": [], "numbers": {"acc": value}, "read": "A" if value else None, "error": None, "images": [],
            "question": f"Question {i}?"} | more


def folder(path, rows, task="toy", tail="", **info):
    path.mkdir(parents=True, exist_ok=True)
    (path / f"samples_{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    old = json.loads((path / "results.json").read_text())["results"] if (path / "results.json").exists() else {}
    value = sum(r["numbers"]["acc"] or 0 for r in rows) / len(rows)
    new = {"alias": task, "acc,none": value, "acc_stderr,none": 0.1, "unparsed": 0.125, "truncated": 0.0, "errors": 0.0,
           "length": 13.5, "n": len(rows)}
    (path / "results.json").write_text(json.dumps({"results": old | {task: new}} | info))
    return path


def both(tmp_path, a=A, b=B, task="toy", more=({}, {})):
    return [folder(tmp_path / name, [row(i, v, **extra) for i, v in enumerate(values)], task)
            for name, values, extra in (("a", a, more[0]), ("b", b, more[1]))]


def compared(a, b, *more):
    out = launch("report.py", "compare", a, b, *more).stdout
    return json.loads((b / "compare.json").read_text())["tasks"], out


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.links = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "background")]
        assert not any(k.startswith("on") for k, _ in attrs)
        self.open += [] if tag in ("meta", "img", "br", "rect", "line") else [tag]

    def handle_endtag(self, tag):
        assert tag in ("rect", "line") or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def handle_decl(self, decl):
        assert decl == "doctype html"


def page(*folders, more=()):
    done = launch("report.py", "html", *folders, *more)
    return Page((folders[0] / "report.html").read_text()), done.stdout


def test_paired_interval_by_hand(tmp_path):
    found, out = compared(*both(tmp_path))
    r = found["toy"]  # differences 0 1 1 0 0 1 0 -1: mean 1/4, sum of squares 4 - 8/16 = 3.5, variance 3.5 / 7
    assert (r["a"], r["b"], r["difference"], r["won"], r["lost"], r["n"]) == (3 / 8, 5 / 8, 0.25, 3, 1, 8)
    assert r["stderr"] == pytest.approx(math.sqrt(0.5 / 8)) == pytest.approx(0.25) and r["z"] == pytest.approx(1)
    assert [r["low"], r["high"]] == pytest.approx([0.25 - 1.959964 * 0.25, 0.25 + 1.959964 * 0.25])
    assert r["p"] == pytest.approx(2 * (1 + 4) / 16)  # McNemar: at most 1 of 4 heads, both sides
    assert "|toy|acc|8|37.5|62.5|+25.0|-24.0 to +74.0|3|1|0.62|0|" in out and "next: python report.py html" in out


def test_clusters_by_hand():
    """Sums within clusters of d - 1/4: (-1/4 + 3/4), (3/4 - 1/4), (-1/4 + 3/4), (-1/4 - 5/4)"""
    mean, stderr = report.paired([0, 1, 1, 0, 0, 1, 0, -1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert mean == 0.25 and stderr == pytest.approx(math.sqrt(4 / 3 * (3 * 0.5 ** 2 + 1.5 ** 2)) / 8)
    assert report.paired([1.0], [0]) == (1.0, None)


@pytest.mark.parametrize("won, lost, p", [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (0, 5, 1 / 16), (3, 3, 1),
                                          (8, 2, 0.109375)])
def test_sign_test(won, lost, p):
    assert report.sign_test(won, lost) == pytest.approx(p)
    assert 0 < report.sign_test(5000, 4800) < 0.05


def test_clusters_in_a_comparison(tmp_path):
    a, b = both(tmp_path)
    for path in (a, b):
        rows = [json.loads(line) | {"cluster": i // 2} for i, line in enumerate(open(path / "samples_toy.jsonl"))]
        folder(path, rows)
    r = compared(a, b)[0]["toy"]
    assert r["clusters"] == 4 and r["test"] == "z" and r["stderr"] == pytest.approx(math.sqrt(4) / 8)
    assert r["p"] == pytest.approx(math.erfc(abs(r["z"]) / math.sqrt(2)))


def test_identical_folders_differ_by_zero(tmp_path):
    a, b = both(tmp_path, b=A)
    r = compared(a, b)[0]["toy"]
    assert [r[k] for k in ("difference", "stderr", "low", "high", "won", "lost", "p", "only_a", "only_b")] == [
        0, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("task", ["vstar_bench", "mmstar", "mmbench_en_dev", "smol_property_prediction-esol"])
def test_other_averages_have_a_bootstrap(tmp_path, task):
    how = tasks.TASKS[task].aggregate
    a, b = both(tmp_path, [*A] * 6, [*B] * 6, task)
    for path in (a, b):
        rows = [json.loads(line) for line in open(path / f"samples_{task}.jsonl")]
        for i, r in enumerate(rows):
            r["cluster"] = i // 2 if how == "all_in_group" else r["id"]
            r["group"] = r["group"] if i < 40 else "even"
            r["numbers"] = {"squared_error": r["numbers"]["acc"]} if how == "rmse" else r["numbers"]
        (path / f"samples_{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    r = compared(a, b, "--resamples", 200)[0][task]
    assert r["average"] == ("mean" if how == "mean" else how)
    if how == "rmse":  # errors of 1, not read once in 8, against 5 of 8: (share read) * exp(-root of the mean)
        assert r["a"] == pytest.approx(7 / 8 * math.exp(-math.sqrt(3 / 7)))
        assert r["b"] == pytest.approx(math.exp(-math.sqrt(5 / 8))) and (r["won"], r["lost"]) == (12, 12)
    if how == "all_in_group":  # pairs: a has none right in both, b (1, 1) and (1, 1)
        assert (r["a"], r["b"]) == (0, 0.5) and r["p"] < 0.001
    assert r["low"] <= r["difference"] <= r["high"] and r["stderr"] > 0


@pytest.mark.parametrize("field", ["prompt_hash", "gold"])
def test_other_questions_are_refused(tmp_path, field):
    a, b = both(tmp_path, more=({}, {field: "other"}))
    done = launch("report.py", "compare", a, b, check=False)
    assert done.returncode == 2 and "samples_toy.jsonl: 8 of 8 documents have another prompt" in done.stderr
    assert done.stderr.count("\n") == 1 and not (b / "compare.json").exists()


def test_another_version_of_a_task_is_refused(tmp_path):
    a, b = (folder(tmp_path / name, [row(0, 1)], versions={"toy": k}) for k, name in enumerate("ab"))
    done = launch("report.py", "compare", a, b, check=False)
    assert done.returncode == 2 and "b/results.json: toy has version 1" in done.stderr and "--rescore" in done.stderr


def test_tasks_of_one_side_or_without_a_score_are_named(tmp_path):
    a, b = both(tmp_path)
    folder(a, [row(0, 1)], "gsm8k")
    for path in (a, b):
        info = json.loads((path / "results.json").read_text())
        info["results"]["mmbench_en_test"] = {"acc,none": None}
        (path / "results.json").write_text(json.dumps(info))
    found, out = compared(a, b)
    assert list(found) == ["toy"] and "without a score: gsm8k, mmbench_en_test" in out


def test_broken_lines_and_documents_of_one_side(tmp_path):
    a = folder(tmp_path / "a", [row(i, 1) for i in range(6)], tail='[1]\n{"no": "id"}\n{"id": "d9", "numb')
    b = folder(tmp_path / "b", [row(i, 0) for i in range(2, 9)])
    r, out = compared(a, b)
    assert (r["toy"]["n"], r["toy"]["only_a"], r["toy"]["only_b"], r["toy"]["broken"]) == (4, 2, 3, 3)
    assert "|0|4|0.12|5|" in out and "3 broken lines were skipped" in out
    assert "3 broken lines were skipped" in "".join(page(a)[0].text)


def test_untrusted_text_is_only_text(tmp_path):
    evil = '</pre></details><script>alert(1)</script><img src=x onerror="alert(2)">\ud800\x00&amp;"\''
    a = folder(tmp_path / "a", [
        row(0, 0, id=evil, group=evil, gold=evil, read=evil, error=None, question=evil, images=[evil],
            responses=[{"text": evil, "tokens": evil, "truncated": True}]), row(1, 0, error=evil, read=None)],
        checkpoint=f"runs/{evil.replace('/', '')}$x^$", config={evil: evil}, git_hash=evil)
    found, _ = page(a)
    assert [t for t, _ in found.tags].count("script") == 1 and found.tags[-1][0] == "script"
    assert "".join(found.text).count("alert(1)") >= 8 and all(v.startswith("data:image/") for v in found.links)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "content" in a)
    digest = base64.b64encode(report.hashlib.sha256(report.SCRIPT.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_page_of_two_checkpoints(tmp_path):
    Image.new("RGBA", (900, 300), (255, 0, 0, 128)).save(tmp_path / "wide.png")
    (tmp_path / "bad.png").write_text("no picture")
    images = ["wide.png", "bad.png", "gone.png"]
    a, b = (folder(tmp_path / name, [row(i, v, images=images, cluster=None) for i, v in enumerate(values)],
                   root=str(tmp_path), checkpoint=f"/somewhere/else/{name}/step_00000007", config={
                       "dtype": "bf16", "data_root": "/somewhere", "tok": "/abs"}, groups={"math": {"score,none": 0.5}})
            for name, values in (("a", A), ("b", B)))
    found, out = page(a, b, more=("--published", "--failures", 4))
    text = " ".join(found.text)
    cards = [attrs for tag, attrs in found.tags if attrs.get("class") == "card"]
    assert len(cards) == 4 and "4 of 6 documents with a failure" in text and "/somewhere" not in text
    assert {k for c in cards for k in c["data-k"].split()} <= {"0:wrong", "0:unparsed", "1:wrong"}
    assert any(c["data-k"] == "0:unparsed" for c in cards) and "a/step_00000007" in text and "Question 5?" in text
    assert "37.5" in text and "62.5" in text and "bf16" in text and "Innovator-VL-8B-Instruct" in text
    assert "[picture bad.png: cannot be read]" in text and "[picture gone.png: not found]" in text
    pictures = [base64.b64decode(v.split(",")[1]) for v in found.links if v.startswith("data:image/jpeg")]
    assert len(pictures) == 4 and Image.open(io.BytesIO(pictures[0])).size == (320, 107)
    assert Image.open(io.BytesIO(pictures[0])).getpixel((9, 9))[1] > 120  # the half transparent red lies on white
    plot = base64.b64decode(next(v for v in found.links if "svg+xml" in v).split(",")[1]).decode()
    assert plot.startswith("<?xml") and "mean response length" in re.sub(r"\s+", " ", plot)
    assert sum(t == "rect" for t, _ in found.tags) == 4  # two domains, two checkpoints
    assert "wrote" in out and f"next: python report.py compare {a} {b}" in out


def test_domains_stand_above_their_parts():
    rows = {str(k): dict(group=g, lower=False, value=v) for k, (g, v) in
            enumerate((("Science/Math", 1.0), ("Science/Biology", 0.0), ("Art", 1.0)))}
    text = re.sub(r"<[^>]*>", " ", report.domains("mmmu_val", ["a"], [rows]))
    found = re.findall(r"(Science(?:/\w+)?|Art)\s+a\s+([\d.]+)\s+(\d)", text)
    assert sorted(found) == [("Art", "100.0", "1"), ("Science", "50.0", "2"), ("Science/Biology", "0.0", "1"),
                             ("Science/Math", "100.0", "1")]


def test_what_is_absent_is_tolerated(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"results": {"toy": {"acc,none": 0.5}, "none": {"alias": "x"},
                                                                   "lost": {"acc,none": None, "length": 3}}}))
    (tmp_path / "samples_toy.jsonl").write_text('{"id": 1}\n{"id": 2, "numbers": {"acc": 0}, "error": null}\n')
    found, _ = page(tmp_path)
    assert sum(a.get("class") == "card" for _, a in found.tags) == 2 and "50.0" in " ".join(found.text)


def test_unpublished_answers_are_no_failures():
    assert report.failure({"error": "the right answer is not published", "value": None}) == []
    done = {"error": None, "value": 0.0, "lower": True, "responses": []}
    assert report.failure(done) == [] and report.failure(done | {"value": 0.3}) == ["wrong"]
    assert report.rank(done) > report.rank(done | {"value": 0.3}) > report.rank(done | {"value": None})


@pytest.mark.parametrize("words, said", [
    (("html",), "write: python report.py html OUT"), (("compare", "a"), "write: python report.py compare A B"),
    (("html", "nothing"), "nothing/results.json: not found"), (("show",), "show: choose one of html, compare"),
    (("html", "broken"), "broken/results.json: not what evaluate.py writes"),
    (("compare", "a", "a", "--tasks", "gsm8k"), "do not both have gsm8k"),
    (("compare", "a", "empty"), "samples_toy.jsonl: no document of"),
    (("compare", "a", "other"), "other/results.json: no task with a score"),
    (("html", "a", "--failures", "-1"), "--failures -1 must not be negative"),
    (("html", "a", "--out", "gone/x.html"), "No such file or directory: ")])
def test_mistakes_are_one_line(tmp_path, words, said):
    folder(tmp_path / "a", [row(0, 1)])
    folder(tmp_path / "empty", [row(0, 1)])
    (tmp_path / "empty" / "samples_toy.jsonl").unlink()
    folder(tmp_path / "other", [row(0, 1)], "gsm8k")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("[1, 2]")
    paths = {"a", "nothing", "broken", "empty", "other", "gone/x.html"}
    done = launch("report.py", *[tmp_path / w if w in paths and w != words[0] else w for w in words], check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
