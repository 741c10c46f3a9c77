"""Images, chat template, readers, packing and loader."""
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED, launch, needs_shared
from PIL import Image
from safetensors.torch import load_file

import data
from common import UserError
from data import (BadRow, Dataset, Limits, Loader, Source, Tokenizer, best_fit_decreasing, costs, deal, encode,
                  encode_chat, normalise, patchify, smart_resize, split_evenly, target_size)

FORMATS = SHARED / "data" / "formats"


def user(text): return {"role": "user", "content": text}
def assistant(text): return {"role": "assistant", "content": text}


# ---- images ---------------------------------------------------------------------------------------------------------
@needs_shared
def test_images_equal_the_stored_processor_outputs():
    folder = SHARED / "reference" / "image_processor"
    expected = load_file(folder / "expected.safetensors")
    for k, case in enumerate(json.loads((folder / "cases.json").read_text())):
        image = Image.open(SHARED / "data" / "mathvision" / "images" / case["image"])
        size = target_size(*image.size, Limits(case["min_pixels"], case["max_pixels"]))
        assert [1, size[0] // 14, size[1] // 14] == case["grid_thw"]
        pixels = normalise(torch.from_numpy(patchify(image, size)))
        assert (pixels[expected[f"{k}.rows"]] - expected[f"{k}.pixels"]).abs().max() <= 1e-5
        assert (pixels.mean(1) - expected[f"{k}.mean_per_patch"]).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_images_equal_transformers(mode):
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs
    processor = theirs.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=50_000, temporal_patch_size=1)
    rng = np.random.default_rng(0)
    for width, height in ((100, 37), (30, 500), (640, 480), (14, 14)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
        got = encode([user("<image>")], [image], FakeTokenizer(), Limits(3136, 50_000), generate=True)
        want = processor(image, return_tensors="pt")
        assert got.grids == [tuple(g) for g in want["image_grid_thw"].tolist()]
        assert (normalise(torch.from_numpy(got.pixels)) - want["pixel_values"]).abs().max() <= 1e-5


class FakeTokenizer:
    image_pad = 7
    def encode(self, text): return [7] * text.count("<|image_pad|>") or [1]


def test_resize_limits():
    assert smart_resize(1300, 852, 3136, 2_560_000) == (1288, 840)
    # the report's architecture figure: tokens of four pictures
    for (w, h), tokens in {(852, 1300): 1380, (1089, 1153): 1599, (858, 1094): 1209, (720, 1514): 1404}.items():
        a, b = target_size(w, h, Limits())
        assert a * b // 28 ** 2 == tokens
    assert max(target_size(4000, 3000, Limits(max_side=1000))) <= 1008
    for w, h in ((3000, 10), (1, 500)):
        with pytest.raises(BadRow):
            target_size(w, h, Limits())


# ---- chat template: ids checked by hand against the published template and vocabulary -------------------------------
HEAD = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]  # system, "You are a helpful assistant."
USER, TURN = [151644, 872, 198], [151645, 198, 151644, 77091, 198]  # "<|im_start|>user\n"; end of it to "assistant\n"
CHATS = [  # (messages, tokens per image, [(ids, trained?)])
    ([user("Hi"), assistant("Hello!")], [], [(HEAD + USER + [13048] + TURN, 0), ([9707, 0, 151645], 1)]),
    ([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yo")], [],
     [([151644, 8948, 198, 3430, 9814, 13, 151645, 198] + USER + [13048] + TURN, 0), ([64725, 151645], 1)]),
    ([user("1+1?"), assistant("2"), user("And 2+2?"), assistant("4")], [],
     [(HEAD + USER + [16, 10, 16, 30] + TURN, 0), ([17, 151645], 1),
      ([198] + USER + [3036, 220, 17, 10, 17, 30] + TURN, 0), ([19, 151645], 1)]),
    ([user("<image>\n<image>\nSame?"), assistant("No.")], [2, 3],
      [(HEAD + USER + [151652] + [151655] * 2 + [151653, 198, 151652] + [151655] * 3 + [151653, 198, 19198, 30] + TURN,
        0), ([2753, 13, 151645], 1)]),
    ([user("What is this?\n<image>"), assistant("E")], [4],
     [(HEAD + USER + [3838, 374, 419, 5267, 151652] + [151655] * 4 + [151653] + TURN, 0), ([36, 151645], 1)]),
]


@needs_shared
@pytest.mark.parametrize("messages, images, pieces", CHATS)
def test_chat_ids_and_label_mask(messages, images, pieces):
    tok = Tokenizer(SHARED / "data" / "qwen_tokenizer")
    ids, labels = encode_chat(messages, images, tok)
    assert ids == [t for piece, _ in pieces for t in piece]
    assert labels == [t if trained else -100 for piece, trained in pieces for t in piece]
    prompt, masked = encode_chat(messages[:-1], images, tok, generate=True)
    assert prompt == ids[:len(prompt)] and set(masked[len(masked) - len(TURN):]) == {-100}


def test_saved_template_renders_the_same_text(tokenizer, tmp_path):
    import jinja2
    from model import CHAT_TEMPLATE
    messages = [user([{"type": "image"}, {"type": "text", "text": "\nHow many?"}]), assistant("3"), user("Sure?")]
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    ids, _ = encode_chat([user("<image>\nHow many?"), assistant("3"), user("Sure?")], [1], tokenizer, generate=True)
    assert tokenizer.encode(text) == ids


def test_literal_image_pad_in_text_is_a_bad_row(tokenizer):
    with pytest.raises(BadRow, match="1 <.image_pad.> tokens"):
        encode([user("what is <|image_pad|>?"), assistant("a token")], [], tokenizer, Limits())


# ---- readers --------------------------------------------------------------------------------------------------------
@needs_shared
@pytest.mark.parametrize("folder, rows, docs, images", [
    ("llava_558k", 200, 200, 200), ("wds_packed", 80, 159, 159), ("wds_sft", 80, 80, 79),
    ("instruct_46m", 102, 102, 90), ("rl_172k", 155, 155, 70), ("midtraining_85m", 60, 60, 60)])
def test_published_formats(folder, rows, docs, images):
    dataset = Dataset([str(FORMATS / folder)])
    got = [dataset.row(i) for i in range(len(dataset))]
    assert len(got) == rows and sum(len(r.parts) for r in got) == docs
    assert sum(len(im) for r in got for _, im in r.parts) == images
    assert not dataset.problems and len({r.id for r in got}) >= rows - (folder == "wds_packed") * 40


@needs_shared
def test_multi_turn_text_only_and_system_rows():
    dataset = Dataset([str(FORMATS / "wds_sft")])
    parts = [dataset.row(i).parts[0] for i in range(len(dataset))]
    assert sum(len(m) > 3 for m, _ in parts) == 4 and sum(len(im) > 1 for _, im in parts) == 4
    assert sum(not im for _, im in parts) == 6 and sum(m[0]["role"] == "system" for m, _ in parts) == 10


BROKEN = {  # file -> row -> reason
    "llava_bad_rows.json": {
        "empty_conversations": "conversation is empty", "no_conversations_key": "no conversation",
        "missing_file": "not found", "undecodable": "cannot be decoded", "truncated_jpeg": "cannot be decoded",
        "tag_but_no_image": "1 <image> tag(s) but 0", "image_but_no_tag": "0 <image> tag(s) but 1",
        "two_tags_one_image": "2 <image> tag(s) but 1", "aspect_300_to_1": "aspect ratio over 200",
        "one_pixel": "1 x 1 pixels", "empty_answer": "answer is empty", "assistant_only": "turns must go user",
        "unknown_speaker": "speaker 'robot'", "ok": "already used"},
    "SFT_bad_rows.parquet": {
        "empty_bytes": "no bytes", "null_image_with_tag": "1 <image> tag(s) but 0", "undecodable": "cannot be decoded",
        "empty_conversations": "conversation is empty", "null_conversations": "no conversation", "ok": "already used"},
    "bad_lines.jsonl": {"line 3": "not UTF-8", "line 4": "empty", "line 6": "not valid JSON"},
    "image_count_mismatch.tar": {
        "b_two_tags_one_image": "2 <image> tag(s) but 1", "c_no_tag_one_image": "0 <image> tag(s) but 1",
        "d_name_not_in_tar": "not in the archive"},
    "json_without_images.tar": {"ps_00000001": "not in the archive", "ps_00000002": "no list of images"},
    "undecodable_image.tar": {"ps_00000001": "cannot be decoded"},
    "truncated.tar": {"end of file": "cut or damaged", "ps_00000004": "ends inside this sample"},
    "truncated.parquet": {"-": "not a readable parquet file"},
}


@needs_shared
@pytest.mark.parametrize("file", BROKEN)
def test_every_broken_file_gives_its_reason(file):
    source = Source([str(FORMATS / "broken" / file)], str(SHARED / "data" / "qwen_tokenizer"), Limits(), 8192)
    survey = data.survey(source, 0, decode=True)
    found = {b["row"]: b["reason"] for b in survey.bad}
    assert set(found) == set(BROKEN[file])
    for row, reason in BROKEN[file].items():
        assert reason in found[row], (row, found[row])
    good = {"llava_bad_rows.json": 2, "SFT_bad_rows.parquet": 2, "bad_lines.jsonl": 4, "image_count_mismatch.tar": 1,
            "json_without_images.tar": 2, "undecodable_image.tar": 2, "truncated.tar": 4, "truncated.parquet": 0}[file]
    assert len(set(survey.items[:, 0])) == good


def loader(paths, tok, **options):
    source = Source([str(p) for p in (paths if isinstance(paths, list) else [paths])], str(tok), Limits(),
                    options.pop("seq_len", 2048))
    return Loader(source, **({"batch": 4, "unit": "rows"} | options))


@needs_shared
def test_on_bad_stop_names_file_row_and_reason():
    tok = SHARED / "data" / "qwen_tokenizer"
    with pytest.raises(UserError) as e:
        next(iter(loader(FORMATS / "broken" / "undecodable_image.tar", tok)))
    assert ("undecodable_image.tar, ps_00000001 (row 1): image 0 cannot be decoded" in str(e.value)
            and "--on-bad skip" in str(e.value))


@needs_shared
def test_on_bad_skip_counts_lists_and_has_a_limit(tmp_path):
    tok, folder, file = SHARED / "data" / "qwen_tokenizer", FORMATS / "broken", tmp_path / "bad.jsonl"
    steps = iter(loader([folder / "llava_bad_rows.json", folder / "truncated.tar", folder / "bad_lines.jsonl"], tok,
                        on_bad="skip", max_bad=0.9, bad_file=file, batch=28))
    step = next(steps)
    names = [n for p in step.packs for n in p.names]
    assert len(names) == 3 + 7 + 4  # llava (a repeated id too), the 4 whole packs of truncated.tar hold 7 pairs, jsonl
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(listed) == sum(step.state["bad"].values()) == 13 + 2 + 3
    with pytest.raises(UserError, match="more than --max-bad"):
        list(zip(range(3), loader(folder / "llava_bad_rows.json", tok, on_bad="skip", max_bad=0.001, bad_file=file)))


def test_a_row_longer_than_the_context_is_named(toy):
    with pytest.raises(UserError, match=r"tokens, longer than seq_len 40"):
        next(iter(loader(toy / "mid", toy / "tokenizer", seq_len=40)))


def test_plain_text_is_cut_into_pieces_and_nothing_is_lost(tmp_path, tokenizer):
    text = "The bar is red. " * 50
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text, "discipline": "mathematics"}) + "\n")
    source = Source([str(tmp_path)], str(tokenizer.path), Limits(), 64).open()
    docs = source.docs(0, True)
    assert np.concatenate([d.ids for d in docs]).tolist() == tokenizer.encode(text) + [tokenizer.pad]
    assert all(len(d.ids) <= 64 for d in docs) and docs[0].group == "mathematics"


