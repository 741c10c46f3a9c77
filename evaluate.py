"""Scores on the benchmarks of tasks.py. Every response is kept and can be scored again.

    python evaluate.py runs/instruct --tasks toy --data-root data/toy
    torchrun --nproc-per-node 8 evaluate.py runs/instruct --tasks vision-language --published
    python evaluate.py Qwen3-8B-Base --tasks text --data-root data                        # few-shot, plain prompts
    python evaluate.py runs/instruct --tasks toy --data-root data/toy --shuffle-images    # control: falls to chance
    python evaluate.py --out runs/instruct/step_00001000/eval --rescore                   # no model, no generation
    python evaluate.py --list              # and --show TASK: what the model sees; --samples TASK:0,3: only these

The checkpoint is a Hugging Face folder or the folder of a training run (its newest checkpoint). --out gets results.json
(laid out as lm-evaluation-harness' own), results.md and samples_TASK.jsonl, one row a document. A run that ended early
goes on where it stopped: responses_TASK.rankN.jsonl holds each response as it came, under a key over the weights, the
tokenizer, the prompt, the pictures, image limits, sampling, engine and dtype. Another checkpoint never
meets old responses; they stay in the file. A task without its files is named, the others run, and the exit code is 3;
it is 1 if all documents of a task are errors.

The answers depend neither on the number of processes nor on interruptions (torch engine): documents sorted by length
form fixed batches with seeds of their own, each is run whole by one rank, and ranks do not communicate before the end.
On GPUs vLLM generates, or model.py with --engine torch; log-likelihoods are always model.py's. Beside every score stand
the shares of responses without a readable answer (unparsed) and at the end of their budget (truncated), and of
documents that could not be asked or scored (errors): these count as wrong and are never left out. With --judge URL a
language model is asked about what rules read as no answer or a wrong one, in tasks whose authors ask one; its share
stands beside the score, its verdicts are kept.

Departures from lm-evaluation-harness 0.4.13
1. A prompt that does not fit the context is an error; there its beginning is cut off.
2. Prompts of chat tasks always have the chat template, plain ones with --chat only, then without stop strings.
3. Means of groups have a stderr from the same weights as the mean.
"""
import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import engine as engines
from common import UserError, is_rank0, print0, rank, world
from data import BadRow, Doc, Tokenizer, encode
from kernels.attention import Branches
from model import Innovator, Pack, _chunks, checkpoint_folder, config_of, weight_files
from results import (LOWER_IS_BETTER, NO_LABEL, answered, ask_judge, digest, graded, group_results, metrics,
                     prompt_hash, summary, tables)
from rewards import Judge
from tasks import GROUPS, TASKS, Task, documents, expand, missing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FREE = ("tasks", "data_root", "out", "device", "threads", "engine_memory", "optimize", "resume", "rescore", "published",
        "judge", "judge_model", "show", "list")  # may differ from those of the saved responses
TOGETHER = 32768  # tokens of one forward of log-likelihoods


