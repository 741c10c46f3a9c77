"""From responses to numbers: the rows of samples_TASK.jsonl, the entries of results.json and the tables of results.md.
evaluate.py calls it with fresh responses and with saved ones (--rescore).

    row, each = graded(doc, saved)                   # each: the numbers of every response, the metric first
    summary(name, task, docs, rows, [each, ..])      # {"alias", "acc,none", "acc_stderr,none", .., "unparsed", "n", ..}
    group_results({name: summary})                   # the papers' averages, where all members have a score
"""
import contextlib
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import rewards
import scorers
from tasks import GROUPS, Task, average, expand, published

NO_LABEL = "the right answer is not published"
LOWER_IS_BETTER = ("rmse", "corpus_levenshtein")  # levenshtein of a molecule is a similarity


def digest(*values) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]


def prompt_hash(doc: dict) -> str:
    return digest(doc["messages"], doc["context"], doc["pairs"], [Path(p).name for p in doc["images"]])


def answered(row: dict | None) -> bool:
    return bool(row and (row["responses"] or row["loglikelihood"]))


def graded(doc: dict, row: dict) -> tuple[dict, list[dict]]:
    """The document's row of samples_TASK.jsonl, and the numbers of each of its responses, the metric first."""
    error, reads = row["error"] if not answered(row) else doc["error"], []
    names = ["acc", "acc_norm"] if doc["scorer"] == "likelihood" else list(scorers.SCORERS[doc["scorer"]][1])
    each = [dict.fromkeys(sorted(names, key=lambda name: name != doc["metric"]))]
    if not error and doc["gold"] is None:
        error = NO_LABEL
    if not error and doc["pairs"]:
        right = doc["gold"] if isinstance(doc["gold"], list) else [doc["gold"]]
        sums = [logp for logp, *_ in row["loglikelihood"]]
        normed = [logp / max(len(option), 1) for logp, option in zip(sums, doc["options"])]
        best = {name: max(range(len(v)), key=v.__getitem__) for name, v in (("acc", sums), ("acc_norm", normed))}
        each = [{name: float(best[name] in right) for name in each[0]}]
        reads = [doc["options"][best[next(iter(each[0]))]]]
    elif not error:
        try:
            found = [scorers.score(doc["scorer"], r["text"], doc["gold"], doc["metric"], **doc["kw"])
                     for r in row["responses"]]
            each, reads = [s.numbers for s in found], [s.read for s in found]
        except (AssertionError, ValueError) as e:
            error = f"it cannot be scored: {e}"
    numbers = {name: None if all(e[name] is None for e in each) else scorers.mean([e[name] for e in each])["value"]
               for name in each[0]}
    texts = [p[0] for p in doc["pairs"][:1]] or [m["content"] for m in doc["messages"][-1:]] or [doc["context"]]
    return {"id": doc["id"], "key": row["key"], "group": doc["group"], "cluster": doc["cluster"], "gold": doc["gold"],
            "prompt_hash": prompt_hash(doc), "responses": row["responses"],
            "loglikelihood": [[logp, len(option), hit] for (logp, *_, hit), option
                              in zip(row["loglikelihood"], doc["options"] or ())],
            "numbers": numbers, "read": reads[0] if len(reads) == 1 else reads or None, "error": error,
            "images": [str(p) for p in doc["images"]], "question": texts[0].replace("<image>\n", "")[-2000:],
            "options": doc["options"], "chance": doc["chance"]}, each


def ask_judge(judge: rewards.Judge, docs: list[dict], rows: list[dict], each: list[list[dict]]) -> None:
    """Overrules the rule where the judge finds an answer right: among choices where no letter was read, among open
    answers where the rule says no. row["judge"] tells who decided on each response; without a reply the rule does."""
    def asks(doc, row, numbers):
        value = next(iter(numbers.values()))
        return not row["error"] and (value is None or value == 0 and doc["scorer"] in ("exact", "math", "molecule"))
    places = [(i, k) for i, (doc, row) in enumerate(zip(docs, rows)) for k, numbers in enumerate(each[i])
              if asks(doc, row, numbers)]
    for row in rows:
        row["judge"] = ["rule"] * len(row["responses"])

    def verdict(place):
        i, k = place
        gold = docs[i]["gold"]
        right = " or ".join(map(str, gold if isinstance(gold, list) else [gold]))
        return rewards.ask_judge(judge, rows[i]["responses"][k]["text"], right, rows[i]["question"])
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(verdict, places)
        for (i, k), (right, who) in zip(places, tqdm(found, desc="judge", total=len(places), disable=None)):
            rows[i]["judge"][k] = who
            if right:
                each[i][k][next(iter(each[i][k]))] = 1.0
    for i in {i for i, _ in places}:
        metric = next(iter(each[i][0]))
        rows[i]["numbers"][metric] = scorers.mean([e[metric] for e in each[i]])["value"]