# ---- packing --------------------------------------------------------------------------------------------------------
def log_normal(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(6.2, 0.9, n), 16, 8192).astype(np.int64)


def fill(packs, lengths, capacity=8192):
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))  # each once, none split
    assert max(lengths[p].sum() for p in packs) <= capacity
    return lengths.sum() / (len(packs) * capacity)


def test_global_packing_fills():
    lengths = log_normal(100_000)
    assert fill(best_fit_decreasing(lengths, 8192), lengths) >= 0.995


def test_streaming_packing_fills():
    lengths = log_normal(100_000)
    packs = [w + p for w in range(0, len(lengths), 4096) for p in best_fit_decreasing(lengths[w:w + 4096], 8192)]
    assert fill(packs, lengths) >= 0.99


def test_best_fit_decreasing_equals_the_item_by_item_algorithm():
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 30, 200)
        rooms = []
        for n in sorted(lengths, reverse=True):
            fits = [k for k, r in enumerate(rooms) if r >= n]
            if fits:
                rooms[min(fits, key=lambda k: rooms[k])] -= n
            else:
                rooms.append(40 - n)
        packs = best_fit_decreasing(lengths, 40)
        fill(packs, lengths, 40)
        assert sorted(40 - lengths[p].sum() for p in packs) == sorted(rooms)