@dataclass
class Config:
    tasks: list[str] = field(default_factory=list)  # names and groups from --list, or all
    data_root: str = "data"  # folder that the files of --list lie in
    out: str = ""  # folder of the results; empty: CHECKPOINT/eval, with --shuffle-images CHECKPOINT/eval_shuffled
    engine: Literal["auto", "torch", "vllm"] = "auto"  # who generates; auto: vllm on GPUs, torch on CPUs
    limit: int = 0  # documents a task, evenly spread over its file, 0: all; for trying out
    samples: list[str] = field(default_factory=list)  # TASK:0,3: only these documents, by number
    shots: int = -1  # worked examples of the tasks that have some, -1: the task's
    repeats: int = 0  # responses to a question (avg@k, pass@k), 0: the task's (torchrun takes --n for itself)
    temperature: float = -1.0  # of sampling, 0: greedy, -1: the task's
    max_new_tokens: int = 0  # budget of a response, 0: the task's
    min_pixels: int = 0  # smallest image area, 0: the task's
    max_pixels: int = 0  # largest image area, 0: the task's
    chat: bool = False  # chat template around plain prompts that are continued
    batch: int = 0  # responses generated together, 0: 16, with vllm 1024
    seed: int = 0  # of sampling
    device: str = "auto"  # cuda, cuda:N or cpu; auto: a GPU if there is one
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    attention: Literal["auto", "flash-attn", "varlen", "sdpa"] = "auto"  # of prompts; auto: the fastest that runs
    context: int = 0  # longest prompt + response, 0: the model's context
    engine_memory: float = 0.8  # share of the GPU's memory that vLLM may take
    optimize: Literal["none", "graphs", "compile"] = "graphs"  # of vLLM: CUDA graphs, torch.compile (a minute)
    threads: int = 0  # CPU threads of torch a process, 0: torch's choice
    shuffle_images: bool = False  # control: every question gets the picture of another one of its group
    resume: bool = True  # use responses of an earlier run where all they depend on is the same
    rescore: bool = False  # score the saved responses again, without the model
    published: bool = False  # the papers' rows beside ours
    judge: str = ""  # URL of an OpenAI-compatible server, with /v1, that is asked where rules read no answer or say no
    judge_model: str = ""  # its name there; the server's key is read from OPENAI_API_KEY
    show: str = ""  # print what the model sees of a task's first document
    list: bool = False  # print the tasks, groups and the files they need

    def __post_init__(self):
        assert re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device), \
            f"--device {self.device}: give auto, cpu, cuda or cuda:N"
        assert 0 < self.engine_memory < 1, f"--engine-memory {self.engine_memory} is a share between 0 and 1"
        assert self.temperature >= 0 or self.temperature == -1, f"--temperature {self.temperature} must not be negative"
        assert self.shots >= -1, f"--shots {self.shots} must not be negative"
        for name in ("limit", "max_new_tokens", "min_pixels", "max_pixels", "repeats", "context", "batch"):
            assert getattr(self, name) >= 0, f"{name} {getattr(self, name)} must not be negative"
        assert bool(self.judge) == bool(self.judge_model), "--judge and --judge-model belong together"
        assert not (self.rescore and self.show), "--show needs the model: not with --rescore"
        self.only = {}
        for given in self.samples:
            found = re.fullmatch(r"([^:]+):(\d+(?:,\d+)*)", given)
            assert found, f"--samples {given}: give TASK:0,3"
            self.only |= {name: [int(i) for i in found[2].split(",")] for name in expand([found[1]])}
        assert not self.show or len(expand([self.show])) == 1, f"--show {self.show} is a group: give one task"
        names = [*TASKS] if self.tasks == ["all"] else expand(self.tasks + [self.show] * bool(self.show))
        self.tasks = list(dict.fromkeys([*names, *self.only]))

    def task(self, name: str) -> Task:
        """A task as it is asked here."""
        t = TASKS[name]
        t = replace(t, shots=t.shots if self.shots < 0 or not t.shots else self.shots)
        if t.request == "loglikelihood":
            return t
        t = replace(t, samples=self.repeats or t.samples, budget=self.max_new_tokens or t.budget,
                    temperature=t.temperature if self.temperature < 0 else self.temperature,
                    stop=() if self.chat else t.stop,
                    limits=replace(t.limits, min_pixels=self.min_pixels or t.limits.min_pixels,
                                   max_pixels=self.max_pixels or t.limits.max_pixels))
        assert t.samples == 1 or t.temperature > 0, \
            f"{name}: {t.samples} greedy responses are all the same: give --temperature, or --repeats 1"
        return t


