"""Images, chat template, readers of the published formats, packing and the loader.

    python data.py check PATH --tokenizer DIR   reads and decodes every row; lists the bad ones; exit 1 if there are any
    python data.py stats PATH --tokenizer DIR   rows, tokens, image sizes, share supervised, fill of the packing
    python data.py pack  PATH --tokenizer DIR --out plan.npz    measures all rows once; train_sft.py --plan plan.npz

A row of a file becomes one or more documents (token ids, labels, images). Documents are packed, never split. The order
of packs depends on (seed, epoch) only: not on the number of ranks or workers. Formats, by content: LLaVA json,
mid-training / Instruct-46M / RL-172K parquet, packed and SFT webdataset tars, jsonl of messages,
question/answer or text.

References: Qwen2VLImageProcessor; the released task encoder (Innovator-VL), report arXiv:2601.19325.

Departures
1. Packed webdataset rows are taken apart and packed anew each epoch: the same pairs, better filled, freshly mixed.
2. Stage 2 resizes three times (the second one nearest-neighbour). Here the same final grid is computed and the picture
   is resized once, bicubic.
3. A row is bad where the released loader would skip it silently (image and <image> counts differ), train on nothing
   (an empty answer), cut it (longer than seq_len), or get nothing from it (an image side under 2 pixels).
4. Repeated ids are reported by `check` and left out by `pack`; an unplanned run does not look for them.
5. RL-172K rows read as SFT data answer with <answer>...</answer>, the form that their prompts ask for.

Letters: T tokens, S supervised rows, P patches, M merged image tokens, N images.
"""
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import tarfile
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from PIL import Image
from tqdm import tqdm

from common import UserError, command, parse, rank, run, world

PATCH, MERGE = 14, 2
FACTOR = PATCH * MERGE
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = "You are a helpful assistant."
THINK_PROMPT = ("Think and solve the following question step by step. Please put your thinking and analysis procedure "
                "within <think></think>. Put ONLY your final answer within <answer></answer>.")
ANSWER_PROMPT = "Put ONLY your final answer within <answer></answer>."


class BadRow(Exception):
    """A row that cannot become documents; str() is the reason, row_id its own id where it could be read."""
    row_id = ""


# ---- images ---------------------------------------------------------------------------------------------------------
@dataclass
class Limits:
    min_pixels: int = 56 * 56  # area that smaller images are enlarged to
    max_pixels: int = 1600 * 1600  # area that larger images are reduced to
    max_side: int = 0  # longest side before that, 0: free (stage 2: 1000)


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Both sides to multiples of 28, the area into the limits, the aspect ratio nearly kept (Qwen2-VL)."""
    if max(height, width) / min(height, width) > 200:
        raise BadRow(f"image of {width} x {height} pixels: aspect ratio over 200")
    h, w = (max(FACTOR, round(x / FACTOR) * FACTOR) for x in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(FACTOR, math.floor(x / beta / FACTOR) * FACTOR) for x in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(x * beta / FACTOR) * FACTOR for x in (height, width))
    return h, w


def target_size(width: int, height: int, limits: Limits) -> tuple[int, int]:
    """The (height, width) that an image is resized to, in the limits of a stage."""
    if min(width, height) < 2:
        raise BadRow(f"image of {width} x {height} pixels")
    if limits.max_side:  # stage 2: processor limits of 16384 tokens, then the longest side, then the processor
        height, width = smart_resize(height, width, 4 * FACTOR ** 2, 16384 * FACTOR ** 2)
        if max(height, width) > limits.max_side:
            scale = limits.max_side / max(height, width)
            height, width = (max(FACTOR, int(x * scale)) for x in (height, width))
    return smart_resize(height, width, limits.min_pixels, limits.max_pixels)


def open_image(source, k: int = 0) -> Image.Image:
    """Opens without decoding: PIL image, bytes or path."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes) and not source:
        raise BadRow(f"image {k} has no bytes")
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise BadRow(f"image file {source} not found") from None
    except Exception as e:  # PIL raises many kinds on damaged files
        raise BadRow(f"image {k} cannot be opened: {type(e).__name__}: {str(e).split(' <')[0]}") from None


