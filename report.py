"""Reports on results of evaluate.py: a page to read and browse, and a paired comparison of two checkpoints.

    python report.py html runs/instruct/eval                             # scores, domains, lengths, failures
    python report.py html runs/instruct/eval runs/rl/eval --published    # side by side, with the papers' rows
    python report.py compare runs/instruct/eval runs/rl/eval             # is the second better, and how surely?

html     one file without links. A failure is an error or less than the full score; of more than --failures of a task
         all kinds and checkpoints are shown alike, the worst first, else in an order made of their ids. Responses are
         untrusted: all text is escaped, and the page's policy allows no script but its filter.
compare  on the documents that both have; it stops where one was not asked alike. The difference of means has the
         standard error of the paired differences, summed within clusters (Miller, arXiv:2411.00640); other averages:
         bootstrap over clusters. p: exact sign test of documents won and lost (McNemar) if every cluster is one
         document, else from z.

Broken lines of samples_TASK.jsonl are skipped and counted. A row's first number is the metric, as in results.json.
"""
import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import common
import scorers
import tasks
from common import UserError
from results import levels, main_number

MACHINE = {"checkpoint", "model", "data_root", "root", "out", "device", "threads"}  # settings of no interest elsewhere
COLOURS = ("#2a7fc0", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#7a68d6")
KINDS = ("wrong", "unparsed", "truncated", "error")
NORMAL = statistics.NormalDist()


@dataclass
class Html:
    out: str = ""  # the page; empty: report.html in the first folder
    published: bool = False  # the papers' rows beside ours
    failures: int = 50  # shown of each task


@dataclass
class Compare:
    out: str = ""  # the numbers; empty: compare.json in the second folder
    tasks: list[str] = field(default_factory=list)  # only these; empty: all that both have
    resamples: int = 1000  # of the bootstrap


# ---- results --------------------------------------------------------------------------------------------------------
def number(x) -> float | None:
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


class Run:
    def __init__(self, folder: str):
        self.folder, path = Path(folder), Path(folder) / "results.json"
        if not path.exists():
            raise UserError(f"{path}: not found; evaluate.py writes it into its --out")
        try:
            self.info = json.loads(path.read_bytes())
            self.results = self.info["results"]
            main = {t: main_number(r) for t, r in (self.results | (self.info.get("groups") or {})).items()}
            self.scores = {t: (metric, number(value), number(error)) for t, (metric, value, error) in main.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}: not what evaluate.py writes ({type(e).__name__}: {e})") from e
        self.name = "/".join(Path(str(self.info.get("checkpoint") or folder)).parts[-2:])

    def rows(self, task: str) -> tuple[dict[str, dict], int]:
        """By id, with what may be absent filled in, and how many lines are broken."""
        path, rows, broken = self.folder / f"samples_{task}.jsonl", {}, 0
        for line in path.open("rb") if path.exists() else ():
            try:
                if line.strip():
                    row = {k: v for k, v in json.loads(line).items() if v is not None}
                    row = dict(group="", cluster=row["id"], error=None, numbers={}, responses=[], images=[]) | row
                    row["responses"] = [{"text": "", "tokens": 0, "truncated": False} | r for r in row["responses"]]
                    metric = next(iter(row["numbers"].keys()), "")
                    row["value"], row["lower"] = number(row["numbers"].get(metric)), metric == "squared_error"
                    rows[str(row["id"])] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                broken += 1
        return rows, broken


def failure(row: dict) -> list[str]:
    """Kinds of failure, the most telling first; none for a full score, and none where no answer is published."""
    if row["error"] is not None:
        return [] if "not published" in str(row["error"]) else ["error"]
    if row["value"] is not None and (row["value"] <= 0 if row["lower"] else row["value"] >= 1):
        return []
    cut = any(r["truncated"] for r in row["responses"])
    return ["truncated"] * cut + ["unparsed" if row["value"] is None else "wrong"]


def rank(row: dict) -> float:
    """Larger is better."""
    return -math.inf if row["value"] is None else -row["value"] if row["lower"] else row["value"]


# ---- the page -------------------------------------------------------------------------------------------------------
STYLE = """:root{color-scheme:light dark;--b:#fff;--f:#1c1e21;--d:#6a7078;--l:#d9dde2;--p:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--b:#16181b;--f:#e4e6e9;--d:#9aa2ac;--l:#363b42;--p:#202328}}
body{background:var(--b);color:var(--f);font:14px/1.5 system-ui,sans-serif;max-width:1300px;
margin:2em auto;padding:0 1em}.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2em .5em;border-bottom:1px solid var(--l);text-align:right}td{white-space:nowrap}.t{text-align:left}
.dim{color:var(--d)}.card{border:1px solid var(--l);border-radius:8px;padding:.7em 1em;margin:1em 0}
.card p{margin:.3em 0}
pre{background:var(--p);padding:.6em;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:22em;
overflow:auto;unicode-bidi:isolate;margin:.4em 0}summary{cursor:pointer}img{max-width:100%;margin-right:.5em}
select{font:inherit;margin-right:1em}svg line{stroke:var(--f)}""" + "".join(
    f".c{k}{{fill:{colour};color:{colour}}}" for k, colour in enumerate(COLOURS))
SCRIPT = """const [c,t,k,n]=['c','t','k','n'].map(i=>document.getElementById(i));
const all=[...document.querySelectorAll('.card')];function show(){let m=0;for(const e of all){
const ok=(!t.value||e.dataset.t===t.value)&&e.dataset.k.split(' ').some(
x=>(!c.value||x.startsWith(c.value+':'))&&(!k.value||x.endsWith(':'+k.value)));e.hidden=!ok;m+=ok}
n.textContent=m+' of '+all.length}for(const s of [c,t,k])s.onchange=show;show()"""


def esc(text, limit: int = 0, front: int = 0) -> str:
    """Safe as text and as an attribute; of a longer text its front and its end."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if limit and len(text) > limit:
        text = f"{text[:front]}\n[… {len(text) - limit:,} characters …]\n{text[len(text) - limit + front:]}"
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text.replace("\r\n", "\n"))
    return html.escape(text, quote=True)


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Of cells that are HTML already; the first `left` columns are texts."""
    def line(cells, tag): return "".join(f'<{tag}{" class=t" * (k < left)}>{c}</{tag}>' for k, c in enumerate(cells))
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{line(head, 'th')}</tr>{body}</table></div>"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def bar(colour: int, value: float, stderr: float) -> str:
    """A share and its 95 % interval."""
    x, low, high = (200 * min(max(v, 0), 1) for v in (value, value - 1.96 * stderr, value + 1.96 * stderr))
    return (f'<svg width="200" height="12"><rect class="c{colour % len(COLOURS)}" width="{x:.1f}" height="12"/>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6"/></svg>')


def picture(places: list[Path]) -> str:
    """The first that is there, at most 320 px wide, as JPEG inside an <img>; a note if it cannot be read."""
    path = next((p for p in places if p.is_file()), places[0])
    try:
        with Image.open(path) as image:
            image.thumbnail((320, 4000))
            image, file = image.convert("RGBA"), io.BytesIO()
            Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(file, "JPEG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f"<p class=dim>[picture {esc(path.name)}: {'cannot be read' if path.is_file() else 'not found'}]</p>"
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def overview(runs: list[Run], names: list[str]) -> str:
    """Weights, commit, date and the settings that mean something on another machine."""
    told = [{"weights": str(run.info.get("weights") or "–")[:12]} | (run.info.get("config") or {})
            | {k: run.info.get(k) for k in ("git_hash", "date", "total_evaluation_time_seconds")} for run in runs]
    keys = [k for k in dict.fromkeys(k for t in told for k in t) if k not in MACHINE and any(t.get(k) for t in told)]
    def cell(v): return esc(v, 100, 12) if v not in (None, "", []) and not os.path.isabs(str(v)) else "–"
    return table(["", *names], [[esc(k), *(cell(t.get(k)) for t in told)] for k in keys], 1 + len(runs))


def scores(runs: list[Run], names: list[str]) -> str:
    rows = []
    for name in dict.fromkeys([*(t for run in runs for t in run.results), *(t for run in runs for t in run.scores)]):
        for k, run in enumerate(runs):
            if name in run.scores:
                (metric, value, stderr), r = run.scores[name], run.results.get(name)
                shares = [percent(number(r.get(x))) if r else "" for x in ("chance", "unparsed", "truncated", "errors")]
                length = f"{number(r.get('length')) or 0:.0f}" if r else ""
                rows.append([esc(name) if r else f"<b>{esc(name)}</b>", names[k], esc(metric), percent(value),
                             percent(stderr), *shares, length, esc(r.get("n", "–")) if r else ""])
    return table(["task or <b>group</b>", "checkpoint", "metric", "score %", "± stderr", "chance %",
                  "unparsed %", "truncated %", "errors %", "tokens", "n"], rows, 3)


def beside_published(runs: list[Run], names: list[str]) -> str:
    parts = ["<h2>Beside the published results</h2><p class=dim>Percent. Prompts and the reading of answers differ in "
             "places: see the departures in tasks.py and scorers.py.</p>"]
    none = ("", None, None)
    for title in dict.fromkeys(g.table for g in tasks.GROUPS.values() if g.table):
        models, published = tasks.published(title)
        rows = [[esc(name), *(percent(run.scores.get(name, none)[1]) for run in runs), *(f"{v:.1f}" for v in row)]
                for name, row in published.items() if any(name in run.scores for run in runs)]
        parts += [f"<h3>{esc(title)}</h3>" + table(["task", *names, *map(esc, models)], rows)] if rows else []
    return "".join(parts)


def domains(task: str, names: list[str], parts: list[dict], most: int = 60) -> str:
    rows, values = [r for part in parts for r in part.values() if r["group"]], defaultdict(list)
    sizes = Counter(name for r in rows for name in levels(str(r["group"])))
    if len(sizes) < 2 or any(r["lower"] for r in rows):
        return ""
    for k, r in ((k, r) for k, part in enumerate(parts) for r in part.values()):
        for name in levels(str(r["group"])):
            values[name, k].append(r["value"])
    lines = []
    for group, k in ((g, k) for g, _ in sizes.most_common(most) for k in range(len(parts)) if values[g, k]):
        m = scorers.mean(values[group, k])
        lines.append([esc(group), names[k], bar(k, m["value"], m["stderr"] or 0), percent(m["value"]), str(m["n"])])
    return (f"<details open><summary><b>{esc(task)}</b>: {min(len(sizes), most)} of {len(sizes)} domains</summary>"
            + table(["domain", "checkpoint", "", "%", "n"], lines, 3) + "</details>")


def efficiency(runs: list[Run]) -> str:
    """Score against mean response length, a point for each task and checkpoint: an <img> for light and dark pages."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator
    def plain(text):  # no mathematics, not hidden from the legend, nothing that fonts refuse
        return "".join(x if x.isprintable() else "?" for x in text[-40:]).lstrip("_").replace("$", r"\$")
    points = defaultdict(list)  # task: (checkpoint, tokens, score)
    for k, run in enumerate(runs):
        for task, r in run.results.items():
            if (length := number(r.get("length"))) and (value := run.scores[task][1]) is not None:
                points[task].append((k, length, 100 * value))
    if not points:
        return ""
    grey = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), "#808890")
    with plt.rc_context(grey | {"svg.hashsalt": "report", "font.size": 9}):
        fig, ax = plt.subplots(figsize=(8.5, 5), constrained_layout=True)
        lengths = [p[1] for own in points.values() for p in own]
        middle = (max(lengths) * min(lengths)) ** 0.5
        for task, own in points.items():
            ax.plot(*zip(*[p[1:] for p in own]), color="#808890", linewidth=0.7, zorder=1)
            if len(points) <= 40:  # more names than that hide the points
                right = own[-1][1] > middle  # its name goes to the left of it
                ax.annotate(plain(task), own[-1][1:], (-5 if right else 5, 4), ha="right" if right else "left",
                            textcoords="offset points", fontsize=7)
        for k, run in enumerate(runs):
            own = [p[1:] for every in points.values() for p in every if p[0] == k]
            ax.scatter(*zip(*own or [((), ())]), s=30, label=plain(run.name), color=COLOURS[k % len(COLOURS)])
        ax.set(xlabel="mean response length (tokens)", ylabel="score (%)", xscale="log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.grid(alpha=0.25)
        ax.legend(framealpha=0)
        fig.savefig(file := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
        plt.close(fig)
    uri = base64.b64encode(file.getvalue()).decode()
    return f'<h2>Score and response length</h2><img alt="" src="data:image/svg+xml;base64,{uri}">'


def failures(task: str, runs: list[Run], names: list[str], parts: list[dict], count: int) -> list[str]:
    """Cards of documents, with what each checkpoint that was asked the same said."""
    asked, place = defaultdict(list), Counter()
    for k, part in enumerate(parts):
        for i, row in part.items():
            asked[i, row.get("prompt_hash"), *map(str, row["images"])].append((k, row, failure(row)))
    failed = {key: min(rank(row) for _, row, kinds in own if kinds) for key, own in asked.items()
              if any(kinds for *_, kinds in own)}
    turn, cards = {}, []
    for key in sorted(failed, key=lambda key: (failed[key], hashlib.sha1(ascii(key).encode()).digest())):
        place.update(own := [(k, kinds[0]) for k, _, kinds in asked[key] if kinds])
        turn[key] = min(place[kind] for kind in own)
    for key in sorted(turn, key=turn.get)[:count]:
        (k, row, _), said = asked[key][0], []
        for j, r, kinds in asked[key]:
            text = "\n\n=== ".join(str(x["text"]) for x in r["responses"])
            tokens = " + ".join(str(x["tokens"]) for x in r["responses"][:8])
            said.append(f"<p>{names[j]}: <b>{' '.join(kinds) or 'right'}</b>, read: {esc(r.get('read', '–'), 300)} "
                        f"{esc(r['error'] or '')}</p><details><summary>response, {esc(tokens)} tokens</summary>"
                        f"<pre>{esc(text, 9000, 3000)}</pre></details>")
        root, kept = Path(str(runs[k].info.get("root"))), runs[k].folder / "images"
        images = "".join(picture([Path(p), root / p, kept / Path(p).name]) for p in map(str, row["images"][:8]))
        marks = " ".join(f"{j}:{kind}" for j, _, kinds in asked[key] for kind in kinds)
        prompt = row.get("question") or row.get("prompt") or ""
        cards.append(f'<div class=card data-t="{esc(task)}" data-k="{marks}"><b>{esc(task)}</b> {esc(key[0])} '
                     f'<span class=dim>{esc(row["group"])}</span><div>{images}</div><pre>{esc(prompt, 3000)}</pre>'
                     f'<p>right answer: {esc(row.get("gold", "–"), 1000, 500)}</p>{"".join(said)}</div>')
    count = f"<p class=dim>{esc(task)}: {len(cards)} of {len(failed)} documents with a failure</p>"
    return [*cards, count] if failed else []


def page(folders: list[str], c: Html) -> None:
    assert c.failures >= 0, f"--failures {c.failures} must not be negative"
    runs, bars, cards, broken = [Run(folder) for folder in folders], [], [], 0
    for run, same in zip(runs, [[r.name for r in runs].count(run.name) > 1 for run in runs]):
        run.name += f" ({run.folder.name})" if same else ""
    names = [f'<span class="c{k % len(COLOURS)}">■</span> {esc(run.name)}' for k, run in enumerate(runs)]
    every = list(dict.fromkeys(t for run in runs for t in run.results))
    for task in every:
        parts, skipped = zip(*(run.rows(task) for run in runs))
        broken += sum(skipped)
        bars.append(domains(task, names, parts))
        cards += failures(task, runs, names, parts, c.failures)
    filters = [("c", "all checkpoints", [(k, run.name) for k, run in enumerate(runs)]),
               ("t", "all tasks", zip(every, every)), ("k", "all kinds", [(kind, kind) for kind in KINDS])]
    options = [(i, "".join(f'<option value="{esc(v)}">{esc(t)}</option>' for v, t in [("", title), *choices]))
               for i, title, choices in filters]
    key = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    text = "".join([
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content=\""
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{key}'\"><title>Evaluation"
        f"</title><style>{STYLE}</style></head><body><h1>Evaluation</h1>", overview(runs, names), "<h2>Scores</h2>",
        scores(runs, names), beside_published(runs, names) if c.published else "", efficiency(runs),
        "<h2>Domains</h2>" if any(bars) else "", *bars, "<h2>Failures</h2><p>",
        *(f"<select id={i}>{inside}</select>" for i, inside in options), "<span id=n></span></p>", *cards,
        f"<p class=dim>{broken} broken lines were skipped</p>", f"<script>{SCRIPT}</script></body></html>"])
    out = Path(c.out) if c.out else runs[0].folder / "report.html"
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    print(f"wrote {out} ({out.stat().st_size / 2 ** 20:.1f} MiB; {broken} broken lines were skipped)\n"
          f"next: python report.py compare {folders[0]} {folders[1] if len(folders) > 1 else 'OTHER_OUT'}")


# ---- the comparison -------------------------------------------------------------------------------------------------
def paired(differences: list[float], clusters: list) -> tuple[float, float | None]:
    """Mean and its standard error, where what is in one cluster may go together."""
    n, mean, sums = len(differences), statistics.fmean(differences), Counter()
    for d, cluster in zip(differences, clusters):
        sums[cluster] += d - mean
    m = len(sums)
    return mean, (m / (m - 1) * sum(s * s for s in sums.values())) ** 0.5 / n if m > 1 else None


def sign_test(won: int, lost: int) -> float:
    """Two-sided p of so uneven a split, or a worse one, if both were equally likely."""
    term, total = 1, 0
    for k in range(min(won, lost) + 1):  # term = C(won + lost, k)
        total, term = total + term, term * (won + lost - k) // (k + 1)
    return min(1.0, 2 * total / 2 ** (won + lost))


def combined(how: str, rows: list[dict], clusters: list) -> float:
    values = [row["value"] for row in rows]
    if how == "group_mean":
        return scorers.group_mean(values, [row["group"] for row in rows])["value"]
    if how == "all_in_group":
        return scorers.all_in_group(values, clusters)["value"]
    return scorers.rmse(values)["score"] if how == "rmse" else scorers.mean(values)["value"]


def bootstrap(how: str, pairs: list[tuple[dict, dict]], clusters: list, times: int) -> tuple[float, float, float]:
    """Standard deviation and 95 % interval of the difference over clusters drawn with replacement."""
    members, rng, found = defaultdict(list), random.Random(1234), []
    for pair, cluster in zip(pairs, clusters):
        members[cluster].append(pair)
    for _ in range(times):
        drawn = [(k, pair) for k, own in enumerate(rng.choices([*members.values()], k=len(members))) for pair in own]
        a, b = (combined(how, [pair[side] for _, pair in drawn], [k for k, _ in drawn]) for side in (0, 1))
        found.append(b - a)
    found.sort()
    return statistics.pstdev(found), found[int(0.025 * times)], found[math.ceil(0.975 * times) - 1]


def compare_task(task: str, a: Run, b: Run, times: int) -> dict:
    (rows_a, broken_a), (rows_b, broken_b) = a.rows(task), b.rows(task)
    both = [i for i in rows_a if i in rows_b]
    file = b.folder / f"samples_{task}.jsonl"
    if not both:
        raise UserError(f"{file}: no document of {a.folder / file.name}; a comparison needs the rows of both")
    if other := [i for i in both if any(rows_a[i].get(k) != rows_b[i].get(k) for k in ("prompt_hash", "gold"))]:
        raise UserError(f"{file}: {len(other)} of {len(both)} documents have another prompt or right answer than in "
                        f"{a.folder} ({', '.join(other[:3])}): ask alike, or choose --tasks")
    versions = [(run.info.get("versions") or {}).get(task) for run in (a, b)]
    if versions[0] != versions[1]:
        raise UserError(f"{b.folder / 'results.json'}: {task} has version {versions[1]}, in {a.folder} {versions[0]}: "
                        "score both again with evaluate.py --rescore, or choose --tasks")
    pairs = [(rows_a[i], rows_b[i]) for i in both]
    clusters = [str(x["cluster"]) for x, _ in pairs]
    how = tasks.TASKS[task].aggregate if task in tasks.TASKS else "mean"
    how = how if how in ("group_mean", "all_in_group", "rmse") else "mean"  # We-Math's main number is a mean, too
    va, vb = (combined(how, [p[side] for p in pairs], clusters) for side in (0, 1))
    won, lost = (sum(rank(p[side]) > rank(p[1 - side]) for p in pairs) for side in (1, 0))
    if how == "mean":
        difference, stderr = paired([(y["value"] or 0) - (x["value"] or 0) for x, y in pairs], clusters)
        low, high = (stderr if stderr is None else difference + NORMAL.inv_cdf(q) * stderr for q in (0.025, 0.975))
    else:
        (stderr, low, high), difference = bootstrap(how, pairs, clusters, times), vb - va
    z, exact = difference / stderr if stderr else None, how == "mean" and len(set(clusters)) == len(both)
    p = sign_test(won, lost) if exact else 1.0 if difference == 0 else z and 2 * NORMAL.cdf(-abs(z))
    return dict(metric=a.scores[task][0], average=how, n=len(both), clusters=len(set(clusters)), a=va, b=vb,
                difference=difference, stderr=stderr, low=low, high=high, won=won, lost=lost, z=z, p=p,
                test="sign" if exact else "z", only_a=len(rows_a) - len(both), only_b=len(rows_b) - len(both),
                broken=broken_a + broken_b, unchecked=sum("prompt_hash" not in x for x, _ in pairs))


def compare(folders: list[str], c: Compare) -> None:
    assert c.resamples >= 100, f"--resamples {c.resamples} must be at least 100"
    a, b = map(Run, folders)
    lack = [t for t in c.tasks if t not in a.results or t not in b.results]
    assert not lack, f"{folders[0]} and {folders[1]} do not both have {', '.join(lack)}"
    names = c.tasks or [t for t in a.results if t in b.results and None not in (a.scores[t][1], b.scores[t][1])]
    if not names:
        raise UserError(f"{b.folder / 'results.json'}: no task with a score is also in {a.folder / 'results.json'}")
    found = {task: compare_task(task, a, b, c.resamples) for task in names}
    print(f"A: {a.name} ({a.folder})\nB: {b.name} ({b.folder})\n\n|task|metric|n|A|B|B - A|95 % interval|won|lost|p|"
          f"not in both|\n|{'---|' * 11}")
    for task, r in found.items():
        interval = "–" if r["low"] is None else f"{100 * r['low']:+.1f} to {100 * r['high']:+.1f}"
        p, alone = "–" if r["p"] is None else f"{r['p']:.2g}", r["only_a"] + r["only_b"]
        print(f"|{task}|{r['metric']}|{r['n']}|{percent(r['a'])}|{percent(r['b'])}|{100 * r['difference']:+.1f}|"
              f"{interval}|{r['won']}|{r['lost']}|{p}|{alone}|")
    sure = sum(r["low"] is not None and r["low"] * r["high"] > 0 for r in found.values())
    print(f"\n{sure} of {len(found)} intervals are without 0; by chance about {0.05 * len(found):.1f} would be")
    for key, text in (("broken", "broken lines were skipped"),
                      ("unchecked", "documents have no prompt_hash: whether they were asked alike is unknown")):
        if count := sum(r[key] for r in found.values()):
            print(f"{count} {text}")
    if left := sorted((a.results.keys() | b.results.keys()) - set(names)):
        print(f"not compared, as left out, in one only or without a score: {', '.join(left)}")
    out = Path(c.out) if c.out else b.folder / "compare.json"
    a, b = ({"folder": str(run.folder), "name": run.name, "weights": run.info.get("weights")} for run in (a, b))
    common.write_json(out, {"a": a, "b": b, "commit": common.commit(), "tasks": found})
    print(f"wrote {out}\nnext: python report.py html {' '.join(folders)}")


def main() -> None:
    word, argv = common.command(("html", "compare"), __doc__), sys.argv[2:]
    count = next((k for k, arg in enumerate(argv) if arg.startswith("-")), len(argv))
    c = common.parse({"html": Html, "compare": Compare}[word], argv[count:], __doc__)
    if word == "compare" and count != 2 or not count:
        raise UserError(f"write: python report.py {word} {'A B' if word == 'compare' else 'OUT [OUT2 ...]'} [options]")
    (page if word == "html" else compare)(argv[:count], c)


if __name__ == "__main__":
    common.run(main)