# ---- documents ------------------------------------------------------------------------------------------------------
def chosen(c: Config, name: str, docs: list[dict]) -> list[dict]:
    if name in c.only:
        if max(c.only[name]) >= len(docs):
            raise UserError(f"--samples {name}: its documents are 0 to {len(docs) - 1}")
        return [docs[i] for i in dict.fromkeys(c.only[name])]
    return [docs[i * len(docs) // c.limit] for i in range(c.limit)] if 0 < c.limit < len(docs) else docs


def deal_images(docs: list[dict]) -> None:
    """Gives each question the picture of another one of its group: a cyclic shift of the distinct pictures in a
    random order."""
    groups, rng = {}, np.random.default_rng(0)
    for d in docs:
        if d["images"]:
            groups.setdefault((d["group"], len(d["images"])), {})[tuple(d["images"])] = None
    for (group, _), pictures in groups.items():
        if len(pictures) == 1:
            raise UserError(f"--shuffle-images: group {group!r} has one picture only")
        order = [list(pictures)[k] for k in rng.permutation(len(pictures))]
        pictures.update(zip(order, order[1:] + order[:1]))
    for d in docs:
        if d["images"]:
            d["images"] = list(groups[d["group"], len(d["images"])][tuple(d["images"])])


def prompt_of(doc: dict, decode: bool, task: Task, tok: Tokenizer, config, longest: int, chat: bool) -> Doc:
    """What is continued; BadRow says why the document cannot be asked."""
    if doc["error"]:
        raise BadRow(doc["error"])
    if doc["images"] and config.vision is None:
        raise BadRow("the checkpoint has no vision tower")
    if doc["context"] and not chat:
        ids = np.array(tok.encode(doc["context"]), dtype=np.int32)
        prompt = Doc(ids, np.full_like(ids, -100))
    else:
        messages = doc["messages"] or [{"role": "user", "content": doc["context"]}]
        prompt = encode(messages, doc["images"], tok, task.limits, generate=True, decode=decode)
    if len(prompt.ids) + task.budget > longest:
        raise BadRow(f"prompt of {len(prompt.ids)} + {task.budget} new tokens exceed the context {longest}; lower "
                     "--max-new-tokens, --max-pixels or --shots")
    return prompt


def pairs_of(doc: dict, decode: bool, tok: Tokenizer, longest: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of context and option of each pair. Both are tokenised together, and white space at the end of the context
    goes with the option (lm-evaluation-harness' TemplateLM._encode_pair)."""
    if doc["error"]:
        raise BadRow(doc["error"])
    pairs = []
    for context, option in doc["pairs"]:
        bare = context.rstrip()
        before = tok.encode(bare)
        both = tok.encode(context + option)
        if len(both) <= len(before):
            raise BadRow(f"the option {option!r} has no token of its own")
        pairs.append((before, both[len(before):]) if before else ([tok.pad], both))
    if (most := max(len(a) + len(b) for a, b in pairs)) > longest:
        raise BadRow(f"{most} tokens exceed the context {longest}; lower --shots")
    return pairs


def shown(prompt: Doc | list, tok: Tokenizer) -> str:
    """The text as the model sees it, special tokens included; of pairs each context with its options in braces."""
    if isinstance(prompt, Doc):
        text = tok.decode(prompt.ids.tolist(), skip_special_tokens=False)
        return re.sub(r"(?:<\|image_pad\|>)+", lambda m: f"<|image_pad|>*{m[0].count('|>')}", text)
    contexts = {}
    for context, option in prompt:
        contexts.setdefault(tok.decode(context, skip_special_tokens=False), []).append(tok.decode(option))
    return "\n".join(f"{context}{{{'|'.join(options)}}}" for context, options in contexts.items())


# ---- what a response depends on -------------------------------------------------------------------------------------
def file_hash(path: Path, blocks: int) -> str:
    """Of name, size and content; of a large file, that many blocks of 64 KiB spread evenly and its end."""
    size, block = path.stat().st_size, 2 ** 16
    h = hashlib.sha256(f"{path.name} {size} ".encode())
    with open(path, "rb") as f:
        for start in [*range(0, size, max(block, size // blocks)), max(0, size - block)]:
            f.seek(start)
            h.update(f.read(block))
    return h.hexdigest()


def checkpoint_hash(folder: Path) -> str:
    """Of configuration, tokenizer and weights. The ends of a file alone would miss a run that trains some modules."""
    paths = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    return digest([file_hash(path, 4096) for path in paths])


@functools.cache
def picture_hash(path: str) -> str | None:
    return file_hash(Path(path), 4) if os.path.exists(path) else None


def key_of(doc: dict, task: Task, c: Config, weights: str) -> str:
    """Begins with the checkpoint's hash."""
    pictures, how = [picture_hash(str(p)) for p in doc["images"]], [c.dtype]
    if task.request == "generate":
        how += [c.engine, task.budget, task.stop, c.chat, asdict(task.limits) if doc["images"] else None]
        how += [task.samples, task.temperature, task.top_p, c.seed, c.batch] if task.temperature else []
    return f"{weights[:12]}-{digest(doc['id'], prompt_hash(doc), pictures, how)}"


# ---- the model answers ----------------------------------------------------------------------------------------------
@torch.no_grad()
def compare(model: Innovator, asked: list[list[tuple[list[int], list[int]]]]) -> list[dict]:
    """Log-likelihood of every option, and whether it is the greedy continuation. A context runs once: its last row
    tells the first token of all its options, and those of several tokens branch off it."""
    contexts = {}  # a document's context: [(option, its place)]
    for d, pairs in enumerate(asked):
        for o, (context, option) in enumerate(pairs):
            contexts.setdefault((d, tuple(context)), []).append((option, (d, o)))
    packs, room = [[]], TOGETHER
    for (_, context), options in sorted(contexts.items(), key=lambda x: -len(x[0][1])):
        tokens = len(context) + sum(len(option) - 1 for option, _ in options)
        if packs[-1] and tokens > room:
            packs, room = [*packs, []], TOGETHER
        packs[-1].append((context, options))
        room -= tokens
    sums, greedy = [[0.0] * len(pairs) for pairs in asked], [[True] * len(pairs) for pairs in asked]
    for pack in packs:
        device, lengths, ids = model.device, [len(context) for context, _ in pack], [t for c, _ in pack for t in c]
        ends, branches, rows, targets, owners = [*itertools.accumulate(lengths)], [], [], [], []
        for k, (_, options) in enumerate(pack):
            for option, place in options:
                rows += [ends[k] - 1, *range(len(ids), len(ids) + len(option) - 1)]
                ids += option[:-1]
                targets += option
                owners += [place] * len(option)
                branches += [(k, len(option) - 1)] * (len(option) > 1)
        docs = Branches.of(lengths, branches, device, model.impl)
        ids, rows, targets = (torch.tensor(x, device=device) for x in (ids, rows, targets))
        h = model.hidden(Pack(ids, docs, docs.positions().to(device), rows, targets, torch.ones(len(rows))))[0]
        logps, best = [], []
        for some in _chunks(len(rows), model.config.vocab_size):
            logits = model.lm_head(h[rows[some]]).float()
            logps += logits.log_softmax(-1).gather(1, targets[some, None])[:, 0].tolist()
            best += (logits.argmax(-1) == targets[some]).tolist()
        for (d, o), logp, hit in zip(owners, logps, best, strict=True):
            sums[d][o] += logp
            greedy[d][o] &= hit
    return [{"loglikelihood": list(zip(*two))} for two in zip(sums, greedy)]


def opened(c: Config, checkpoint: str, device: torch.device, out: Path, closing):
    """The checkpoint's entries of results.json, its tokenizer, and two functions of a task: reader(task)(doc, decode)
    is what the model gets of a document; answerer(task) makes answers of batches of those."""
    folder, dtype = checkpoint_folder(checkpoint), DTYPES[c.dtype]
    config, tok = config_of(folder), Tokenizer(folder)
    longest = c.context or config.max_position_embeddings
    assert config.vision is None or tok.image_pad == config.image_token_id, \
        f"<|image_pad|> is {tok.image_pad} in the tokenizer, {config.image_token_id} in config.json"
    info = {"checkpoint": str(folder), "weights": checkpoint_hash(folder),
            "config": {k: v for k, v in asdict(c).items() if k not in FREE}}

    @functools.cache  # loads when it is first called
    def engine():
        if c.engine == "vllm":
            own.cache_clear()  # log-likelihoods came first: their model leaves the GPU
            gc.collect()
            torch.cuda.empty_cache()
        e = engines.of_checkpoint(folder, c.engine, dtype, device, c.attention, batch=c.batch, context=longest,
                                  memory=c.engine_memory, optimize=c.optimize, seed=c.seed, out=out)
        closing.callback(e.close)
        return e

    @functools.cache
    def own():
        return engine().model if c.engine == "torch" else Innovator.from_pretrained(folder, dtype, device, c.attention)

    def reader(task):
        if task.request == "loglikelihood":
            return functools.partial(pairs_of, tok=tok, longest=longest)
        return functools.partial(prompt_of, task=task, tok=tok, config=config, longest=longest, chat=c.chat)

    def answerer(task):
        if task.request == "loglikelihood":
            return lambda batches: (zip((d for d, _ in asked), compare(own(), [p for _, p in asked]))
                                    for _, asked in batches)

        def generated(batches):
            try:
                yield from engines.respond(engine(), tok, task, max(c.batch // task.samples, 1), c.seed, batches)
            except torch.OutOfMemoryError:
                raise UserError(f"out of memory with {c.batch} responses together: run again with a smaller --batch; "
                                "finished responses are kept") from None
        return generated
    return info, tok, reader, answerer


# ---- responses on disk ----------------------------------------------------------------------------------------------
def saved_rows(out: Path, name: str) -> dict[str, dict]:
    """Rows by key; of several, the first that has an answer. A line that a killed run cut is skipped."""
    rows = {}
    for path in [out / f"samples_{name}.jsonl", *sorted(out.glob(f"responses_{name}.rank*.jsonl"))]:
        for line in open(path, "rb") if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "responses" in row and not answered(rows.get(row["key"])):
                rows[row["key"]] = {k: row[k] for k in ("id", "key", "responses", "loglikelihood", "error")}
    return rows


def read_ahead(read, batches):
    """(number, documents, what read makes of each or its BadRow); a batch is read while the one before is answered."""
    def tried(d):
        try:
            return read(d, decode=True)
        except BadRow as e:
            return e
    with ThreadPoolExecutor(8) as pool:
        before = None
        for i, batch in batches:
            coming = i, batch, [pool.submit(tried, d) for d in batch]
            if before:
                yield *before[:2], [f.result() for f in before[2]]
            before = coming
        if before:
            yield *before[:2], [f.result() for f in before[2]]


@contextlib.contextmanager
def writing(path: Path):
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; finished responses are kept: make room and run again") from None


def collect(name: str, docs: list[dict], keys: dict[str, str], out: Path, size: int, read, answer, wait):
    """Rows by key: answers of all documents and what else was saved; complete on rank 0 only. read(doc, decode) is what
    the model gets; answer makes of (number, [(document, that), ...]) batches lists of (document, answer), in any order.
    What an earlier run answered is not asked again."""
    saved, lengths, failed = saved_rows(out, name), {}, {}
    wait()  # all have read before one writes
    known, (weights, *_) = set(keys.values()), next(iter(keys.values())).split("-")
    other = [k for k, row in saved.items() if answered(row) and k not in known]
    if foreign := sum(not k.startswith(weights) for k in other):
        print0(f"{name}: {foreign} saved responses are of another checkpoint: they are kept and not read")
    if len(other) > foreign:
        print0(f"{name}: {len(other) - foreign} saved responses are of other prompts or settings: kept and not read")

    def row(d, answers=None, error=None):
        return {"id": d["id"], "key": keys[d["id"]], "responses": [], "loglikelihood": [], "error": error} \
            | (answers or {})
    if not all(answered(saved.get(keys[d["id"]])) for d in docs):
        for d in tqdm(docs, desc=f"{name}: lengths", disable=None if is_rank0() else True):
            try:
                found = read(d, decode=False)  # of pictures the headers only
                lengths[d["id"]] = len(found.ids) if isinstance(found, Doc) else sum(len(a) + len(b) for a, b in found)
                if keys[d["id"]] in saved and not answered(saved[keys[d["id"]]]):
                    read(d, decode=True)  # it failed before: has somebody mended the file?
                    saved.pop(keys[d["id"]])
            except BadRow as e:
                failed[keys[d["id"]]] = row(d, error=str(e))
    order = sorted((d for d in docs if d["id"] in lengths), key=lambda d: -lengths[d["id"]])  # too large shows first
    batches = [(i, order[i:i + size]) for i in range(0, len(order), size)]
    def lacks(d): return keys[d["id"]] not in saved and keys[d["id"]] not in failed
    todo = [b for b in batches if any(map(lacks, b[1]))]
    print0(f"{name}: {len(docs)} documents, {sum(map(lacks, docs))} to answer, {len(failed)} errors")
    mine, path, new = todo[rank()::world()], out / f"responses_{name}.rank{rank()}.jsonl", []
    bar = tqdm(total=sum(lacks(d) for _, batch in mine for d in batch), desc=name, disable=None if is_rank0() else True)

    def readable():
        for i, batch, prompts in read_ahead(read, mine):
            new.extend(row(d, error=str(p)) for d, p in zip(batch, prompts) if isinstance(p, BadRow))  # its pixels
            if asked := [(d, p) for d, p in zip(batch, prompts) if not isinstance(p, BadRow)]:
                yield i, asked
    for answers in itertools.chain(answer(readable()) if mine else (), [[]]):  # once more for errors at the end
        fresh = [r for r in (*new, *(row(d, a) for d, a in answers)) if r["key"] not in saved]
        new.clear()
        if not fresh:
            continue
        with writing(path), open(path, "a") as f:  # begins with a new line: a killed run may have left half of one
            f.write("\n" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in fresh))
            f.flush()
            os.fsync(f.fileno())
        bar.update(len(fresh))
    bar.close()
    wait()
    return failed | saved_rows(out, name) if is_rank0() else {}


def saved_answers(out: Path, name: str, every: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """The documents of samples_TASK.jsonl and its rows by id, to be scored again."""
    path = out / f"samples_{name}.jsonl"
    rows = {row["id"]: row for row in map(json.loads, open(path, "rb"))}
    if unknown := sorted(rows.keys() - {d["id"] for d in every}):
        raise UserError(f"{path}: {len(unknown)} rows are not among this task's documents: {', '.join(unknown[:4])}")
    asked = [d for d in every if d["id"] in rows]
    if other := [d["id"] for d in asked if rows[d["id"]]["prompt_hash"] != prompt_hash(d)]:
        raise UserError(f"{path}: {len(other)} documents were answered under another prompt: {', '.join(other[:4])}; "
                        "give the --data-root of that run")
    return asked, rows


def saved_results(out: Path) -> dict | None:
    path = out / "results.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        raise UserError(f"{path}: damaged; delete it and run again, saved responses stay") from None


def write_lines(path: Path, rows: list[dict]) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            tmp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_samples(out: Path, name: str, done: list[dict], left: list[dict]) -> None:
    """The final file in place of the ranks' own; other responses stay for a longer run, or one with other settings."""
    write_lines(out / f"samples_{name}.jsonl", done)
    keep = out / f"responses_{name}.rank0.jsonl"
    if left:
        write_lines(keep, left)
    for path in out.glob(f"responses_{name}.rank*.jsonl"):
        if path != keep or not left:
            path.unlink()


# ---- what is printed, and the run -----------------------------------------------------------------------------------
def print_errors(name: str, bad: list[dict]) -> None:
    for s in bad[:20]:
        print(f"{name}: error: {s['id']}{', ' * bool(s['images'])}{', '.join(s['images'])}: {s['error']}")
    if len(bad) > 20:
        print(f"{name}: error: {len(bad) - 20} more, all are in samples_{name}.jsonl")


def list_tasks(root: Path) -> None:
    member = {name: ",".join(g for g in GROUPS if name in GROUPS[g].members) for name in TASKS}
    print(f"{'task':38}{'groups':24}{'request':14}{'shots':>6}{'tokens':>7}  {'scorer':11}files")
    for name, t in TASKS.items():
        lack = missing(name, root)
        print(f"{name:38}{member[name]:24}{t.request:14}{t.shots:6}{t.budget:7}  {t.scorer:11}"
              f"{lack or f'{root}/{t.files}'}")
    print("groups: " + ", ".join(GROUPS))


def show(name: str, doc: dict, task: Task, read, tok: Tokenizer) -> None:
    prompt = read(doc, decode=False)
    sizes = [f"{'' if isinstance(p, bytes) else p}: {14 * w} x {14 * h}" for p, (_, h, w)
             in zip(doc["images"], getattr(prompt, "grids", ()))]
    print(f"{name} {doc['id']}, {task.request}, scorer {doc['scorer']}, budget {task.budget}, stop {task.stop}\n"
          f"--- prompt\n{shown(prompt, tok)}\n--- images {sizes}\n--- right answer {doc['gold']!r}")


def described(name: str, task: Task, metric: str, prompt: str, chat: bool) -> dict:
    """An entry of results.json's configs."""
    sampling = {"max_new_tokens": task.budget, "temperature": task.temperature, "top_p": task.top_p,
                "n": task.samples, "until": task.stop} if task.budget else {}
    return {"task": name, "hub": task.hub, "files": task.files, "output_type": task.request, "scorer": task.scorer,
            "metric": metric, "aggregate": task.aggregate, "num_fewshot": task.shots, "generation_kwargs": sampling,
            "limits": asdict(task.limits), "chat": chat, "prompt": prompt}


def started(info: dict, old: dict | None, out: Path) -> dict:
    """results.json without what is of the whole; with an earlier run's other tasks, if all else was the same."""
    r = {k: {} for k in ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
                         "n-samples", "task_hashes")}
    if old and all(old.get(k) == info[k] for k in ("weights", "config")):
        return {k: dict(old[k]) for k in r}
    if old:
        print0(f"{out / 'results.json'} held {', '.join(old['results']) or 'nothing'}, of another checkpoint or with "
               "other settings: only their samples stay")
    return r


def keep(out: Path, name: str, result: dict, done: list[dict], left: list[dict]) -> None:
    """Writes a task's samples in the place of the ranks' responses and prints what went wrong."""
    write_samples(out, name, done, left)
    print_errors(name, [s for s in done if s["error"] not in (None, NO_LABEL)])
    if unlabelled := sum(s["error"] == NO_LABEL for s in done):
        print(f"{name}: the right answers to {unlabelled} documents are not published; the responses are in "
              f"samples_{name}.jsonl")
    if failed := result.get("judge_failed"):
        print(f"{name}: the judge did not decide on {failed} responses, the rule did: "
              f"{next(w for s in done for w in s['judge'] if 'no judge' in w)}; --rescore asks again")


def finish(c: Config, r: dict, info: dict, stamp: dict, evaluated: list[str], out: Path) -> None:
    """Averages of groups, the files and the tables."""
    r = {k: {n: v[n] for n in TASKS if n in v} for k, v in r.items()}  # in the table's order
    r["groups"] = group_results(r["results"])
    r["group_subtasks"] = {g: list(GROUPS[x["alias"]].members) for g, x in r["groups"].items()}
    text = tables(r, c.published)
    with writing(out / "results.json"):
        common.write_json(out / "results.json", r | info | {"root": str(Path(c.data_root))} | stamp)
        (out / "results.md").write_text(text)
    print(f"\n{text}")
    if c.limit or c.samples:
        print("a part of the documents only: these are no scores to report")
    for g in GROUPS:
        names = expand([g])
        if set(names) <= set(c.tasks) and not any(x["alias"] == g for x in r["groups"].values()):
            print(f"no average of {g}: {', '.join(n for n in names if n not in evaluated)} without a score")


def run(c: Config, checkpoint: str, out: Path, device: torch.device, wait, closing) -> int:
    """All tasks. -> exit code"""
    root, began, old = Path(c.data_root), time.perf_counter(), saved_results(out)
    if c.rescore:
        if gone := [name for name in c.tasks if name not in old["results"]]:
            raise UserError(f"{out / 'results.json'} has no {', '.join(gone)}: run it again, saved responses are used")
        info = {k: old[k] for k in ("checkpoint", "weights", "config")}
    else:
        info, tok, reader, answerer = opened(c, checkpoint, device, out, closing)
    if c.show:
        name, = expand([c.show])
        docs, task = documents(name, root, c.task(name).shots), c.task(name)
        try:
            show(name, chosen(c, name, docs)[0], task, reader(replace(task, budget=0)), tok)
        except BadRow as e:
            raise UserError(f"{name}: its first document cannot be asked: {e}") from None
        return 0

    r = started(info, old, out)
    judge = Judge(c.judge, c.judge_model, str(out / "judge"), os.environ.get("OPENAI_API_KEY", ""))
    if is_rank0():
        out.mkdir(parents=True, exist_ok=True)
    evaluated, lacking = [], {name: lack for name in c.tasks if (lack := missing(name, root, c.task(name).shots))}
    # log-likelihoods first: model.py's weights leave the GPU before vLLM comes
    for name in sorted(set(c.tasks) - set(lacking), key=lambda n: (TASKS[n].request == "generate", c.tasks.index(n))):
        task = c.task(name)
        try:
            every = documents(name, root, task.shots, out / "images")
            if c.shuffle_images:
                deal_images(every)
            asked, rows = saved_answers(out, name, every) if c.rescore else (chosen(c, name, every), None)
        except UserError as e:
            lacking[name] = str(e)
            continue
        left = []
        if not c.rescore:
            if not c.resume and is_rank0():
                for path in [out / f"samples_{name}.jsonl", *out.glob(f"responses_{name}.rank*.jsonl")]:
                    path.unlink(missing_ok=True)
            wait()
            keys = {d["id"]: key_of(d, task, c, info["weights"]) for d in every}
            size = 16 if c.engine == "vllm" else max(c.batch // task.samples, 1)  # vLLM takes more as it has room
            found = collect(name, asked, keys, out, size, reader(task), answerer(task), wait)
            rows = {d["id"]: found.pop(keys[d["id"]]) for d in asked} if is_rank0() else {}
            left = [row for row in found.values() if answered(row)]
        if not is_rank0():
            continue
        try:
            done, each = zip(*(graded(d, rows[d["id"]]) for d in asked))
            if c.judge and task.judge:
                ask_judge(judge, asked, done, each)
            r["results"][name] = summary(name, task, asked, done, each)
        except UserError as e:  # a library for molecules is not installed: the responses stay
            lacking[name] = f"{name}: {e}; its responses are kept: run again afterwards"
            continue
        keep(out, name, r["results"][name], done, left)
        evaluated.append(name)
        r["versions"][name], r["n-shot"][name] = task.version, task.shots
        r["higher_is_better"][name] = {m: m not in LOWER_IS_BETTER for m in metrics(r["results"][name])}
        r["n-samples"][name] = {"original": len(every), "effective": len(asked)}
        r["task_hashes"][name] = digest([s["prompt_hash"] for s in done])
        if not c.rescore:
            try:
                prompt = shown(reader(task)(asked[0], decode=False), tok)
            except BadRow as e:
                prompt = f"error: {e}"
            chat = bool(asked[0]["messages"]) or c.chat and task.request == "generate"
            r["configs"][name] = described(name, task, metrics(r["results"][name])[0], prompt, chat)

    if is_rank0():
        if evaluated:
            stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "git_hash": common.commit(),
                     "total_evaluation_time_seconds": round(time.perf_counter() - began, 1)}
            finish(c, r, info, {k: old[k] for k in stamp} if c.rescore else stamp, evaluated, out)
        for lack in lacking.values():
            print(f"not evaluated: {lack}")
        print(f"wrote {out / 'results.json'}, results.md, samples_TASK.jsonl\nnext: python chat.py "
              f"{checkpoint or 'CHECKPOINT'}" if evaluated else "nothing was evaluated", flush=True)
    wait()  # a failing exit code ends all processes, and vLLM takes the process group with it: rank 0 must have written
    return 3 if lacking else int(any(r["results"][n]["errors"] == 1 for n in c.tasks if n in r["results"]))


def main() -> None:
    given = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    checkpoint = sys.argv[1] if given else ""
    c = common.parse(Config, sys.argv[1 + given:], __doc__)
    if c.list:
        return list_tasks(Path(c.data_root))
    assert given or c.rescore and c.out, \
        "usage: python evaluate.py CHECKPOINT --tasks NAME ... [options]; -h lists them"
    assert not checkpoint.startswith("preset:"), \
        f"{checkpoint} is a configuration without weights; give a checkpoint folder"
    out = Path(c.out) if c.out else Path(checkpoint) / ("eval_shuffled" if c.shuffle_images else "eval")
    if c.rescore:
        if not (out / "results.json").exists():
            raise UserError(f"{out / 'results.json'}: not found; --rescore needs the --out of a finished evaluation")
        old = saved_results(out)
        c = Config(**{k: getattr(c, k) for k in FREE} | old["config"] | {"tasks": c.tasks or [*old["results"]]})
    assert c.tasks, "say what to evaluate: --tasks with names or groups of --list, or all"
    device = (common.init_distributed() if "RANK" in os.environ else
              torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = device if c.device == "auto" else torch.device(c.device)
    assert device.type == "cpu" or torch.cuda.is_available(), f"--device {c.device}: no GPU is visible here"
    c.dtype = c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    c.engine = c.engine if c.engine != "auto" else "vllm" if device.type == "cuda" else "torch"
    c.batch = c.batch or (16 if c.engine == "torch" else 1024)
    asks = not (c.rescore or c.show) and any(TASKS[name].request == "generate" for name in c.tasks)
    assert c.engine == "torch" or not asks or importlib.util.find_spec("vllm"), \
        "vLLM, which generates on GPUs, is not installed: pip install -r requirements-gpu.txt, or give --engine torch"
    if c.threads:
        torch.set_num_threads(c.threads)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world() > 1 else None  # may wait for hours
    def wait(): dist.barrier(patient) if world() > 1 else None
    with contextlib.ExitStack() as closing:
        code = run(c, checkpoint, out, device, wait, closing)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    common.run(main)