def test_packs_are_dealt_by_cost():
    lengths = log_normal(5000)
    items = np.stack([np.arange(5000), np.zeros(5000), lengths, np.zeros(5000), np.zeros(5000)], 1).astype(np.int64)
    packs = best_fit_decreasing(lengths, 8192)[:96]
    cost = costs(items, packs, (1.0, 1e-3, 0, 0))
    order = deal(cost, 8)
    assert sorted(order.flatten()) == list(range(96))
    per_rank, plain = cost[order].sum(0), cost.reshape(12, 8).sum(0)
    assert per_rank.max() / per_rank.mean() < 1.02 < plain.max() / plain.mean()
    assert (cost[order].max(1) / cost[order].mean(1)).mean() < 1.06  # ranks hardly wait inside a micro-step
    rows = split_evenly(lengths[:288], lengths[:288].astype(float) ** 1.5, 8192, 8)
    assert len(rows) % 8 == 0
    fill(rows, lengths[:288])


# ---- loader ---------------------------------------------------------------------------------------------------------
def names_of(steps, n): return [sorted(name for p in next(steps).packs for name in p.names) for _ in range(n)]


@pytest.mark.parametrize("unit, batch", [("packs", 4), ("rows", 16)])
def test_order_does_not_depend_on_ranks_or_workers(toy, unit, batch):
    def run(world, workers=0):
        loaders = [iter(loader(toy / "mid", toy / "tokenizer", seq_len=512, unit=unit, batch=batch, window=64, rank=r,
                               world=world, workers=workers, seed=5)) for r in range(world)]
        out = []
        for _ in range(20):  # past the end of the first epoch
            steps = [next(it) for it in loaders]
            assert len({len(s.packs) for s in steps}) == 1 and all(s.state == steps[0].state for s in steps)
            out.append(sorted(n for s in steps for p in s.packs for n in p.names))
        for it in loaders:
            it.close()
        return out
    one = run(1)
    assert one == run(2) == run(4) == run(1, workers=2)
    seen = [n for step in one for n in step]
    assert len(set(seen)) < len(seen)  # the second epoch began
    other = iter(loader(toy / "mid", toy / "tokenizer", seq_len=512, unit=unit, batch=batch, window=64, seed=6))
    assert one[0] != names_of(other, 1)[0]