def levels(group: str) -> list[str]:
    """Of "Perception/OCR/sign": Perception, Perception/OCR, and itself."""
    return [group[:m.start()] for m in re.finditer("(?<=.)/", group)] + [group]


def summary(name: str, task: Task, docs: list[dict], rows: list[dict], each: list[list[dict]]) -> dict:
    """A task's entry in results.json; its metric comes first. Tasks that mix scorers call it score."""
    firsts = {next(iter(e[0])) for e in each}
    metric = f"avg@{task.samples}" if task.samples > 1 else next(iter(firsts)) if len(firsts) == 1 else "score"
    values = [next(iter(r["numbers"].values())) for r in rows]
    main = [[next(iter(e.values())) for e in own] for own in each]
    found = {metric: scorers.avg_at_k(main)}
    if task.aggregate == "rmse":
        inner = scorers.rmse(values)
        spread = inner["stderr"] and inner["stderr"] * inner["score"]
        found = {"exp(-rmse)": {"value": inner["score"], "stderr": spread}, "rmse": inner}
    elif task.aggregate in ("group_mean", "all_in_group"):
        by = [r["group" if task.aggregate == "group_mean" else "cluster"] for r in rows]
        found = {metric: getattr(scorers, task.aggregate)(values, by)}
    elif task.aggregate == "micro_macro":
        found["macro"] = scorers.group_mean(values, [r["group"] for r in rows])
    elif task.aggregate == "wemath":  # the published number is the plain mean
        with contextlib.suppress(AssertionError):  # --limit may leave no problem whole
            more = scorers.wemath(values, [r["cluster"] for r in rows], [d["extra"].get("key", "") for d in docs])
            found |= {k: more[k] for k in ("strict", "loose")}
    if task.samples > 1:
        main = [own + [None] * (task.samples - len(own)) for own in main]  # an error has no responses
        if all(v in (None, 0, 1) for own in main for v in own):
            found[f"pass@{task.samples}"] = scorers.pass_at_k(main, task.samples)
    if task.corpus:  # what could not be read or asked is an empty text
        reads = [r["read"] if isinstance(r["read"], list) else [r["read"]] for r in rows]
        pairs = [(read, r["gold"]) for r, own in zip(rows, reads) for read in own]
        found |= {f"corpus_{name}": {"value": value, "stderr": None}
                  for name, value in getattr(scorers, task.corpus)(pairs).items()}
    names, parts_n = dict.fromkeys(k for r in rows for k in r["numbers"]), {}
    for other in names:
        some = [r["numbers"][other] for r in rows if other in r["numbers"]]
        if metric == "score" or other not in firsts and len(some) == len(rows):  # of mixed scorers all parts
            found[other] = scorers.mean(some)
            parts_n |= {other: len(some)} if metric == "score" else {}
    if unlabelled := all(r["gold"] is None for r in rows):
        found = {m: {"value": None, "stderr": None} for m in found}
    responses = [r for row in rows for r in row["responses"]]
    def share(hits, of): return sum(hits) / len(of) if of else 0.0
    who = [w for r in rows for w in r.get("judge", ())]
    fine = [e for own, r in zip(each, rows) if not r["error"] for e in own]
    subjects = dict.fromkeys(r["group"] for r in rows if r["group"])
    parts = {g: [i for i, r in enumerate(rows) if r["group"] == g or g not in subjects and
                 r["group"].startswith(f"{g}/")] for g in dict.fromkeys(sum(map(levels, subjects), []))}
    def middle(values, some): return sum(values[i] or 0.0 for i in some) / len(some)
    return {"alias": name} | {f"{m}{kind},none": v[key] for m, v in found.items()
                              for kind, key in (("", "value"), ("_stderr", "stderr"))} \
        | {"unparsed": share((next(iter(e.values())) is None for e in fine), fine),
           "truncated": share((r["truncated"] for r in responses), responses),
           "errors": share((r["error"] not in (None, NO_LABEL if unlabelled else None) for r in rows), rows),
           "length": share((r["tokens"] for r in responses), responses),
           "chance": share((d["chance"] for d in docs), docs), "n": len(rows),
           **({"parts": parts_n} if parts_n else {}),
           **({"judged": share((w == "judge" for w in who), who), "judge_failed": sum("no judge" in w for w in who)}
              if who else {}),
           "by_group": {g: {"value": middle(values, some), "n": len(some),
                            "chance": middle([d["chance"] for d in docs], some)} for g, some in parts.items()}}


