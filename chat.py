"""Talks to a checkpoint: one question on the command line, or a conversation.

    python chat.py runs/instruct --image cell.png What is in the middle of the picture?
    python chat.py runs/instruct                      # /image FILE adds a picture, /new starts over, an empty line ends
    python chat.py runs/instruct < questions.txt      # one line, one turn of the conversation

The answer streams to stdout. The checkpoint is a Hugging Face folder or the folder of a training run (its newest
checkpoint). Words that are not options are the question; --image takes the following names that end like a picture's.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import common
from common import UserError
from data import BadRow, Limits, Tokenizer, encode, normalise
from model import Innovator, checkpoint_folder

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

    def __post_init__(self):
        assert self.max_new_tokens > 0, f"--max-new-tokens {self.max_new_tokens} must be positive"
        assert self.temperature >= 0, f"--temperature {self.temperature} must not be negative"
        assert 0 < self.top_p <= 1, f"--top-p {self.top_p} must lie in 0..1, above 0"
        assert self.top_k >= 0, f"--top-k {self.top_k} must not be negative"


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
    prompt = encode(messages, images, tok, Limits(), generate=True)
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


def main() -> None:
    given = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    options, words = split_words(sys.argv[1 + given:])
    c = common.parse(Config, options, __doc__)
    assert given, "usage: python chat.py CHECKPOINT [--image FILE ...] [question]; -h lists the options"
    folder = checkpoint_folder(sys.argv[1])
    if not (folder / "config.json").exists():
        raise UserError(f"{sys.argv[1]}: no checkpoint there; give a Hugging Face folder or the folder of a run")
    device = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = c.dtype if c.dtype != "auto" else "bf16" if device == "cuda" else "fp32"
    tok = Tokenizer(folder)
    images = [opened(file, tok) for file in c.image]
    model = Innovator.from_pretrained(folder, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device)
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