def patchify(image: Image.Image, size: tuple[int, int], k: int = 0) -> np.ndarray:
    """RGB, bicubic to size (h, w), cut into 14x14 patches in merge-window order. -> [P, 588] uint8, channel first"""
    h, w = size
    try:
        image = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    except Exception as e:
        raise BadRow(f"image {k} cannot be decoded: {type(e).__name__}: {e}") from None
    x = np.asarray(image).reshape(h // FACTOR, MERGE, PATCH, w // FACTOR, MERGE, PATCH, 3)
    return x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


def normalise(pixels_u8, dtype=None):
    """[P, 588] uint8 tensor -> (x / 255 - mean) / std per channel, fp32 (then `dtype`), on the tensor's device."""
    import torch
    mean, std = (torch.tensor(v, device=pixels_u8.device).repeat_interleave(PATCH * PATCH) for v in (MEAN, STD))
    x = (pixels_u8.float() * (1 / 255) - mean) / std
    return x if dtype is None else x.to(dtype)


# ---- tokenizer and chat template ------------------------------------------------------------------------------------
class Tokenizer:
    """tokenizer.json of a checkpoint folder (or the file itself) and the ids of Qwen's special tokens."""
    def __init__(self, path):
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        if not self.path.exists():
            raise UserError(f"{self.path}: no tokenizer there; give a folder or file with --tokenizer")
        self.raw = tokenizers.Tokenizer.from_file(str(self.path))
        ids = {t: self.raw.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                                                    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")}
        missing = [t for t, i in ids.items() if i is None]
        if missing:
            raise UserError(f"{self.path}: lacks the special tokens {', '.join(missing)}")
        (self.pad, self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad,
         self.video_pad) = ids.values()
        self.size = self.raw.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.raw.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_ids(self) -> dict:
        """For ModelConfig.token_ids."""
        return dict(bos_token_id=self.pad, eos_token_id=self.im_end, vision_start_token_id=self.vision_start,
                    vision_end_token_id=self.vision_end, image_token_id=self.image_pad, video_token_id=self.video_pad)


def encode_chat(messages: list[dict], image_tokens: list[int], tok: Tokenizer, generate: bool = False):
    """ChatML ids and labels (-100 where not trained), both [T]; image k is image_tokens[k] times <|image_pad|>.

    Every message is tokenised on its own: prompt parts (system, user, "<|im_start|>assistant\\n") are masked, each
    assistant text and its <|im_end|> is trained; the newline between turns is masked and none follows the last turn.
    generate=True ends after "<|im_start|>assistant\\n" of the last user turn.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    counts = iter(image_tokens)
    ids, labels, source = [], [], ""
    for m in messages:
        text = m["content"]
        if m["role"] == "assistant":
            answer = tok.encode(text + "<|im_end|>")
            prompt = tok.encode(source)
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
            source = "\n"
            continue
        if m["role"] == "user":
            head, *rest = text.split("<image>")
            text = head + "".join("<|vision_start|>" + "<|image_pad|>" * next(counts) + "<|vision_end|>" + r
                                  for r in rest)
        source += f"<|im_start|>{m['role']}\n{text}<|im_end|>\n"
        if m["role"] == "user":
            source += "<|im_start|>assistant\n"
    if generate:
        ids += tok.encode(source)
        labels += [-100] * (len(ids) - len(labels))
    return ids, labels


@dataclass
class Doc:
    """One document: what is packed."""
    ids: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32, -100 where not trained (not shifted)
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # (1, h, w) patches per image
    pixels: np.ndarray | None = None  # [P, 588] uint8, if decoded
    group: str = ""  # discipline, where the row says one
    row_id: str = ""  # the row's own id


def encode(messages: list[dict], images: list, tok: Tokenizer, limits: Limits, generate: bool = False,
           decode: bool = True) -> Doc:
    """Messages and images (PIL, bytes or paths) to a document. decode=False leaves pixels out: lengths need only
    headers."""
    tags = sum(m["content"].count("<image>") for m in messages if m["role"] == "user")
    if tags != len(images):
        raise BadRow(f"{tags} <image> tag(s) but {len(images)} image(s)")
    opened = [open_image(im, k) for k, im in enumerate(images)]
    sizes = [target_size(*im.size, limits) for im in opened]
    grids = [(1, h // PATCH, w // PATCH) for h, w in sizes]
    ids, labels = encode_chat(messages, [h * w // MERGE ** 2 for _, h, w in grids], tok, generate)
    ids = np.array(ids, dtype=np.int32)
    expected = sum(h * w for _, h, w in grids) // MERGE ** 2
    if (found := int((ids == tok.image_pad).sum())) != expected:
        raise BadRow(f"the text itself holds {found - expected} <|image_pad|> tokens")
    pixels = None
    if decode and images:
        pixels = np.concatenate([patchify(im, size, k) for k, (im, size) in enumerate(zip(opened, sizes))])
    return Doc(ids, np.array(labels, dtype=np.int32), grids, pixels)


# ---- rows -----------------------------------------------------------------------------------------------------------
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Row:
    id: str
    parts: list[tuple[list[dict], list]]  # (messages, images) each; a packed webdataset row has several
    text: str | None = None  # plain text instead: pretraining
    group: str = ""
    raw: dict = field(default_factory=dict)  # the row as read, without images


def _messages(turns) -> list[dict]:
    if not turns:
        raise BadRow("no conversation" if turns is None else "the conversation is empty")
    out = []
    for k, turn in enumerate(turns):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in ROLES:
            raise BadRow(f"message {k}: speaker {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise BadRow(f"message {k}: no text")
        out.append({"role": ROLES[role], "content": text})
    body = out[1:] if out[0]["role"] == "system" else out
    for k, m in enumerate(body):
        if m["role"] != ("user", "assistant")[k % 2]:
            raise BadRow(f"message {k + len(out) - len(body)} is the {m['role']}'s; turns must go user, assistant, ...")
        if m["role"] == "assistant" and not m["content"].strip():
            raise BadRow(f"message {k + len(out) - len(body)}: the answer is empty")
    if len(body) % 2 or not body:
        raise BadRow("the last message is not the assistant's")
    return out


def _images(value, base: Path) -> list:
    """image(s) of a row: null, a file name, {bytes, path}, or a list of these."""
    out = []
    for v in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(v, dict):
            v = v["bytes"] if v.get("bytes") is not None else v.get("path")
            if v is None:
                raise BadRow(f"image {len(out)} has neither bytes nor path")
        out.append(v if isinstance(v, bytes) else base / v)
    return out


def rl_prompt(row: dict) -> str:
    """User text of an RL-172K row: the released prefix by prompt_type, optional guidance, the problem."""
    if row["prompt_type"] == "normal":
        return f"{ANSWER_PROMPT}\n{row['problem']}"
    guidance = f" {row['format_guidance']}\n" if row.get("format_guidance") else "\n"
    if row["problem_type"] == "spatial-reasoning":
        guidance = (" Please first generate the coordinates (x, y, x, y) of each relevant object mentioned in the "
                    "problem.\n")
    return THINK_PROMPT + guidance + row["problem"]


def row_of(raw: dict, key: str, base: Path) -> Row:
    """Recognises a published format by its fields."""
    group = str(raw.get("discipline") or raw.get("data_source") or raw.get("source") or "")
    row = Row(str(raw.get("id", key)), [], group=group,
              raw={k: v for k, v in raw.items() if k not in ("image", "images", "members")})
    if "prompts" in raw:  # packed webdataset
        images = iter(_tar_images(raw, raw.get("images")))
        for prompt, caption in zip(raw["prompts"], raw["captions"], strict=True):
            messages = _messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}])
            row.parts.append((messages, list(itertools.islice(images, prompt.count("<image>")))))
        if left := len(list(images)):
            raise BadRow(f"{left} image(s) more than <image> tags")
    elif "texts" in raw:  # SFT webdataset
        row.parts.append((_messages(raw["texts"]), _tar_images(raw, raw.get("name"))))
    elif "caption" in raw:  # mid-training: the user says only "<image>"
        messages = _messages([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": raw["caption"]}])
        row.parts.append((messages, _images(raw["image"], base)))
    elif "problem" in raw:  # RL-172K
        answer = raw["answer"][0] if isinstance(raw["answer"], list) and raw["answer"] else raw["answer"] or ""
        messages = _messages([{"role": "user", "content": rl_prompt(raw)},
                              {"role": "assistant", "content": f"<answer>{answer}</answer>" if answer else ""}])
        row.parts.append((messages, _images(raw["images"], base)))
    elif "question" in raw and "answer" in raw:
        messages = _messages([{"role": "user", "content": raw["question"]},
                              {"role": "assistant", "content": str(raw["answer"])}])
        row.parts.append((messages, _images(raw.get("image"), base)))
    elif "text" in raw:
        if not isinstance(raw["text"], str) or not raw["text"].strip():
            raise BadRow("the text is empty")
        row.text = raw["text"]
    else:
        turns = raw.get("conversations", raw.get("messages"))
        row.parts.append((_messages(turns), _images(raw.get("image", raw.get("images")), base)))
    return row


def _tar_images(raw: dict, names) -> list[bytes]:
    """The images that a webdataset json names: by file name, else img0, img1, ... in order."""
    members = raw["members"]
    if names is None:
        raise BadRow("the json has no list of images")
    out = []
    for k, name in enumerate(names):
        data = members.get(Path(name).name, members.get(f"img{k}.jpg") if "prompts" in raw else None)
        if data is None:
            raise BadRow(f"image {name} is not in the archive")
        out.append(data)
    if extra := len(members) - len(out):
        raise BadRow(f"the archive holds {extra} image(s) that the json does not name")
    return out


# ---- readers: random access to one file -----------------------------------------------------------------------------
class JsonFile:
    def __init__(self, path: Path):
        try:
            self.rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"{path}: not valid JSON ({e}); the file is cut or damaged") from None
        if not isinstance(self.rows, list):
            raise UserError(f"{path}: a list of rows is needed, this is a {type(self.rows).__name__}")
        self.count = len(self.rows)

    def raw(self, i: int) -> dict:
        return self.rows[i]


class JsonlFile:
    def __init__(self, path: Path):
        self.path, data = path, gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else None
        if data is None:
            with open(path, "rb") as f:
                lines = [len(line) for line in f]
        else:
            self.data, lines = data, [len(line) for line in io.BytesIO(data)]
        self.offsets = np.concatenate([[0], np.cumsum(lines, dtype=np.int64)])
        self.count = len(lines)

    def raw(self, i: int) -> dict:
        start, stop = self.offsets[i], self.offsets[i + 1]
        if self.path.suffix == ".gz":
            line = self.data[start:stop]
        else:
            with open(self.path, "rb") as f:
                f.seek(start)
                line = f.read(stop - start)
        if not line.strip():
            raise BadRow("the line is empty")
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise BadRow(f"the line is not UTF-8 (byte {e.start})") from None
        except ValueError as e:
            raise BadRow(f"the line is not valid JSON ({e})") from None
        if not isinstance(value, dict):
            raise BadRow("the line is not a JSON object")
        return value


class ParquetFile:
    def __init__(self, path: Path):
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: not a readable parquet file ({str(e).splitlines()[0]}); "
                            "download or copy it again") from None
        groups = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
        self.count = int(self.starts[-1])
        self.cached = (None, None)

    def raw(self, i: int) -> dict:
        g = int(np.searchsorted(self.starts, i, side="right")) - 1
        if self.cached[0] != g:  # NOTE one row group stays in memory per open file and worker
            self.cached = (g, self.file.read_row_group(g))
        return self.cached[1].slice(i - int(self.starts[g]), 1).to_pylist()[0]


class TarFile:
    """Samples are members that share the name up to the first dot. The index holds byte ranges; data is read on
    demand."""
    def __init__(self, path: Path):
        self.path, self.problems = path, []
        samples, size = {}, path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for m in tar:
                    if not m.isfile():
                        continue
                    folder, name = os.path.split(m.name)
                    key, _, rest = name.partition(".")
                    samples.setdefault(os.path.join(folder, key), {})[rest] = (m.offset_data, m.size)
        except tarfile.TarError as e:
            self.problems.append(("end of file", f"the archive is cut or damaged ({e}); download or copy it again"))
        for key, members in list(samples.items()):
            if any(start + n > size for start, n in members.values()):
                del samples[key]
                self.problems.append((key, "the archive ends inside this sample"))
        self.samples, self.count = list(samples.items()), len(samples)

    def raw(self, i: int) -> dict:
        key, members = self.samples[i]
        if "json" not in members:
            raise BadRow("the sample has no .json member")
        with open(self.path, "rb") as f:
            def read(where):
                f.seek(where[0])
                return f.read(where[1])
            try:
                raw = json.loads(read(members["json"]))
            except ValueError as e:
                raise BadRow(f"its .json member is not valid JSON ({e})") from None
            raw["members"] = {name: read(where) for name, where in members.items() if name != "json"}
        raw.setdefault("id", key)
        return raw


READERS = {".json": JsonFile, ".jsonl": JsonlFile, ".jsonl.gz": JsonlFile, ".parquet": ParquetFile, ".tar": TarFile}


def data_files(paths: list) -> list[Path]:
    """Data files of the given files and folders, sorted; hidden folders (.nv-meta) are left out."""
    out = []
    for p in map(Path, paths):
        if not p.exists():
            raise UserError(f"{p}: no such file or folder")
        inside = [f for f in sorted(p.rglob("*"))
                  if f.is_file() and not any(x.startswith(".") for x in f.relative_to(p).parts)]
        found = [f for f in (inside if p.is_dir() else [p]) if f.name.endswith(tuple(READERS))]
        if not found:
            raise UserError(f"{p}: no {', '.join(READERS)} file there")
        out += found
    return out


class Dataset:
    """Rows of many files under one index. Files open on first use; `problems` holds (file, row, reason) of damaged
    files."""
    def __init__(self, paths: list[str], counts: list[int] | None = None):
        given = [data_files([p]) for p in paths]
        self.paths, self.files, self.problems = [f for files in given for f in files], {}, []
        if counts is None:
            counts = []
            for k, path in enumerate(self.paths):
                try:
                    counts.append(self.file(k).count)
                    self.problems += [(str(path), key, why) for key, why in getattr(self.files[k], "problems", [])]
                except UserError as e:
                    self.problems.append((str(path), "-", str(e).removeprefix(f"{path}: ")))
                    counts.append(0)
        self.counts = counts
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.ranges = self.starts[np.cumsum([0] + [len(files) for files in given])]  # rows of the p-th path: [p], [p+1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def file(self, k: int):
        if k not in self.files:
            path = self.paths[k]
            self.files[k] = next(r for end, r in READERS.items() if path.name.endswith(end))(path)
            if len(self.files) > 64:  # keep few files open
                self.files.pop(next(iter(self.files)))
        return self.files[k]

    def where(self, i: int) -> tuple[int, int]:
        k = int(np.searchsorted(self.starts, i, side="right")) - 1
        return k, i - int(self.starts[k])

    def name(self, i: int) -> tuple[str, str]:
        """File and row of an index, for messages when the row itself cannot be read."""
        k, j = self.where(i)
        return str(self.paths[k]), f"line {j + 1}" if ".jsonl" in self.paths[k].name else f"row {j}"

    def row(self, i: int) -> Row:
        k, j = self.where(i)
        raw = self.file(k).raw(j)
        try:
            return row_of(raw, self.name(i)[1], self.paths[k].parent)
        except BadRow as e:
            e.row_id = str(raw.get("id", ""))
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise BadRow(f"fields are not those of a known format ({type(e).__name__}: {e}); "
                         f"it has {sorted(raw)}") from None


# ---- documents of a row ---------------------------------------------------------------------------------------------
@dataclass
class Source:
    """What a worker needs to turn row numbers into documents. disciplines: the only labels rows may have."""
    paths: list[str]
    tokenizer: str
    limits: Limits
    seq_len: int
    disciplines: list[str] | None = None
    counts: list[int] | None = None

    def open(self) -> "Source":
        self.data, self.tok = Dataset(self.paths, self.counts), Tokenizer(self.tokenizer)
        return self

    def docs(self, i: int, decode: bool, parts: list[int] | None = None) -> list[Doc]:
        """Documents of row i; plain text is cut into pieces of seq_len tokens, everything else stays whole."""
        row = self.data.row(i)
        try:
            self.check_label(row)
            if row.text is not None:
                ids = np.array(self.tok.encode(row.text) + [self.tok.pad], dtype=np.int32)
                out = [Doc(p, p) for p in np.split(ids, range(self.seq_len, len(ids), self.seq_len))]
            else:
                out = [encode(m, im, self.tok, self.limits, decode=decode and (parts is None or k in parts))
                       for k, (m, im) in enumerate(row.parts)]
            for doc in out:
                doc.group, doc.row_id = row.group, row.id
                if len(doc.ids) > self.seq_len:
                    raise BadRow(f"{len(doc.ids)} tokens, longer than seq_len {self.seq_len}")
        except BadRow as e:
            e.row_id = row.id
            raise
        return out

    def check_label(self, row: Row) -> None:
        if self.disciplines is not None and row.group not in self.disciplines:
            e = BadRow("the row has no discipline label" if not row.group else
                       f"discipline {row.group!r} owns no experts; the model has {', '.join(self.disciplines)}")
            e.row_id = row.id
            raise e

    def check_labels(self) -> None:
        """Reads every row's label before anything is trained, each rank its part; the first that is missing or unknown
        is an error."""
        for i in tqdm(range(rank(), len(self.data), world()), desc="labels", disable=None):
            try:
                self.check_label(self.data.row(i))
            except BadRow as e:
                raise UserError("{file}, {row} ({at}): {reason}".format_map(self.bad(i, e))) from None

    def bad(self, i: int, e: BadRow) -> dict:
        file, at = self.data.name(i)
        return {"file": file, "row": e.row_id or at, "at": at, "reason": str(e)}


_source: Source | None = None  # of this worker process


def _start_worker(source: Source) -> None:
    global _source
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no worker outlives its parent
    _source = source.open()


@dataclass
class Measured:
    """What is known of some rows without keeping their documents."""
    items: np.ndarray  # [documents, 5] row, part, tokens, patches, sum of squared patches of an image
    bad: list[dict]
    ids: list[tuple[int, str]]  # (row, its own id)
    supervised: int = 0
    images: int = 0


def _measure(source: Source | None, rows: list[int], decode: bool = False) -> Measured:
    source, items, out = source or _source, [], Measured(None, [], [])
    for i in rows:
        try:
            docs = source.docs(i, decode)
        except BadRow as e:
            out.bad.append(source.bad(i, e))
            continue
        out.ids.append((i, docs[0].row_id))
        for part, doc in enumerate(docs):
            n = [h * w for _, h, w in doc.grids]
            items.append((i, part, len(doc.ids), sum(n), sum(x * x for x in n)))
            out.supervised += int((doc.labels[1:] != -100).sum())
            out.images += len(n)
    out.items = np.array(items, dtype=np.int64).reshape(-1, 5)
    return out


@dataclass
class PackData:
    """A pack on the host; model.Pack once on the device."""
    ids: np.ndarray  # [T] int32
    lengths: list[int]
    rows: np.ndarray  # [S]
    targets: np.ndarray  # [S]
    weights: np.ndarray  # [S] fp32
    denominator: float  # its share of the loss's denominator: tokens, packs or documents
    pixels: np.ndarray | None
    grids: list
    image_rows: np.ndarray
    names: list[str]  # file:row#part of every document
    groups: list[str]
    bad: list[dict]
    tokens: int  # real tokens, without padding


def collate(docs: list[Doc], tok_pad: int, image_pad: int, pad_to: int, average: str, vision: bool, names=(),
            bad=()) -> PackData:
    """Lays documents end to end. pad_to: one more, unsupervised document fills the pack to this many tokens
    (0: none)."""
    T = sum(len(d.ids) for d in docs)
    padding = [np.full(max(pad_to - T, 0 if T else 1), tok_pad, dtype=np.int32)]  # an empty pack still has one token
    ids = np.concatenate([d.ids for d in docs] + padding)
    rows, targets, weights, start = [], [], [], 0
    for d in docs:
        at = np.flatnonzero(d.labels[1:] != -100)  # row t predicts token t + 1
        rows.append(at + start)
        targets.append(d.labels[1:][at])
        weights.append(np.full(len(at), 1 / max(len(at), 1) if average == "document" else 1, dtype=np.float32))
        start += len(d.ids)
    rows, targets, weights = (np.concatenate([*x, np.zeros(0, np.int64)]) for x in (rows, targets, weights))
    if average == "pack":
        weights = weights / max(len(rows), 1)
    denominator = {"token": len(rows), "pack": float(len(rows) > 0), "document": len(docs)}[average]
    pixels = [d.pixels for d in docs if d.pixels is not None]
    grids = [g for d in docs for g in d.grids]
    # NOTE a policy may say <|image_pad|>: only those of the prompt stand for image rows
    asked = np.concatenate([d.labels == -100 for d in docs] + [np.ones(len(p), bool) for p in padding])
    if vision and not grids:  # every rank runs the tower in every micro-batch, so that collectives line up
        pixels, grids = [np.zeros((MERGE * MERGE, 3 * PATCH * PATCH), np.uint8)], [(1, MERGE, MERGE)]
    return PackData(ids, [len(d.ids) for d in docs] + [len(p) for p in padding if len(p)], rows.astype(np.int64),
                    targets.astype(np.int64), weights.astype(np.float32), denominator,
                    np.concatenate(pixels) if pixels else None, grids,
                    np.flatnonzero((ids == image_pad) & asked), list(names),
                    [d.group for d in docs], list(bad), T)


def pack_of(source: Source | None, items: np.ndarray, pad_to: int, average: str, vision: bool) -> PackData:
    """Reads, decodes and collates the documents (row, part, ...) of one pack."""
    source = source or _source
    docs, names, bad = [], [], []
    for i, group in itertools.groupby(items.tolist(), key=lambda item: item[0]):
        parts = [item[1] for item in group]
        try:
            got = source.docs(i, True, parts)
            docs += [got[p] for p in parts]
            names += [f"{':'.join(source.data.name(i))}#{p}" for p in parts]
        except BadRow as e:  # its header was fine, its pixels are not
            bad.append(source.bad(i, e))
    return collate(docs, source.tok.pad, source.tok.image_pad, pad_to, average, vision, names, bad)


def labels_of(p: PackData, disciplines: list[str]) -> np.ndarray:
    """The discipline of every token [T]: its number, S for others, S + 1 for padding (moe.routing_losses)."""
    number = {name: k for k, name in enumerate(disciplines)}
    per_doc = [number.get(g, len(number)) for g in p.groups]
    return np.repeat(per_doc + [len(number) + 1] * (len(p.lengths) - len(per_doc)), p.lengths)


def to_device(p: PackData, device, impl: str, dtype, disciplines: list[str] | None = None):
    """PackData -> model.Pack; pixels travel as bytes and are normalised on the device. disciplines: label the tokens.
    """
    import torch
    from kernels.attention import Documents
    from model import Pack
    def put(x): return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
    docs = Documents.of(p.lengths, device, impl)
    pixels = None if p.pixels is None else normalise(put(p.pixels), dtype)
    return Pack(put(p.ids.astype(np.int64)), docs, docs.positions().to(device, non_blocking=True), put(p.rows),
                put(p.targets), put(p.weights), pixels, p.grids, put(p.image_rows),
                labels=None if disciplines is None else put(labels_of(p, disciplines)))


# ---- packing --------------------------------------------------------------------------------------------------------
def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Packs items into as few bins as best-fit-decreasing finds: longest first, each into the fullest bin that
    has room.

    Counts instead of items: all items of one length are one run; open bins are kept by the room left in them and a bit
    mask finds the smallest room that fits, so one step fills many bins. Returns the item numbers of each bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= capacity), \
        f"lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity}"
    order = np.argsort(-lengths, kind="stable")
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_bins, rooms, bins, at = {}, 0, 0, 0  # room left -> bins; bit mask of the rooms; number of bins; items placed
    values, counts = np.unique(-lengths, return_counts=True)
    for n, left in zip((-values).tolist(), counts.tolist()):
        while left:
            fit = rooms >> n
            room = n + (fit & -fit).bit_length() - 1 if fit else capacity
            each = min(left, room // n)  # a bin takes as many as fit: what remains of it is the best fit for the next
            take = left // each
            if fit:
                have = open_bins[room]
                chosen = have[-take:]
                del have[-take:]
                if not have:
                    rooms ^= 1 << room
            else:
                chosen = list(range(bins, bins + take))
                bins += take
            used = each * len(chosen)
            bin_of[order[at:at + used]] = np.repeat(chosen, each)
            at, left, room = at + used, left - used, room - each * n
            if room:
                open_bins.setdefault(room, []).extend(chosen)
                rooms |= 1 << room
    by_bin = np.argsort(bin_of, kind="stable")
    return np.split(by_bin, np.cumsum(np.bincount(bin_of, minlength=bins))[:-1]) if bins else []


def costs(items: np.ndarray, packs: list[np.ndarray], weights: tuple[float, float, float, float]) -> np.ndarray:
    """Work of each pack: weights for tokens, squared tokens (attention), patches, squared patches."""
    n, p, p2 = items[:, 2].astype(float), items[:, 3], items[:, 4]
    each = weights[0] * n + weights[1] * n * n + weights[2] * p + weights[3] * p2
    return np.array([each[k].sum() for k in packs])


def deal(cost: np.ndarray, world: int) -> np.ndarray:
    """Divides packs among ranks: sorted by cost, each micro-step gets `world` neighbours, so that ranks wait little for
    each other, and the rank with least work so far gets its largest. -> [micro-steps, world] pack numbers"""
    order, load = np.argsort(-cost, kind="stable").reshape(-1, world), np.zeros(world)
    for step in order:
        ranks = np.argsort(load, kind="stable")
        step[ranks] = step.copy()
        load += cost[step]
    return order


def split_evenly(lengths: np.ndarray, cost: np.ndarray, capacity: int, world: int) -> list[np.ndarray]:
    """Packs one batch of documents into a multiple of `world` packs of nearly equal cost (longest job first)."""
    n = max(1, math.ceil(lengths.sum() / capacity / world)) * world
    while True:
        load, room = np.zeros(n), np.full(n, capacity)
        packs = [[] for _ in range(n)]
        for i in np.argsort(-cost, kind="stable"):
            fits = np.flatnonzero(room >= lengths[i])
            if not len(fits):
                break
            b = fits[load[fits].argmin()]
            packs[b].append(i)
            load[b] += cost[i]
            room[b] -= lengths[i]
        else:
            return [np.array(p, dtype=np.int64) for p in packs]
        n += world


# ---- loader ---------------------------------------------------------------------------------------------------------
@dataclass
class Step:
    """This rank's micro-batches of one optimizer step and the state after it."""
    packs: list[PackData]
    state: dict


class _Inline:
    """workers=0: runs at once, in this process."""
    def submit(self, fn, *args):
        f = Future()
        try:
            f.set_result(fn(*args))
        except Exception as e:
            f.set_exception(e)
        return f

    def shutdown(self, **_):
        pass


def _pool(source: Source, workers: int):
    """Worker processes that hold `source` open, or none."""
    if not workers:
        return _Inline()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data"])
    closed = replace(source)  # the fields alone, without open files
    return ProcessPoolExecutor(workers, context, _start_worker, (closed,))


def _problem(p: tuple[str, str, str]) -> dict:
    return {"file": p[0], "row": p[1], "at": p[1], "reason": p[2]}


@functools.lru_cache(maxsize=64)
def permutation(seed: int, n: int, *salt: int) -> np.ndarray:
    return np.random.default_rng([seed, *salt]).permutation(n)


class Loader:
    """Endless steps over the data, the same for every world size.

    Order: a permutation of the rows by (seed, epoch), or, with weights, rows of each path in these shares, each path
    permuted anew whenever it is used up; windows of the order are measured (headers and token counts only) and
    packed by best-fit-decreasing; the packs of a window are shuffled. A step takes the next `batch` packs (unit
    'packs') or packs exactly `batch` rows (unit 'rows'). With a plan the window is the whole data set and nothing is
    measured. A thread stays `prefetch` steps ahead; worker processes measure, read and decode.
    """
    def __init__(self, source: Source, batch: int, unit: str = "packs", *, seed: int = 0, rank: int = 0, world: int = 1,
                 workers: int = 0, prefetch: int = 4, window: int = 4096, plan: str | None = None, pad: bool = False,
                 average: str = "token", vision: bool = True, on_bad: str = "stop", max_bad: float = 0.01,
                 bad_file: Path | None = None, cost=(1.0, 0.0, 0.1, 0.0), shuffle: bool = True,
                 weights: list[float] | None = None):
        self.source = source.open()
        self.source.counts = self.source.data.counts
        assert unit == "rows" or batch % world == 0, f"batch {batch} packs does not divide over {world} ranks"
        self.batch, self.unit, self.seed, self.rank, self.world, self.shuffle = batch, unit, seed, rank, world, shuffle
        self.workers, self.prefetch, self.window = workers, prefetch, batch if unit == "rows" else window
        self.make = (source.seq_len if pad else 0, average, vision)
        self.on_bad, self.max_bad, self.bad_file, self.cost = on_bad, max_bad, bad_file, cost
        self.state = {"epoch": 0, "window": 0, "pack": 0, "seen": 0, "bad": {}}
        self.plan = load_plan(plan, source) if plan else None
        if weights:
            assert not plan, "weights and a packing plan exclude each other: a plan fixes the order of all rows"
            assert len(weights) == len(source.paths), f"{len(weights)} weights for {len(source.paths)} data paths"
            assert min(weights) >= 0 < sum(weights), f"weights {weights} must not be negative, nor all zero"
            for path, weight, n in zip(source.paths, weights, np.diff(source.data.ranges)):
                assert n or not weight, f"{path}: no rows, but weight {weight}"
        self.shares = np.cumsum([0.0, *weights]) / np.sum(weights) if weights else None
        if len(source.data) == 0:
            raise UserError(f"{', '.join(source.paths)}: no rows: "
                            + "; ".join(" ".join(p) for p in source.data.problems))

    def load_state(self, state: dict) -> None:
        self.state = json.loads(json.dumps(state))

    def _report(self, bad: list[dict], rows: int = 0) -> None:
        """Counts bad rows; stops at the first, or above the allowed share."""
        s = self.state_ahead
        s["seen"] += rows
        for b in bad:
            if self.on_bad == "stop":
                raise UserError(f"{b['file']}, {b['row']} ({b['at']}): {b['reason']}. "
                                "Mend it, or run with --on-bad skip")
            reason = "".join("#" if c.isdigit() else c for c in b["reason"])[:60]
            s["bad"][reason] = s["bad"].get(reason, 0) + 1
            if self.bad_file:
                with open(self.bad_file, "a") as f:
                    f.write(json.dumps(b, ensure_ascii=False) + "\n")
        n = sum(s["bad"].values())
        if bad and n > max(1, self.max_bad * max(s["seen"], 1000)):
            worst = ", ".join(f"{v} x {k}" for k, v in sorted(s["bad"].items(), key=lambda kv: -kv[1])[:4])
            raise UserError(f"{n} bad of {s['seen']} rows is more than --max-bad {self.max_bad}: {worst}; "
                            f"all are in {self.bad_file}")

    def _window(self, epoch: int, w: int) -> tuple[np.ndarray, bool]:
        """Rows of window w of an epoch, and whether the epoch ends with it. Weighted rows have one endless epoch."""
        n, W = len(self.source.data), self.window
        if self.shares is None:
            order = permutation(self.seed, n, epoch) if self.shuffle else np.arange(n)
            return order[w * W:(w + 1) * W], (w + 1) * W >= n
        until = lambda rows: np.diff(np.floor(rows * self.shares + 1e-9)).astype(np.int64)  # of each path, so far
        rows = []
        for k, (first, stop) in enumerate(zip(until(w * W), until((w + 1) * W))):
            start, count = self.source.data.ranges[k], self.source.data.ranges[k + 1] - self.source.data.ranges[k]
            rows += [start + permutation(self.seed, int(count), p // count, k)[p % count] for p in range(first, stop)]
        return np.random.default_rng([self.seed, epoch, w, 1]).permutation(rows).astype(np.int64), False

    def _steps(self, pool, source):
        """Yields (this rank's packs as item arrays, state after the step), endlessly."""
        s = self.state_ahead
        held = []  # packs of earlier windows that wait for a full step: (items, state after)
        if s["epoch"] == s["window"] == s["pack"] == 0:
            self._report([_problem(p) for p in self.source.data.problems])
        while True:
            n, epoch, w = len(self.source.data), s["epoch"], s["window"]
            rng = np.random.default_rng([self.seed, epoch, w])
            if self.plan is not None:
                items, last = rng.permutation(self.plan) if self.shuffle else self.plan, True
            else:
                rows, last = self._window(epoch, w)
                chunks = [rows[i:i + 64].tolist() for i in range(0, len(rows), 64)]
                got = [f.result() for f in [pool.submit(_measure, source, c) for c in chunks]]
                items = np.concatenate([g.items for g in got])
                self._report([b for g in got for b in g.bad] if s["pack"] == 0 else [],
                             len(rows) if s["pack"] == 0 else 0)
            after = {"epoch": epoch + last, "window": 0 if last else w + 1, "pack": 0}
            if self.unit == "rows":
                each = costs(items, list(np.arange(len(items))[:, None]), self.cost)
                packs = split_evenly(items[:, 2], each, self.source.seq_len, self.world) if len(items) else []
                s |= after
                if packs:
                    mine = deal(costs(items, packs, self.cost), self.world)[:, self.rank]
                    yield [items[packs[k]] for k in mine], dict(s, bad=dict(s["bad"]))
                continue
            packs = best_fit_decreasing(items[:, 2], self.source.seq_len)
            chosen = rng.permutation(len(packs)) if self.shuffle else np.arange(len(packs))
            for k in range(s["pack"], len(packs)):
                held.append(items[np.sort(packs[chosen[k]])])
                s |= after if k + 1 == len(packs) else {"pack": k + 1}
                if len(held) == self.batch:
                    whole = np.concatenate(held)
                    ends = np.cumsum([len(h) for h in held])
                    mine = deal(costs(whole, np.split(np.arange(len(whole)), ends[:-1]), self.cost),
                                self.world)[:, self.rank]
                    yield [held[m] for m in mine], dict(s, bad=dict(s["bad"]))
                    held = []
            if not packs:
                s |= after
            if last and not len(items) and self.plan is None and n <= self.window:
                raise UserError(f"{', '.join(self.source.paths)}: not one usable row in {n}")

    def __iter__(self):
        self.state_ahead = json.loads(json.dumps(self.state))
        pool = _pool(self.source, self.workers)
        source = None if self.workers else self.source
        ready, stop = queue.Queue(max(1, self.prefetch)), threading.Event()

        def put(x):
            while not stop.is_set():
                try:
                    return ready.put(x, timeout=0.2)
                except queue.Full:
                    continue

        def ahead():
            try:
                for packs, state in self._steps(pool, source):
                    put(([pool.submit(pack_of, source, p, *self.make) for p in packs], state))
                    if stop.is_set():
                        return
            except BaseException as e:  # the training loop raises it
                put((e, None))

        thread = threading.Thread(target=ahead, daemon=True)
        thread.start()
        try:
            while True:
                futures, state = ready.get()
                if isinstance(futures, BaseException):
                    raise futures
                packs = [f.result() for f in futures]
                if bad := [b for p in packs for b in p.bad]:
                    self._report(bad)
                    state["bad"] = dict(self.state_ahead["bad"])
                self.state = state
                yield Step(packs, state)
        except BrokenProcessPool:
            raise UserError("a data worker died (killed, or out of memory); use fewer --workers, "
                            "or run with --resume") from None
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            thread.join(timeout=30)  # a thread that is inside C++ when the interpreter ends would abort the process


# ---- plan -----------------------------------------------------------------------------------------------------------
def fingerprint(source: Source) -> str:
    """What a plan depends on: files with sizes, tokenizer, image limits, seq_len."""
    files = [(p.name, p.stat().st_size) for p in source.data.paths]
    text = json.dumps([files, hashlib.sha256(source.tok.path.read_bytes()).hexdigest(), vars(source.limits),
                       source.seq_len])
    return hashlib.sha256(text.encode()).hexdigest()


def load_plan(path: str, source: Source) -> np.ndarray:
    if not Path(path).exists():
        raise UserError(f"{path}: no such plan; make it with python data.py pack")
    with np.load(path) as z:
        if str(z["fingerprint"]) != fingerprint(source):
            raise UserError(f"{path}: was made for other files, tokenizer, image limits or seq_len; "
                            "run data.py pack again")
        return z["items"]


def survey(source: Source, workers: int, decode: bool) -> Measured:
    """Measures all rows; repeated ids are bad rows too, and their documents are left out."""
    source.open()
    source.counts = source.data.counts
    pool = _pool(source, workers)
    chunks = [list(range(i, min(i + 64, len(source.data)))) for i in range(0, len(source.data), 64)]
    futures = [pool.submit(_measure, None if workers else source, c, decode) for c in chunks]
    out, seen, kept = Measured(None, [_problem(p) for p in source.data.problems], []), set(), []
    for f in tqdm(futures, desc="rows", unit="x64", disable=None):
        m, repeated = f.result(), []
        for i, row_id in m.ids:  # ids are unique among the parquet files of a folder, and inside any other file
            path = source.data.paths[source.data.where(i)[0]]
            key = (path.parent if path.suffix == ".parquet" else path, row_id)
            if key in seen:
                repeated.append(i)
                file, at = source.data.name(i)
                m.bad.append({"file": file, "row": row_id, "at": at,
                              "reason": "the id was already used by an earlier row"})
            seen.add(key)
        kept.append(m.items[~np.isin(m.items[:, 0], repeated)])
        out.bad += m.bad
        out.supervised, out.images = out.supervised + m.supervised, out.images + m.images
    pool.shutdown()
    out.items = np.concatenate([*kept, np.zeros((0, 5), np.int64)])
    return out


@dataclass
class Config:
    tokenizer: str  # folder (or tokenizer.json) of the checkpoint
    seq_len: int = 8192  # tokens a pack
    min_pixels: int = 3136  # smallest image area
    max_pixels: int = 2560000  # largest image area
    max_side: int = 0  # longest image side first reduced to this (instruct: 1000; 0: off)
    workers: int = 0  # processes; 0: none
    out: str = ""  # check: file for the bad rows (jsonl); pack: the plan (npz)


def main() -> None:
    word = command(("check", "stats", "pack"), __doc__)
    if len(sys.argv) < 3 or sys.argv[2].startswith("-"):
        parse(Config, sys.argv[2:], __doc__)  # -h
        raise UserError(f"python data.py {word} PATH --tokenizer DIR: the path is missing")
    path = sys.argv[2]
    c = parse(Config, sys.argv[3:], __doc__)
    source = Source([path], c.tokenizer, Limits(c.min_pixels, c.max_pixels, c.max_side), c.seq_len)
    assert word != "pack" or c.out, "pack: say where the plan goes with --out plan.npz"
    found = survey(source, c.workers, decode=word == "check")
    items, bad, lengths = found.items, found.bad, found.items[:, 2]
    rows = len(source.data)
    print(f"{path}: {len(source.data.paths)} file(s), {rows} rows, {len(items)} documents, {found.images} images, "
          f"{len(bad)} bad")
    for b in bad[:50]:
        print(f"  bad: {b['file']}, {b['row']} ({b['at']}): {b['reason']}")
    if len(bad) > 50:
        print(f"  ... and {len(bad) - 50} more")
    if len(items) and word != "check":
        q = np.percentile(lengths, [0, 50, 90, 99, 100]).astype(int)
        packs = best_fit_decreasing(lengths, c.seq_len)
        print(f"tokens {lengths.sum()}, per document mean {lengths.mean():.0f}, min {q[0]}, median {q[1]}, "
              f"90% {q[2]}, 99% {q[3]}, max {q[4]}; image tokens {items[:, 3].sum() / 4 / lengths.sum():.1%}; "
              f"supervised {found.supervised / lengths.sum():.1%}")
        print(f"packed to {c.seq_len}: {len(packs)} packs, fill {lengths.sum() / len(packs) / c.seq_len:.4f} "
              "(a bound for the last, partly filled pack: "
              f"{lengths.sum() / math.ceil(lengths.sum() / c.seq_len) / c.seq_len:.4f}), "
              f"{len(items) / len(packs):.1f} documents a pack")
    if word == "pack":
        out = Path(c.out)
        tmp = out.with_name(f".{out.stem}.tmp.npz")
        np.savez_compressed(tmp, items=items, fingerprint=fingerprint(source))
        os.replace(tmp, out)
        print(f"wrote {out}; next: python train_sft.py --stage mid --data {path} --plan {out} ...")
    if word == "check":
        if c.out:
            Path(c.out).write_text("".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad))
            print(f"wrote {c.out}")
        print("all rows are good" if not bad else
              f"{len(bad)} bad rows of {rows}: train with --on-bad skip, or mend them")
        if bad:
            sys.exit(1)


if __name__ == "__main__":
    run(main)
