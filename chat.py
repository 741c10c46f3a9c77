"""Talks to a checkpoint: one question on the command line, a conversation, or a server that other programs ask.

    python chat.py runs/instruct --image cell.png What is in the middle of the picture?
    python chat.py runs/instruct                      # /image FILE adds a picture, /new starts over, an empty line ends
    python chat.py runs/instruct < questions.txt      # one line, one turn of the conversation
    python chat.py runs/instruct --serve 8000         # POST /v1/chat/completions as of OpenAI's servers

The answer streams to stdout. The checkpoint is a Hugging Face folder or the folder of a training run (its newest
checkpoint). Words that are not options are the question; --image takes the following names that end like a picture's.

The server is for lmms-eval, lm-evaluation-harness, --judge and scripts: it answers the requests that wait together, and
has no keys and no streaming. Pictures come inside the messages (data: URLs), in their place in the text. max_tokens,
temperature, top_p, n and stop of a request go before the options here; its seed is not used. What cannot be answered
gets status 400 and one line.
"""
import base64
import contextlib
import itertools
import json
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

import common
import engine as engines
from common import UserError
from data import BadRow, Limits, Tokenizer, encode, normalise
from model import Innovator, ModelConfig, checkpoint_folder, config_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class Config:
    image: list[str] = field(default_factory=list)  # picture files shown before the question
    max_new_tokens: int = 512  # longest answer
    temperature: float = 0.0  # 0 is greedy: always the same answer
    top_p: float = 1.0  # sample from the most likely tokens that hold this mass
    top_k: int = 0  # sample from this many most likely tokens, 0: from all
    system: str = ""  # system prompt; empty: "You are a helpful assistant."
    seed: int = 0  # of the sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    serve: int = 0  # port of a server in the place of a conversation
    host: str = "127.0.0.1"  # address that it listens at; 0.0.0.0: all, for other machines
    engine: Literal["auto", "torch", "vllm"] = "auto"  # of the server; auto: vllm on GPUs, torch on CPUs
    batch: int = 64  # requests that the server answers together
    max_pixels: int = 0  # area that larger pictures are reduced to, 0: the model's

    def __post_init__(self):
        assert self.max_new_tokens > 0, f"--max-new-tokens {self.max_new_tokens} must be positive"
        assert self.temperature >= 0, f"--temperature {self.temperature} must not be negative"
        assert 0 < self.top_p <= 1, f"--top-p {self.top_p} must lie in 0..1, above 0"
        assert self.top_k >= 0, f"--top-k {self.top_k} must not be negative"
        assert 0 <= self.serve < 65536, f"--serve {self.serve} is no port"
        assert self.batch > 0, f"--batch {self.batch} must be positive"
        assert not self.serve or not self.top_k, "--top-k is not for --serve"
        assert not self.max_pixels or self.max_pixels >= Limits.min_pixels, \
            f"--max-pixels {self.max_pixels}: give {Limits.min_pixels} or more"
        self.limits = Limits(max_pixels=self.max_pixels) if self.max_pixels else Limits()


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """["What", "--seed", "1", "is", "--image", "a.png", "it?"] ->
    (["--seed", "1", "--image", "a.png"], ["What", "is", "it?"])"""
    options, images, words, i = [], [], [], 0
    while i < len(argv):
        n = 1 if "=" in argv[i] or argv[i] in ("-h", "--help") else 2
        if argv[i] == "--image":
            while n < len(argv) - i and argv[i + n].lower().endswith(PICTURES):
                n += 1
            images += argv[i + 1:i + n]
        elif argv[i] == "-h" or argv[i].startswith("--"):
            options += argv[i:i + n]
        else:
            words.append(argv[i])
            n = 1
        i += n
    return options + (["--image", *images] if images else []), words


def answer(model: Innovator, tok: Tokenizer, c: Config, messages: list[dict], images: list) -> str:
    """Prints the reply to the last message as it comes, and returns it."""
    prompt = encode(messages, images, tok, c.limits, generate=True)
    pixels = (None if prompt.pixels is None else
              normalise(torch.from_numpy(prompt.pixels).to(model.device), model.compute_dtype))
    held = []  # tokens whose bytes may end inside a character

    def show(_, token):
        held.append(token)
        text = tok.decode(held)
        if not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            held.clear()
    ids, = model.generate([prompt.ids.tolist()], pixels, prompt.grids or None, max_new_tokens=c.max_new_tokens,
                          temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, stop_ids=(tok.im_end, tok.pad),
                          seed=c.seed + len(messages), on_token=show)
    print(tok.decode(held), flush=True)
    return tok.decode(ids)


