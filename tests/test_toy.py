"""The toy world: repeatable, train and held-out apart, answers balanced and told by the picture's own attributes."""
import hashlib
import io
import json
import random
import re
from collections import Counter, defaultdict

import pyarrow.parquet as pq
from conftest import launch
from PIL import Image

import toy as world


def files(folder): return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
                           for f in sorted(folder.rglob("*")) if f.is_file()}


def test_same_seed_same_bytes_and_nothing_is_overwritten(toy, tmp_path):
    launch("toy.py", "make", "--out", tmp_path / "again", "--scale", "0.02")
    assert files(toy) == files(tmp_path / "again")
    refused = launch("toy.py", "make", "--out", tmp_path / "again", "--scale", "0.02", check=False)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and "Traceback" not in refused.stderr


def test_train_and_held_out_share_no_picture(toy):
    def pixels(data): return hashlib.sha256(Image.open(io.BytesIO(data)).convert("RGB").tobytes()).hexdigest()
    held_out = {pixels(f.read_bytes()) for f in (toy / "heldout" / "images").iterdir()}
    train = {pixels(f.read_bytes()) for f in (toy / "align" / "images").rglob("*.png")}
    for part in ("mid", "instruct", "rl"):
        for row in pq.read_table(next((toy / part).glob("*.parquet"))).to_pylist():
            images = row.get("images") or [row.get("image")]
            train |= {pixels(im["bytes"]) for im in images if im}
    assert len(held_out) > 8 and len(train) > 500 and not held_out & train
    asked = {json.loads(line)["question"] for line in (toy / "heldout" / "toy.jsonl").open()
             if json.loads(line)["image"] is None}
    for row in pq.read_table(next((toy / "instruct").glob("*.parquet"))).to_pylist():
        assert row["image"] is not None or not asked & {turn["value"] for turn in row["conversations"]}


def test_answers_are_balanced_and_follow_from_the_caption():
    """No answer of a template is much likelier than chance, and the caption states what is asked."""
    rng, answers, chance = random.Random(0), defaultdict(Counter), {}
    for discipline in world.DISCIPLINES:
        for _ in range(500):
            scene = world.make_scene(rng, discipline)
            for q in scene.questions:
                assert q.answer in q.answers
                answers[q.template][q.answer] += 1
                chance[q.template] = 1 / len(q.answers)
            told = {q.template.split(".")[1]: q.answer for q in scene.questions}
            if "oldest" in told:  # computed again from the words of the caption
                layers = re.search(r"the layers are (.*?)\.", scene.caption)[1].split(", ")
                assert (told["oldest"], told["youngest"], told["layers"]) == (layers[0], layers[-1], str(len(layers)))
            if "name" in told:
                assert told["name"] in scene.caption
            if "grains" in told:
                assert len(re.search(r"grains are (.*?)\.", scene.caption)[1].split(", ")) == int(told["grains"])
    for template, counts in answers.items():
        share = max(counts.values()) / sum(counts.values())
        assert share <= 1.4 * chance[template] + 0.03, (template, share, chance[template], counts)