def metrics(result: dict) -> list[str]:
    """Names of a task's numbers, its metric first."""
    return [k[:-5] for k in result if k.endswith(",none") and not k.endswith("_stderr,none")]


def main_number(result: dict) -> tuple[str, float | None, float | None]:
    """Name, value and stderr of a task's metric, None where absent."""
    name = next(iter(metrics(result)), "")
    return name, result.get(f"{name},none"), result.get(f"{name}_stderr,none")


def group_results(results: dict[str, dict]) -> dict[str, dict]:
    """Groups whose members all have scores, or were answered and have no published right answers: these are left out,
    and the group's name says so. stderr: with the weights of the average."""
    scores = {name: main_number(r)[1] for name, r in results.items() if main_number(r)[1] is not None}
    sizes, groups, blank = {name: r["n"] for name, r in results.items()}, {}, results.keys() - scores
    for g in GROUPS:
        if (value := average(g, scores, sizes, blank)) is not None:
            share = {t: average(g, {s: float(s == t) for s in scores}, sizes, blank) for t in scores}
            parts = [(w, main_number(results[t])[2]) for t, w in share.items() if w]
            spread = None if any(e is None for _, e in parts) else sum((w * e) ** 2 for w, e in parts) ** 0.5
            out = f" (without {', '.join(sorted(left))})" if (left := blank & set(expand([g]))) else ""
            groups[g + out] = {"alias": g, "score,none": value, "score_stderr,none": spread,
                               "n": sum(sizes[t] for t, w in share.items() if w)}
    return groups


def tables(r: dict, with_published: bool) -> str:
    """results.md."""
    lines = ["|Tasks|Version|n-shot|Metric|Value|Stderr|unparsed|truncated|errors|n|", "|" + "---|" * 10]
    def number(v): return "" if v is None else f"{v:.4f}"
    for name, result in r["results"].items():
        rest = "|".join(f"{result[k]:.3f}" for k in ("unparsed", "truncated", "errors"))
        for m in metrics(result):
            lines.append(f"|{name}|{r['versions'][name]}|{r['n-shot'][name]}|{m}|{number(result[f'{m},none'])}|"
                         f"{number(result[f'{m}_stderr,none'])}|{rest}|{result.get('parts', {}).get(m, result['n'])}|")
    if r["groups"]:
        lines += ["", "|Groups|Average|Stderr|n|", "|---|---|---|---|"]
        lines += [f"|{g}|{number(x['score,none'])}|{number(x['score_stderr,none'])}|{x['n']}|"
                  for g, x in r["groups"].items()]
    ours = {name: main_number(x)[1] for name, x in (r["results"] | r["groups"]).items()}  # fractions
    for title in dict.fromkeys(g.table for g in GROUPS.values() if g.table) if with_published else ():
        models, theirs = published(title)
        if rows := [name for name in theirs if ours.get(name) is not None]:
            lines += ["", f"{title}, percent", "", f"|task|ours|{'|'.join(models)}|", "|---" * (len(models) + 2) + "|"]
            lines += [f"|{name}|{100 * ours[name]:.2f}|" + "|".join(f"{v:.2f}" for v in theirs[name]) + "|"
                      for name in rows]
    return "\n".join(lines) + "\n"