def opened(file: str, tok: Tokenizer) -> Path:
    """The picture's path, if it can be read; damage shows before the question is typed."""
    try:
        encode([{"role": "user", "content": "<image>"}], [file], tok, Limits(), generate=True)
    except (BadRow, OSError) as e:
        raise UserError(f"{file}: not a readable picture: {e}") from None
    return Path(file)


# ---- server ---------------------------------------------------------------------------------------------------------
def conversation(messages) -> tuple[list[dict], list[bytes]]:
    """OpenAI's messages as ours, <image> in the place of a picture, and the pictures."""
    out, images = [], []
    for k, m in enumerate(messages):
        text, parts = "", m["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                text += part["text"].replace("<image>", "< image >")
                continue
            url = part["image_url"]["url"] if part["type"] == "image_url" else ""
            if m["role"] != "user" or not re.match(r"data:image/[\w.+-]+;base64,", url):
                raise BadRow(f"message {k}: a part is neither text nor a user's picture as a data:image/...;base64 URL")
            images.append(base64.b64decode(url.partition(",")[2]))
            text += "<image>"
        out.append({"role": m["role"], "content": text})
    turns = [m["role"] for m in out if m is not out[0] or m["role"] != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadRow("messages: a system message or none, then user and assistant in turns, user last")
    return out, images


def understood(body: bytes, c: Config, tok: Tokenizer, config: ModelConfig) -> SimpleNamespace:
    """A request: its prompt, its sampling as engine.respond takes it, and the answer to come."""
    given = {k: v for k, v in json.loads(body).items() if v is not None}
    if given.get("stream"):
        raise BadRow("stream: this server answers as a whole")
    messages, images = conversation(given["messages"])
    if c.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": c.system}, *messages]
    if images and config.vision is None:
        raise BadRow("the checkpoint has no vision tower")
    prompt = encode(messages, images, tok, c.limits, generate=True)
    room = config.max_position_embeddings - len(prompt.ids)
    stop = given.get("stop", [])
    task = SimpleNamespace(
        budget=int(given.get("max_completion_tokens", given.get("max_tokens", max(1, min(c.max_new_tokens, room))))),
        samples=int(given.get("n", 1)), temperature=float(given.get("temperature", c.temperature)),
        top_p=float(given.get("top_p", c.top_p)), stop=tuple([stop] if isinstance(stop, str) else stop))
    if task.budget < 1 or not 0 < task.top_p <= 1 or not all(isinstance(x, str) and x for x in task.stop):
        raise BadRow("max_tokens is positive, top_p above 0 and at most 1, stop a string or several, none empty")
    most = 128 if task.temperature else 1
    if task.temperature and not 0.01 <= task.temperature <= 2 or not 1 <= task.samples <= most:
        raise BadRow("temperature is 0 or 0.01 to 2, n 1 to 128, and 1 at temperature 0")
    if task.budget > room:
        raise BadRow(f"prompt of {len(prompt.ids)} + {task.budget} new tokens exceed the context "
                     f"{config.max_position_embeddings}")
    return SimpleNamespace(prompt=prompt, task=task, future=Future())


def completion(model: str, request: SimpleNamespace, said: list[dict]) -> dict:
    """The answer in OpenAI's form."""
    read, new = len(request.prompt.ids), sum(x["tokens"] for x in said)
    return {"id": f"chatcmpl-{id(request):x}", "object": "chat.completion", "created": int(time.time()), "model": model,
            "choices": [{"index": k, "message": {"role": "assistant", "content": x["text"]},
                         "finish_reason": "length" if x["truncated"] else "stop"} for k, x in enumerate(said)],
            "usage": {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}}


class Server(ThreadingHTTPServer):
    request_queue_size = 1024  # connections that may come at once


def listening(c: Config, name: str, tok: Tokenizer, config: ModelConfig, waiting: queue.Queue) -> Server:
    """Every connection has a thread of its own, which puts requests into `waiting` and sends their answers."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm, timeout = "HTTP/1.1", True, 600

        def reply(self, status: int, what: dict | str) -> None:
            what = {"error": {"message": what, "type": "error"}} if isinstance(what, str) else what
            data = json.dumps(what).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path.rstrip("/") != "/v1/models":
                return self.reply(404, "there is GET /v1/models and POST /v1/chat/completions")
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "innovator"}]})

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > 2 ** 28:
                self.close_connection = True  # what follows is not read
                return self.reply(411, "Content-Length is missing, or above 256 MiB")
            body = self.rfile.read(int(length))
            if self.path.rstrip("/") != "/v1/chat/completions":
                return self.do_GET()
            try:
                request = understood(body, c, tok, config)
            except Exception as e:  # whatever a request can hold
                return self.reply(400, str(e) if isinstance(e, BadRow) else f"{type(e).__name__}: {e}")
            waiting.put(request)
            try:
                while not wait([request.future], 1).done:
                    if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                        return request.future.cancel()  # whoever asked has left
                answer = completion(name, request, request.future.result()["responses"])
            except Exception as e:
                return self.reply(500, f"{type(e).__name__}: {e}")
            self.reply(200, answer)

        def handle(self):  # whoever asked may leave
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, *_):
            pass
    try:
        return Server((c.host, c.serve), Handler)
    except OSError as e:
        raise UserError(f"--serve {c.serve} at {c.host}: {e.strerror}") from None


def serve(c: Config, folder: Path, name: str, tok: Tokenizer, dtype: torch.dtype, device: torch.device) -> None:
    """Until it is interrupted. The engine stays in this thread and answers the requests of one sampling together."""
    waiting, config = queue.Queue(), config_of(folder)
    server = listening(c, name, tok, config, waiting)  # a port in use shows before the weights are loaded
    kind = c.engine if c.engine != "auto" else "vllm" if device.type == "cuda" else "torch"
    engine = engines.of_checkpoint(folder, kind, dtype, device, batch=c.batch, context=config.max_position_embeddings,
                                   memory=0.8, optimize="graphs", seed=c.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"serving {name} with {kind} on {device.type}: http://{c.host}:{c.serve}/v1 (Ctrl-C ends)", flush=True)
    held, together = [], c.batch
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(engine):
        for number in itertools.count():
            while not held:  # NOTE with a limit: a Ctrl-C that another thread gets does not wake this one
                with contextlib.suppress(queue.Empty):
                    held = [waiting.get(timeout=0.5)]
            time.sleep(0.01)  # others are on their way
            while not waiting.empty():
                held.append(waiting.get())
            same = [r for r in held if r.task == held[0].task]
            held = [r for r in held if r.task != same[0].task] + same[together:]
            some = [r for r in same[:together] if r.future.running() or r.future.set_running_or_notify_cancel()]
            try:
                for done in engines.respond(engine, tok, same[0].task, together, c.seed,
                                            [(number, [(r, r.prompt) for r in some])] if some else []):
                    for r, responses in done:
                        r.future.set_result(responses)
            except Exception as e:  # the server goes on
                failed = [r for r in some if not r.future.done()]
                if isinstance(e, torch.OutOfMemoryError) and len(some) > 1:
                    together, held = len(some) // 2, failed + held
                else:
                    for r in failed:
                        r.future.set_exception(e)


def main() -> None:
    given = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    options, words = split_words(sys.argv[1 + given:])
    c = common.parse(Config, options, __doc__)
    assert given, "usage: python chat.py CHECKPOINT [--image FILE ...] [question]; -h lists the options"
    folder = checkpoint_folder(sys.argv[1])
    if not (folder / "config.json").exists():
        raise UserError(f"{sys.argv[1]}: no checkpoint there; give a Hugging Face folder or the folder of a run")
    device = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        c.dtype if c.dtype != "auto" else "bf16" if device == "cuda" else "fp32"]
    tok = Tokenizer(folder)
    if c.serve:
        assert not words and not c.image, "--serve takes no question"
        return serve(c, folder, Path(sys.argv[1]).resolve().name, tok, dtype, torch.device(device))
    images = [opened(file, tok) for file in c.image]
    model = Innovator.from_pretrained(folder, dtype, device)
    assert not images or model.visual is not None, f"{folder} is a text model: it takes no --image"
    sys.stdout.reconfigure(errors="replace")
    if not words:
        sys.stdin.reconfigure(errors="replace")

    first = [{"role": "system", "content": c.system}] if c.system else []
    messages, shown, waiting, talk = list(first), [], images, sys.stdin.isatty()
    while True:
        try:
            text = " ".join(words) or input("> " if talk else "")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            if talk:
                break
            continue
        try:
            if text.strip() == "/new":
                messages, shown, waiting = list(first), [], []
            elif text.startswith("/image "):
                assert model.visual is not None, f"{folder} is a text model: it takes no pictures"
                waiting = waiting + [opened(text.removeprefix("/image ").strip(), tok)]
            else:
                question = {"role": "user",
                            "content": "<image>\n" * len(waiting) + text.replace("<image>", "< image >")}
                reply = answer(model, tok, c, [*messages, question], shown + waiting)
                messages += [question, {"role": "assistant", "content": reply}]
                shown, waiting = shown + waiting, []
        except (UserError, AssertionError, BadRow) as e:  # in a conversation a turn that fails is dropped
            if words or not talk:
                raise UserError(str(e)) from None
            print(f"error: {e} (/new starts over)", file=sys.stderr)
        if words:
            break


if __name__ == "__main__":
    common.run(main)