@pytest.mark.parametrize("unit, batch", [("packs", 3), ("rows", 16)])
def test_state_saves_and_restores_exactly(toy, unit, batch):
    def new(): return loader(toy / "mid", toy / "tokenizer", seq_len=512, unit=unit, batch=batch, window=64)
    straight = new()
    it = iter(straight)
    first = [next(it) for _ in range(9)]
    for stop in (1, 4, 8):
        again = new()
        again.load_state(json.loads(json.dumps(first[stop - 1].state)))
        steps = iter(again)
        for k in range(stop, 9):
            step = next(steps)
            assert [p.names for p in step.packs] == [p.names for p in first[k].packs]
            assert all(np.array_equal(a.ids, b.ids) for a, b in zip(step.packs, first[k].packs))


def test_every_row_once_an_epoch(toy):
    steps, seen = iter(loader(toy / "instruct", toy / "tokenizer", seq_len=512, unit="rows", batch=10)), []
    n = pq.read_metadata(next((toy / "instruct").glob("*.parquet"))).num_rows
    while (step := next(steps)) and step.state["epoch"] == 0:
        seen += [name for p in step.packs for name in p.names]
    seen += [name for p in step.packs for name in p.names]
    assert len(seen) == len(set(seen)) == n


def test_plan(toy, tmp_path):
    plan = tmp_path / "plan.npz"
    args = ("--tokenizer", toy / "tokenizer", "--seq-len", "512")
    out = launch("data.py", "pack", toy / "mid", *args, "--out", plan).stdout
    assert "fill 0.9" in out and "next: python train_sft.py" in out
    steps = iter(loader(toy / "mid", toy / "tokenizer", seq_len=512, unit="packs", batch=2, plan=str(plan)))
    seen = []
    while (step := next(steps)) and step.state["epoch"] == 0:
        seen += [name for p in step.packs for name in p.names]
    n = pq.read_metadata(next((toy / "mid").glob("*.parquet"))).num_rows
    assert len(seen) == len(set(seen)) and len(seen) >= n - 20  # the step that crosses the epochs is not counted
    with pytest.raises(UserError, match="was made for other files"):
        loader(toy / "mid", toy / "tokenizer", seq_len=256, unit="packs", batch=2, plan=str(plan))


def test_check_and_stats_commands(toy):
    good = launch("data.py", "check", toy / "instruct", "--tokenizer", toy / "tokenizer")
    assert "all rows are good" in good.stdout
    assert "tokens" in launch("data.py", "stats", toy / "rl", "--tokenizer", toy / "tokenizer").stdout
    bad = launch("data.py", "check", toy / "instruct", "--tokenizer", toy / "tokenizer", "--seq-len", "60", check=False)
    assert bad.returncode == 1 and "longer than seq_len 60" in bad.stdout
    wrong = launch("data.py", "check", toy / "nothing", "--tokenizer", toy / "tokenizer", check=False)
    assert wrong.returncode == 2 and wrong.stderr.strip().count("\n") == 0 and "no such file or folder" in wrong.stderr
