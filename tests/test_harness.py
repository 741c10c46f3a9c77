"""Agreement with lm-evaluation-harness on local files, sample by sample: prompts, log-likelihoods, decisions.

    python tests/test_harness.py SHARED_DATA       # MMLU 500, ARC's form 200, GSM8K 200, BBH 200 documents; a table

It needs lm_eval 0.4.13, accelerate and the data kit. The model is a random Qwen3 decoder that evaluate.py and
Transformers both read; what it says is never right, so the reading of answers is compared on made responses, too.
"""
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from conftest import SHARED, launch

import bench
import evaluate
import results
import tasks
from model import Innovator, ModelConfig

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))) or not SHARED.exists(),
    reason="it needs lm_eval 0.4.13, accelerate and ../shared/data")
SIZES = dict(mmlu=10, arc=6, gsm8k=4, bbh=4)  # documents in a test; bbh and mmlu: of two subjects


def write_world(data: Path, root: Path, sizes: dict) -> dict[str, list[str]]:
    """Files in our layout, and as jsonl for the harness. -> subjects of mmlu and bbh"""
    names = sorted(f.stem[:-5] for f in (data / "mmlu/test").glob("*.csv"))
    mmlu, made = names[::max(1, len(names) // max(2, sizes["mmlu"] // 10))], []
    for subject in mmlu:
        test, dev = ([row for row in bench.read_mmlu(data, split) if row[0] == subject] for split in ("test", "dev"))
        made += bench.write_mmlu(root, "test", test[:-(-sizes["mmlu"] // len(mmlu))])[subject]
        bench.write_mmlu(root, "dev", dev)
    arc = [dict(id=str(k), question=r["question"], answerKey="ABCD"[r["answer"]],
                choices={"text": r["choices"], "label": list("ABCD")}) for k, r in enumerate(made)]
    random.Random(0).shuffle(arc)
    bench.write_rows(root / "arc/ARC-Easy/test.jsonl", arc[:sizes["arc"]])
    bench.write_rows(root / "arc/ARC-Easy/train.jsonl", arc[-40:])
    bench.write_rows(root / "gsm8k/test.jsonl", list(map(json.loads, open(data / "gsm8k/test.jsonl")))[:sizes["gsm8k"]])
    names = sorted(f.stem for f in (data / "bbh").glob("*.json"))
    bbh = names[:: max(1, len(names) // max(2, sizes["bbh"] // 8))]
    for task in bbh:
        rows = json.loads((data / f"bbh/{task}.json").read_text())["examples"][:-(-sizes["bbh"] // len(bbh))]
        (root / "bbh/cot-prompts").mkdir(parents=True, exist_ok=True)
        (root / f"bbh/{task}.json").write_text(json.dumps({"examples": rows}))
        (root / f"bbh/cot-prompts/{task}.txt").write_text((data / f"bbh/cot-prompts/{task}.txt").read_text())
        bench.write_rows(root / f"harness/bbh_{task}.jsonl", rows)
    return {"mmlu": mmlu, "bbh": bbh}


def harness_tasks(root: Path, subjects: dict, tokens: int) -> dict:
    """The harness' own task files with local data. Of BBH the stop string is ours ("Q:", not any capital Q)."""
    from lm_eval.api.task import ConfigurableTask
    def config(*args, **more): return ConfigurableTask(config=bench.harness_task(root, *args, **more))
    found = {f"mmlu/{s}": config(f"mmlu/default/mmlu_{s}.yaml", {k: f"harness/mmlu_{s}_{k}.jsonl" for k in
                                 ("test", "dev")}, num_fewshot=5) for s in subjects["mmlu"]}
    found |= {f"bbh/{s}": config(f"bbh/cot_fewshot/{s}.yaml", {"test": f"harness/bbh_{s}.jsonl"}, num_fewshot=3,
                                 until=("</s>", "Q:", "\n\n"), tokens=tokens) for s in subjects["bbh"]}
    found["gsm8k_cot"] = config("gsm8k/gsm8k-cot.yaml", {"test": "gsm8k/test.jsonl"},
                                until=("Q:", "</s>", "<|im_end|>"), tokens=tokens)
    found["arc_easy"] = config("arc/arc_easy.yaml", {k: f"arc/ARC-Easy/{k}.jsonl" for k in ("train", "test")},
                               num_fewshot=5, validation_split=None)
    return found


def save_model(folder: Path, tokenizer: Path) -> None:
    model = Innovator.from_config(ModelConfig(
        vocab_size=151936, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=8192), seed=1)
    model.model.embed_tokens.weight.data.mul_(5)  # log-probabilities that differ
    folder.mkdir(parents=True)
    (folder.parent / "tokenizer").mkdir()
    (folder.parent / "tokenizer/tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder.parent / "tokenizer/tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", pad_token="<|endoftext|>")))
    model.assets = folder.parent / "tokenizer"
    model.save_pretrained(folder)


def run_harness(lm, found: dict) -> dict[str, list[dict]]:
    """Samples in the order of the documents; of a task with several filters one list each."""
    from lm_eval.evaluator import simple_evaluate
    out = {}
    for name, task in found.items():
        done = simple_evaluate(lm, tasks=[task], batch_size=1, bootstrap_iters=0, log_samples=True)["samples"]
        out[name] = sorted(next(iter(done.values())), key=lambda s: (s["filter"], s["doc_id"]))
    return out


def made_responses(docs: list[dict], rng: random.Random, say: str) -> list[str]:
    """Right for about half of the documents, in the words of the examples."""
    return [f" Let us see, 3 + 4 = 7. {say} {(d if rng.random() < 0.5 else rng.choice(docs))['gold']}." for d in docs]


def compared(data: Path, root: Path, sizes: dict, tokens: int = 8) -> list[tuple]:
    """Rows of the table: task, what is compared, documents, how many agree, largest difference of log-likelihoods."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    subjects = write_world(data, root, sizes)
    save_model(root / "model", data / "qwen_tokenizer/tokenizer_qwen3.json")
    for names, shots in ((("mmlu", "gsm8k_cot", "bbh"), ()), (("arc_easy",), ("--shots", "5"))):
        launch("evaluate.py", root / "model", "--tasks", *names, *shots, "--data-root", root, "--out", root / "out",
               "--max-new-tokens", tokens, "--dtype", "fp32", "--device", "cpu", "--threads", 2, "--batch", 8)
    def ours(name): return [json.loads(line) for line in open(root / f"out/samples_{name}.jsonl", "rb")]
    found = harness_tasks(root, subjects, tokens)
    theirs = run_harness(HFLM(str(root / "model"), device="cpu", dtype="float32", batch_size=1), found)
    table = []
    for name in ("mmlu", "arc_easy"):
        there = [s for key, samples in theirs.items() if key.split("/")[0] == name for s in samples]
        here, docs = ours(name), tasks.documents(name, root, 5)
        gap = max(abs(float(r[0][0]) - o[0]) for s, row in zip(there, here, strict=True)
                  for r, o in zip(s["resps"], row["loglikelihood"], strict=True))
        for metric in ("acc", "acc_norm")[:1 if name == "mmlu" else 2]:
            table.append((name, metric, len(here), sum(s[metric] == row["numbers"][metric]
                                                       for s, row in zip(there, here)), gap))
        same = sum([tuple(a) for a in arguments(s)] == [tuple(p) for p in d["pairs"]] for s, d in zip(there, docs))
        table.append((name, "prompts", len(here), same, None))
    say = {}
    for name, filtered in (("gsm8k_cot", "flexible-extract"), ("bbh", "get-answer")):
        there = [s for key, samples in theirs.items() if key.split("/")[0] == name for s in samples
                 if s["filter"] == filtered]
        here, docs = ours(name), tasks.documents(name, root)
        same = sum(arguments(s)[0][0] == d["context"] for s, d in zip(there, docs))
        table += [(name, "prompts", len(here), same, None),
                  (name, "responses", len(here), sum(s["resps"][0][0] == row["responses"][0]["text"]
                                                     for s, row in zip(there, here, strict=True)), None),
                  (name, "decisions", len(here), sum(s["exact_match"] == next(iter(row["numbers"].values()))
                                                     or not s["exact_match"] and not next(iter(row["numbers"].values()))
                                                     for s, row in zip(there, here)), None)]
        marks = {"gsm8k_cot": "The answer is", "bbh": "So the answer is"}[name]
        say |= dict(zip((d["context"] for d in docs), made_responses(docs, random.Random(0), marks)))

    class Said(LM):
        def generate_until(self, requests, disable_tqdm=False): return [say[r.args[0]] for r in requests]
        def loglikelihood(self, requests, disable_tqdm=False): raise NotImplementedError
        loglikelihood_rolling = loglikelihood
    theirs = run_harness(Said(), {k: t for k, t in found.items() if t.OUTPUT_TYPE == "generate_until"})
    for name, filtered, metric in (("gsm8k_cot", "strict-match", "strict"), ("gsm8k_cot", "flexible-extract", "acc"),
                                   ("bbh", "get-answer", "exact")):
        there = [s for key, samples in theirs.items() if key.split("/")[0] == name for s in samples
                 if s["filter"] == filtered]
        docs = tasks.documents(name, root)
        rows = [results.graded(d, {"id": d["id"], "key": "", "loglikelihood": [], "error": None, "responses": [
            {"text": say[d["context"]], "tokens": 1, "truncated": False}]})[0] for d in docs]
        agree = [bool(s["exact_match"]) == (r["numbers"][metric] == 1) for s, r in zip(there, rows, strict=True)]
        table.append((name, f"made, {filtered}, {sum(bool(s['exact_match']) for s in there)} right", len(agree),
                      sum(agree), None))
        for s, r, same in zip(there, rows, agree):
            if not same:
                print(f"{name} {r['id']}: gold {r['gold']!r}, harness {s['exact_match']} ({s['filtered_resps']}), ours "
                      f"{r['numbers']} ({r['read']!r})")
    return table


def arguments(sample: dict) -> list[tuple]:
    """(context, continuation or settings) of every request."""
    given = sample["arguments"]
    given = given.values() if isinstance(given, dict) else given
    return [tuple(a.values()) if isinstance(a, dict) else tuple(a) for a in given]


def test_agreement_with_the_harness(tmp_path):
    for name, what, documents, agree, gap in compared(SHARED / "data", tmp_path / "world", SIZES):
        assert agree >= 0.99 * documents, (name, what, documents, agree)
        assert gap is None or gap < 1e-3, (name, gap)


def test_bench_asks_what_the_limit_would(tmp_path):
    there = bench.harness_files(bench.Harness("", data=str(SHARED / "data"), limit=60, samples=5), tmp_path)
    for name, limit in (("mmlu", 60), ("gsm8k_cot", 5)):
        def asked(docs): return [(d["context"], d["pairs"], d["gold"]) for d in docs]
        every = tasks.documents(name, SHARED / "data")
        here = tasks.documents(name, tmp_path)
        assert asked(here) == asked(evaluate.chosen(evaluate.Config(limit=limit), name, every))
        files = [Path(t["dataset_kwargs"]["data_files"]["test"]) for t in there[name]]
        questions = [json.loads(line)["question"] for f in files for line in open(f, "rb")]
        assert len(questions) == limit and all(q.strip() in (d["context"] or d["pairs"][0][0])
                                               for q, d in zip(questions, here, strict=True))


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(Path(sys.argv[1]), Path(folder) / "world", dict(mmlu=500, arc=200, gsm8k=200, bbh=200))
    print("| task | compared | documents | agree | largest difference |\n|---|---|---|---|---|")
    for name, what, documents, agree, gap in rows:
        print(f"| {name} | {what} | {documents} | {agree} ({100 * agree / documents:.1f} %) | "
              f"{'' if gap is None else f'{gap:.1e}'} |")
