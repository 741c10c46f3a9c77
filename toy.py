"""A small science world made by a program: pictures, captions, documents, and questions whose answers are computed.

    python toy.py make --out data/toy        # half a minute on one core: all files that the demo's stages read
    python toy.py report runs/demo           # the demo's tables and demo.png; exit code 1 if a goal is missed

A scene is one picture of one of eight disciplines. A function draws its attributes, and from them come the shapes, the
caption, and the answers, so every answer can be checked. Attributes are drawn uniformly: within a template all answers
are about equally likely, and the question alone gives no more than chance, 1 / (number of possible answers).
The files have the rows of the published sets: LLaVA-558K (align), Mid-Training-85M (mid), Instruct-46M, RL-172K.

A hash of a sample's own content (pixels, question text, document text) decides whether it is held out, so no picture
and no text-only question is in both parts. The same attributes, placed or sized a little differently, can be in both:
held-out accuracy tells whether the model reads pictures and knows the rules, not whether it meets new combinations.
"""
import hashlib
import io
import json
import math
import random
import shutil
import statistics
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from common import UserError, command, parse, run, write_json

ROWS = dict(pretrain=6000, pretrain_val=360, align=3000, mid=14000, instruct=16000, rl=8000)  # at scale 1
HELD_OUT, HELD_OUT_GENERAL = 60, 40  # picture questions a discipline, text-only general questions; at scale 1
VOCABULARY = 1024  # tokens, the special ones included
MULTIPLE_CHOICE = 0.2  # share of the questions with four or more answers that get options: a tenth of all questions


@dataclass
class Config:
    out: str = "data/toy"  # folder to write: absent, empty, or a toy world with --overwrite
    seed: int = 0  # the same seed gives the same bytes
    scale: float = 1.0  # multiplies all numbers of rows
    overwrite: bool = False  # replace the toy world in --out

    def __post_init__(self):
        assert 0.005 <= self.scale <= 100, f"--scale {self.scale}: give a number from 0.005 to 100"


@dataclass
class Question:
    template: str  # "discipline.attribute"
    text: str
    answer: str
    answers: list[str]  # all that the template can have
    options: list[str] | None = None  # four of them if it is multiple choice; `answer` is then a letter

    @property
    def content(self) -> bytes:
        return self.text.encode()

    @property
    def prompt(self) -> str:
        if self.options is None:
            return self.text
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", self.options)]
        return "\n".join([self.text, *lines, "Answer with the option's letter from the given choices directly."])

    @property
    def answer_type(self) -> str:
        if self.options is not None:
            return "multiple-choice"
        return "number" if self.answer.isdigit() else "boolean" if self.answer in YES_NO else "any"

    @property
    def chance(self) -> float:
        return 1 / len(self.options or self.answers)


@dataclass
class Scene:
    discipline: str
    image: Image.Image
    caption: str  # names every attribute; its first sentence is the short caption
    questions: list[Question]  # each about one attribute

    @property
    def content(self) -> bytes:
        return str(self.image.size).encode() + self.image.tobytes()


def ask(template: str, text: str, answer, answers) -> Question:
    answer, answers = str(answer), [str(a) for a in answers]
    assert answer in answers, f"{template}: {answer} is not one of {', '.join(answers)}"
    return Question(template, text, answer, answers)


def multiple_choice(rng: random.Random, q: Question, place: int) -> Question:
    """q with four options, the right one at this place; q itself if it has fewer than four answers."""
    if len(q.answers) < 4:
        return q
    options = rng.sample([a for a in q.answers if a != q.answer], 3)
    return replace(q, options=options[:place] + [q.answer] + options[place:], answer="ABCD"[place])


def is_held_out(content: bytes) -> bool:
    """One sample in ten."""
    return int(hashlib.sha256(content).hexdigest(), 16) % 10 == 0


def draw(make, rng: random.Random, discipline: str, held_out: bool):
    """The first scene, question or document of make(rng, discipline) that is on the wanted side of the split."""
    while True:
        item = make(rng, discipline)
        if is_held_out(item.encode() if isinstance(item, str) else item.content) == held_out:
            return item


# ---- pictures: lists of shapes (kind, points, fill, edge, width of the edge) in a square of SIDE x SIDE pixels
SIDE = 84
SHARPNESS = 3  # pictures are drawn this many times larger and averaged down
HUES = ["red", "yellow", "green", "blue", "purple", "orange"]  # the colours that questions ask for
RGB = dict(red=(225, 30, 30), yellow=(245, 205, 20), green=(25, 150, 60), blue=(40, 90, 230), purple=(150, 50, 190),
           orange=(250, 130, 20), white=(255, 255, 255), gray=(130, 130, 130), silver=(205, 205, 205),
           ivory=(250, 245, 220), brown=(130, 80, 40), sea=(170, 220, 245), dark=(60, 60, 60), black=(0, 0, 0))
CORNERS = ["upper left", "upper right", "lower left", "lower right"]
YES_NO = ("no", "yes")  # indexed by a bool


def disc(x, y, rx, fill, edge="black", width=1.5, ry=None):
    ry = rx if ry is None else ry
    return "ellipse", [(x - rx, y - ry), (x + rx, y + ry)], fill, edge, width


def box(x0, y0, x1, y1, fill, edge="black", width=1.5):
    return "rectangle", [(x0, y0), (x1, y1)], fill, edge, width


def polygon(points, fill, edge="black", width=1.5):
    return "polygon", points, fill, edge, width


def line(points, fill="black", width=2.0):
    return "line", points, fill, fill, width


def ring(x, y, r, degrees):
    """The points at these angles on the circle of radius r about (x, y); angles run clockwise from the right."""
    return [(x + r * math.cos(math.radians(d)), y + r * math.sin(math.radians(d))) for d in degrees]


def render(size: tuple[int, int], background: str, shapes: list, move: tuple[float, float]) -> Image.Image:
    image = Image.new("RGB", (SHARPNESS * size[0], SHARPNESS * size[1]), RGB[background])
    pen = ImageDraw.Draw(image)
    for kind, points, fill, edge, width in shapes:
        xy = [(round(SHARPNESS * (x + move[0])), round(SHARPNESS * (y + move[1]))) for x, y in points]
        if kind == "line":
            pen.line(xy, fill=RGB[fill], width=round(SHARPNESS * width), joint="curve")
        else:
            getattr(pen, kind)(xy, fill=RGB[fill], outline=RGB[edge], width=round(SHARPNESS * width))
    return image.reduce(SHARPNESS)


# ---- one function a discipline: rng -> background, shapes, caption, questions (attribute, text, answer, all answers)
# name: number of corners, outline as (angle in degrees, distance from the middle)
OUTLINES = {"circle": (0, [(angle, 1) for angle in range(0, 360, 10)]), "triangle": (3, [(-90, 1), (30, 1), (150, 1)]),
            "square": (4, [(45, 1), (135, 1), (225, 1), (315, 1)]),
            "cross": (12, [(a + b, far) for a in (0, 90, 180, 270) for b, far in ((-18, 1), (18, 1), (45, 0.44))])}


def mathematics(rng):
    if rng.random() < 0.5:
        n = rng.randint(2, 4)
        colours, heights = rng.sample(HUES, n), rng.sample(range(16, 65, 16), n)
        shapes = [box(11 + 17 * i, 76 - h, 23 + 17 * i, 76, c, c) for i, (c, h) in enumerate(zip(colours, heights))]
        tallest = colours[heights.index(max(heights))]
        caption = (f"A bar chart with {n} bars. From left to right the bars are {', '.join(colours)}. "
                   f"The tallest bar is {tallest}.")
        return "white", [*shapes, line([(4, 77), (80, 77)])], caption, [
            ("bars", "How many bars are in the chart?", n, range(2, 5)),
            ("tallest", "What colour is the tallest bar?", tallest, HUES),
            ("first", "What colour is the first bar from the left?", colours[0], HUES)]
    name, colour, r = rng.choice(list(OUTLINES)), rng.choice(HUES), rng.uniform(30, 36)
    x, y, turn = 42 + rng.uniform(-2, 2), 42 + rng.uniform(-2, 2), rng.uniform(-5, 5)
    corners, outline = OUTLINES[name]
    points = [ring(x, y, r * far, [turn + angle])[0] for angle, far in outline]
    caption = f"A {name}. Its colour is {colour}. Its number of corners is {corners}."
    return "white", [polygon(points, colour, width=4)], caption, [
        ("shape", "Which shape is drawn?", name, OUTLINES),
        ("corners", "How many corners does the shape have?", corners, [n for n, _ in OUTLINES.values()]),
        ("colour", "What colour is the shape?", colour, HUES)]


WIRED = [hue for hue in HUES if hue != "yellow"]  # yellow is the light of the lamp


def physics(rng):
    cells, resistors, colour, closed = rng.randint(1, 3), rng.randint(1, 3), rng.choice(WIRED), rng.random() < 0.5
    top, bottom, lamp, hinge = 19 + rng.uniform(-2, 2), 66 + rng.uniform(-2, 2), (70, 43, 11), (12, 57)
    shapes = [line([(12, top), (70, top), (70, bottom), (12, bottom), (12, top)])]
    for x in range(28, 28 + 14 * cells, 14):  # a cell is a long thin plate and a short thick one
        shapes += [line([(x - 3, top), (x + 3, top)], "white", 4), line([(x - 3, top - 13), (x - 3, top + 13)]),
                   line([(x + 3, top - 7), (x + 3, top + 7)], width=4)]
    shapes += [box(x - 5, bottom - 7, x + 5, bottom + 7, colour) for x in range(28, 28 + 14 * resistors, 14)]
    shapes.append(disc(*lamp, ("white", "yellow")[closed], width=2))
    shapes += [line(ring(*lamp, angles)) for angles in ((45, 225), (135, 315))]
    shapes += [line([hinge, (12, 30)], "white", 4), line([hinge, (12, 30) if closed else (36, 40)], width=4)]
    shapes += [disc(*hinge, 3, "black"), disc(12, 30, 3, "black")]
    state, result = ("closed", "lights") if closed else ("open", "stays dark")
    caption = (f"A series circuit with {cells} cell{'s' * (cells > 1)} and {resistors} resistor{'s' * (resistors > 1)}."
               f" The resistor colour is {colour}. The switch is {state}, so the lamp {result}. With 2 volts a cell "
               f"the voltage is {2 * cells} volts.")
    return "white", shapes, caption, [
        ("cells", "How many cells are in series?", cells, range(1, 4)),
        ("voltage", "Each cell gives 2 volts. What is the voltage of all cells?", 2 * cells, (2, 4, 6)),
        ("resistors", "How many resistors are in the circuit?", resistors, range(1, 4)),
        ("colour", "What colour are the resistors?", colour, WIRED),
        ("lamp", "Does the lamp light?", YES_NO[closed], YES_NO)]


ATOMS = dict(hydrogen="white", carbon="black", nitrogen="blue", oxygen="red", chlorine="green")  # the usual colours
MOLECULES = {"carbon dioxide": ("carbon", ["oxygen"] * 2, (0, 180)),  # name: middle atom, its neighbours, their angles
             "hydrogen chloride": ("chlorine", ["hydrogen"], (0,)), "water": ("oxygen", ["hydrogen"] * 2, (38, 142)),
             "ammonia": ("nitrogen", ["hydrogen"] * 3, (90, 210, 330)),
             "methane": ("carbon", ["hydrogen"] * 4, (0, 90, 180, 270))}


def chemistry(rng):
    name = rng.choice(list(MOLECULES))
    middle, others, angles = MOLECULES[name]
    x, y, turn = 42 + rng.uniform(-4, 4), 42 + rng.uniform(-4, 4), rng.uniform(0, 360)
    places = ring(x, y, rng.uniform(22, 25), [turn + angle for angle in angles])
    shapes = [line([(x, y), place], width=8 if middle == "carbon" and len(others) == 2 else 4) for place in places]
    if name == "carbon dioxide":
        shapes += [line([(x, y), place], "silver", 3) for place in places]  # two strokes: double bonds
    shapes.append(disc(x, y, 12, ATOMS[middle]))
    shapes += [disc(*place, 9, ATOMS[other]) for place, other in zip(places, others)]
    hydrogens, atoms = others.count("hydrogen"), 1 + len(others)
    caption = (f"A molecule of {name}. It has {atoms} atoms. Its number of hydrogen atoms is {hydrogens}. The atom in "
               f"the middle is {middle}, drawn {ATOMS[middle]}.")
    questions = [("name", "Which molecule is drawn?", name, MOLECULES),
                 ("hydrogens", "How many hydrogen atoms are in the molecule?", hydrogens, range(5))]
    if atoms != 3 or rng.random() < 0.5:  # two of the five molecules have three atoms: only half of them are asked
        questions.append(("atoms", "How many atoms are in the molecule?", atoms, range(2, 6)))
    return "silver", shapes, caption, questions


def biology(rng):
    plant, dividing, colour, n = rng.random() < 0.5, rng.random() < 0.5, rng.choice(HUES), rng.randint(1, 4)
    halves, away = (24, 60) if dividing else (42,), 16
    if plant:
        shapes = [box(5, 14, 79, 70, "ivory", colour, 6)] + [line([(42, 14), (42, 70)], colour, 6)] * dividing
    elif dividing:  # two discs that are still joined
        away = 11
        shapes = [disc(x, 42, 22, colour, colour) for x in halves] + [disc(x, 42, 17, "ivory", "ivory") for x in halves]
        shapes.append(box(36, 36, 48, 48, "ivory", "ivory"))
    else:
        shapes = [disc(42, 42, 36, "ivory", colour, 6)]
    places = [(x, 42 + dy) for dy in (-away, away) for x in (24, 60)]
    shapes += [disc(x, 42, 6, "silver", "gray") for x in halves]
    shapes += [disc(*place, 7, "black", ry=4) for place in places[:n]]
    kind, state = ("animal", "plant")[plant], ("not dividing and has 1 nucleus", "dividing and has 2 nuclei")[dividing]
    caption = (f"The picture shows one {kind} cell. It is {state}. The colour of its wall is {colour}. Its number of "
               f"mitochondria is {n}.")
    return "white", shapes, caption, [
        ("kind", "Is it a plant cell or an animal cell?", kind, ("plant", "animal")),
        ("dividing", "Is the cell dividing?", YES_NO[dividing], YES_NO),
        ("wall", "What colour is the wall of the cell?", colour, HUES),
        ("mitochondria", "How many mitochondria are in the cell?", n, range(1, 5))]


def medicine(rng):
    if rng.random() < 0.5:  # the patient faces the reader: the left lung, here the lighter one, is on the right
        place = rng.choice(CORNERS)
        part, side = place.split()
        x, y = (63 if side == "left" else 21) + rng.uniform(-3, 3), (22 if part == "upper" else 58) + rng.uniform(-4, 4)
        shapes = [disc(21, 41, 17, "dark", "white", ry=36), disc(63, 41, 17, "silver", "white", ry=36),
                  disc(45, 50, 9, "red", "red", ry=12), box(2, 70, 82, 82, "brown", "brown"),
                  disc(x, y, rng.uniform(6, 8), "yellow")]  # lungs, heart, diaphragm, spot
        caption = (f"A chest picture with a spot. The spot is in the {part} part of the {side} lung of the patient. "
                   f"The {side} lung lies on the {'right' if side == 'left' else 'left'} of the picture.")
        return "black", shapes, caption, [
            ("lung", "Which lung of the patient shows the spot?", side, ("left", "right")),
            ("part", "Is the spot in the upper part or the lower part of the lung?", part, ("upper", "lower")),
            ("place", "Which part of which lung of the patient shows the spot?", place, CORNERS)]
    beats, regular = rng.randint(3, 5), rng.random() < 0.5
    base, height, inverted = 50 + rng.uniform(-3, 3), rng.uniform(34, 40), None if regular else rng.randrange(1, beats)
    trace = [(1, base)]
    for i, x in enumerate(range(7, 7 + 14 * beats, 14)):
        up = [(x - 3, base), (x - 1, base - height), (x + 1.5, base + 6), (x + 3, base)]
        trace += [(x - 4, base), (x, base + 28), (x + 4, base)] if i == inverted else up
    caption = (f"A pulse trace with {beats} beats. The pulse is {'regular' if regular else 'irregular'}: "
               f"{'all beats point' if regular else 'one beat does not point'} up.")
    return "white", [line([*trace, (83, base)], "red", 3)], caption, [
        ("beats", "How many beats does the trace show?", beats, range(3, 6)),
        ("regular", "Is the pulse regular?", YES_NO[regular], YES_NO)]


def earth_science(rng):
    n, sea, tilt = rng.randint(2, 4), rng.random() < 0.5, rng.uniform(-2, 2)
    colours = rng.sample(HUES, n)  # from the lowest layer up
    shapes = [polygon([(3, y + tilt), (81, y - tilt), (81, y - 18 - tilt), (3, y - 18 + tilt)], colour, colour)
              for y, colour in zip(range(80, 0, -18), colours)]
    caption = (f"A cliff with {n} layers of rock. From the lowest up the layers are {', '.join(colours)}. The oldest "
               f"layer is {colours[0]} and the youngest layer is {colours[-1]}. The cliff is "
               f"{('above', 'below')[sea]} the sea.")
    return ("white", "sea")[sea], shapes, caption, [
        ("layers", "How many layers of rock are there?", n, range(2, 5)),
        ("oldest", "What colour is the oldest layer?", colours[0], HUES),
        ("youngest", "What colour is the youngest layer?", colours[-1], HUES),
        ("sea", "Is the cliff below the sea?", YES_NO[sea], YES_NO)]


def astronomy(rng):
    if rng.random() < 0.5:
        heat, n, hottest = ["red", "yellow", "white", "blue"], rng.randint(1, 4), rng.randrange(4)  # coolest first
        stars = [heat[hottest]] + [heat[rng.randint(0, hottest)] for _ in range(n - 1)]
        rng.shuffle(stars)
        shapes = [disc(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), rng.uniform(10, 13), star, star)
                  for star, (x, y) in zip(stars, [(21, 21), (63, 21), (21, 63), (63, 63)])]
        caption = (f"A sky with {n} star{'s' * (n > 1)}. The colours are {', '.join(stars)}. "
                   f"The hottest star is {heat[hottest]}.")
        return "black", shapes, caption, [
            ("stars", "How many stars are in the sky?", n, range(1, 5)),
            ("hottest", "What colour is the hottest star?", heat[hottest], heat)]
    phases, waxing, phase = ["crescent", "half", "gibbous", "full"], rng.random() < 0.5, rng.randrange(4)
    x, y, r = 42 + rng.uniform(-3, 3), 42 + rng.uniform(-3, 3), rng.uniform(30, 36)
    lit = r if waxing else -r  # seen from the north, a waxing moon is lit on the right
    shade = (0.5, 0, -0.5, -1)[phase] * lit  # where the edge of the shadow crosses the middle
    limb = [math.radians(d) for d in range(-90, 91, 10)]
    face = [(x + lit * math.cos(t), y + r * math.sin(t)) for t in limb]
    face += [(x + shade * math.cos(t), y + r * math.sin(t)) for t in reversed(limb)]
    shapes = [disc(x, y, r, "dark", "dark"), polygon(face, "ivory", "ivory")]
    name, course = phases[phase], ("waning", "waxing")[waxing]
    questions = [("phase", "Which phase has the moon?", name, phases)]
    if name == "full":
        return "black", shapes, "A full moon. All of its face is lit.", questions
    caption = f"A {name} moon. Its {('left', 'right')[waxing]} side is lit, so the moon is {course}."
    questions.append(("course", "Is the moon waxing or waning?", course, ("waxing", "waning")))
    return "black", shapes, caption, questions


def materials(rng):
    if rng.random() < 0.4:  # grains: slices of a disc, the first twice as large as the others
        n = rng.randint(2, 4)
        colours, x, y = rng.sample(HUES, n), 42 + rng.uniform(-3, 3), 42 + rng.uniform(-3, 3)
        start, shapes = -90 + rng.uniform(-8, 8), []
        for i, colour in enumerate(colours):
            angle = 360 * (2.2 if i == 0 else 1) / (n + 1.2)
            arc = ring(x, y, 37, [start + angle * k / 12 for k in range(13)])
            shapes.append(polygon([(x, y), *arc], colour, width=2))
            start += angle
        caption = (f"A polished metal with {n} grains. The grains are {', '.join(colours)}. "
                   f"The largest grain is {colours[0]}.")
        return "white", shapes, caption, [
            ("grains", "How many grains does the metal have?", n, range(2, 5)),
            ("largest", "What colour is the largest grain?", colours[0], HUES)]
    hexagonal, impure, colour = rng.random() < 0.5, rng.random() < 0.5, rng.choice(HUES)
    shapes = []
    for i in range(9):
        row, column = divmod(i, 3)
        x, y = 42 + 24 * (column - 1), 42 + 24 * (row - 1)
        if hexagonal:  # every second row is moved by half the distance of the atoms, and rows are closer
            x, y = x + (6 if row == 1 else -6), 42 + 24 * (row - 1) * math.sqrt(3) / 2
        defect = disc(x, y, 10, ("white", "black")[impure], width=2)  # a ring marks an empty place
        shapes.append(defect if i == 4 else disc(x, y, 10, colour, colour))
    lattice, kind = ("square", "hexagonal")[hexagonal], ("vacancy", "impurity")[impure]
    caption = f"A {lattice} lattice of atoms. The colour of the atoms is {colour}. The lattice has one {kind}."
    return "white", shapes, caption, [
        ("lattice", "Is the lattice square or hexagonal?", lattice, ("square", "hexagonal")),
        ("defect", "Is the defect a vacancy or an impurity?", kind, ("vacancy", "impurity")),
        ("colour", "What colour are the atoms?", colour, HUES)]


SCENES = {"mathematics": mathematics, "physics": physics, "chemistry": chemistry, "biology": biology,
          "medicine": medicine, "earth science": earth_science, "astronomy": astronomy, "materials": materials}
DISCIPLINES = list(SCENES)


def make_scene(rng: random.Random, discipline: str) -> Scene:
    """A scene in a picture of 84x84 pixels or, one time in four, at one end of a picture of 112x84 or 84x112."""
    background, shapes, caption, questions = SCENES[discipline](rng)
    size = rng.choice([(SIDE, SIDE)] * 6 + [(SIDE + 28, SIDE), (SIDE, SIDE + 28)])
    move = [rng.choice((0, n - SIDE)) + rng.uniform(-1, 1) for n in size]
    return Scene(discipline, render(size, background, shapes, move), caption,
                 [ask(f"{discipline}.{attribute}", *rest) for attribute, *rest in questions])


# ---- text: facts, problems with computed answers, documents
# discipline: (statement, "subject: value" pairs); {0} is the subject and {1} the value, which ends the statement
FACTS = {
    "mathematics": [
        ("The number of sides of the {0} is {1}.",
         "triangle: 3, square: 4, pentagon: 5, hexagon: 6, octagon: 8, decagon: 10, dodecagon: 12"),
        ("The square of {0} is {1}.", "2: 4, 3: 9, 4: 16, 5: 25, 6: 36, 7: 49, 8: 64, 9: 81, 11: 121, 12: 144"),
        ("The prime number after {0} is {1}.", "2: 3, 3: 5, 5: 7, 7: 11, 11: 13, 13: 17, 17: 19, 19: 23, 23: 29")],
    "physics": [
        ("The unit of {0} is the {1}.", "force: newton, energy: joule, power: watt, current: ampere, voltage: volt, "
         "resistance: ohm, frequency: hertz, pressure: pascal, charge: coulomb"),
        ("A {0} measures {1}.", "thermometer: temperature, galvanometer: current, voltmeter: voltage, "
         "barometer: air pressure, speedometer: speed, balance: mass"),
        ("The charge of the {0} is {1}.", "proton: positive, electron: negative, neutron: zero, positron: positive")],
    "chemistry": [
        ("The symbol of {0} is {1}.", "hydrogen: H, carbon: C, nitrogen: N, oxygen: O, sodium: Na, chlorine: Cl, "
         "potassium: K, iron: Fe, copper: Cu, silver: Ag, gold: Au, lead: Pb"),
        ("The atomic number of {0} is {1}.", "hydrogen: 1, helium: 2, carbon: 6, nitrogen: 7, oxygen: 8, sodium: 11, "
         "chlorine: 17, iron: 26, copper: 29, gold: 79"),
        ("The formula of {0} is {1}.", "water: H2O, carbon dioxide: CO2, methane: CH4, ammonia: NH3, "
         "hydrogen chloride: HCl, table salt: NaCl, quicklime: CaO"),
        ("In a drawn molecule {0} is {1}.", ", ".join(f"{atom}: {colour}" for atom, colour in ATOMS.items()))],
    "biology": [
        ("In a cell the {0} {1}.", "nucleus: stores the genes, mitochondrion: releases energy, "
         "ribosome: makes proteins, chloroplast: captures light, membrane: controls what enters"),
        ("The {0} belongs to the {1}.", "frog: amphibians, snake: reptiles, salmon: fish, eagle: birds, bat: mammals, "
         "whale: mammals, spider: arachnids, ant: insects, mushroom: fungi"),
        ("The number of chromosomes in a body cell of the {0} is {1}.",
         "human: 46, dog: 78, cat: 38, mouse: 40, pea: 14, maize: 20, onion: 16")],
    "medicine": [
        ("A lack of {0} can cause {1}.", "vitamin C: scurvy, vitamin D: rickets, iron: anaemia, iodine: goitre, "
         "vitamin A: night blindness, vitamin B1: beriberi"),
        ("A {0} treats the {1}.", "cardiologist: heart, dermatologist: skin, nephrologist: kidneys, "
         "hepatologist: liver, pulmonologist: lungs, neurologist: nerves, dentist: teeth"),
        ("The disease {0} is an inflammation of the {1}.", "hepatitis: liver, nephritis: kidney, gastritis: stomach, "
         "dermatitis: skin, arthritis: joints, pneumonia: lung"),
        ("On a chest picture the {0} lung lies on the {1}.", "left: right, right: left")],
    "earth science": [
        ("On the Mohs scale the hardness of {0} is {1}.", "talc: 1, gypsum: 2, calcite: 3, fluorite: 4, apatite: 5, "
         "orthoclase: 6, quartz: 7, topaz: 8, corundum: 9, diamond: 10"),
        ("The rock {0} is {1}.", "granite: igneous, basalt: igneous, obsidian: igneous, sandstone: sedimentary, "
         "limestone: sedimentary, shale: sedimentary, slate: metamorphic, gneiss: metamorphic"),
        ("Heat and pressure turn {0} into {1}.", "limestone: marble, shale: slate, sandstone: quartzite, peat: coal"),
        ("In a cliff the {0} layer is the {1}.", "oldest: lowest, youngest: highest")],
    "astronomy": [
        ("Counted from the Sun {0} is planet number {1}.",
         "Mercury: 1, Venus: 2, Earth: 3, Mars: 4, Jupiter: 5, Saturn: 6, Uranus: 7, Neptune: 8"),
        ("The moon {0} circles {1}.", "Io: Jupiter, Europa: Jupiter, Titan: Saturn, Enceladus: Saturn, Phobos: Mars, "
         "Triton: Neptune, Titania: Uranus"),
        ("The colour of the star {0} is {1}.", "Betelgeuse: red, Antares: red, Aldebaran: orange, Capella: yellow, "
         "Vega: white, Rigel: blue, Spica: blue"),
        ("The star {0} lies in {1}.", "Betelgeuse: Orion, Rigel: Orion, Antares: Scorpius, Aldebaran: Taurus, "
         "Vega: Lyra, Spica: Virgo, Deneb: Cygnus")],
    "materials": [
        ("The lattice of {0} is {1}.", "copper: face-centred, gold: face-centred, aluminium: face-centred, "
         "iron: body-centred, tungsten: body-centred, zinc: hexagonal, magnesium: hexagonal"),
        ("In degrees Celsius the melting point of {0} is {1}.", "zinc: 420, magnesium: 650, aluminium: 660, "
         "gold: 1064, copper: 1085, iron: 1538, titanium: 1668, tungsten: 3422"),
        ("The alloy {0} is made of {1}.", "bronze: copper and tin, brass: copper and zinc, steel: iron and carbon, "
         "cupronickel: copper and nickel, amalgam: mercury and silver")],
    "general": [
        ("The day after {0} is {1}.", "Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, "
         "Friday: Saturday, Saturday: Sunday, Sunday: Monday"),
        ("The number of legs of a {0} is {1}.",
         "hen: 2, goose: 2, cat: 4, dog: 4, bee: 6, beetle: 6, spider: 8, scorpion: 8"),
        ("A {0} belongs to the {1}.", "hen: birds, goose: birds, cat: mammals, dog: mammals, bee: insects, "
         "beetle: insects, spider: arachnids, scorpion: arachnids"),
        ("The young of a {0} is a {1}.", "cat: kitten, dog: puppy, cow: calf, sheep: lamb, horse: foal, hen: chick"),
        ("The opposite of {0} is {1}.", "hot: cold, big: small, old: new, early: late, full: empty, fast: slow")],
}
# discipline: question about a and b, both from 2 to 6; its answer
PROBLEMS = {
    "mathematics": ("A rectangle is {a} units long and {b} units wide. What is its area?", lambda a, b: a * b),
    "physics": ("A current of {a} amperes flows through {b} ohms. What is the voltage in volts?", lambda a, b: a * b),
    "chemistry": ("A bottle holds {a} molecules of ammonia and {b} molecules of hydrogen chloride. How many hydrogen "
                  "atoms are that?", lambda a, b: 3 * a + b),
    "biology": ("A dish holds {a} cells. Every cell divides once and then {b} cells are added. How many cells are "
                "there?", lambda a, b: 2 * a + b),
    "medicine": ("A patient takes {a} tablets a day for {b} days. How many tablets are that?", lambda a, b: a * b),
    "earth science": ("A plate drifts {a} centimetres a year. How far does it drift in {b} years?", lambda a, b: a * b),
    "astronomy": ("A planet needs {a} years for one orbit. How many years do {b} orbits take?", lambda a, b: a * b),
    "materials": ("A square lattice has {a} rows of {b} places and one vacancy. How many atoms are there?",
                  lambda a, b: a * b - 1),
}
NAMES = ["Anna", "Ben", "Cara", "David", "Emma", "Felix", "Grace", "Henry"]


def pairs(table: str) -> list[list[str]]:
    return [pair.split(": ") for pair in table.split(", ")]


DAYS, LEGS, KINDS = (dict(pairs(table)) for _, table in FACTS["general"][:3])


def general_question(rng: random.Random, discipline: str = "general") -> Question:
    """A question on everyday things whose names vary, so that one in ten can be held out."""
    (name, other), (today, tomorrow), total = rng.sample(NAMES, 2), rng.choice(list(DAYS.items())), rng.randint(4, 9)
    part, animal, thing = rng.randint(2, total - 2), rng.choice(list(LEGS)), rng.choice(["apples", "pens", "books"])
    return ask(*rng.choice([
        ("general.day", f"{name} and {other} meet on {today}. They see a {animal} one day later. Which day is that?",
         tomorrow, DAYS),
        ("general.legs", f"On {today} {name} and {other} see a {animal}. How many legs has it?",
         LEGS[animal], (2, 4, 6, 8)),
        ("general.sum", f"{name} has {part} {thing} and gets {total - part} from {other}. How many {thing} has {name} "
         "now?", total, range(4, 10)),
        ("general.kind", f"{name} and {other} look for a {animal} on {today}. To which kind of animal does it belong?",
         KINDS[animal], sorted(set(KINDS.values())))]))


def text_question(rng: random.Random, discipline: str) -> Question:
    """A question that needs no picture: a fact of the discipline, or a problem with a computed answer."""
    if rng.random() < 0.5:
        statement, table = rng.choice(FACTS[discipline])
        subject, value = rng.choice(pairs(table))
        text = statement.format(subject, "").rstrip(" .")
        return ask(f"{discipline}.fact", f"Complete: {text} ...", value, sorted({v for _, v in pairs(table)}))
    if discipline == "general":
        return general_question(rng)
    text, solve = PROBLEMS[discipline]
    results = {(a, b): solve(a, b) for a in range(2, 7) for b in range(2, 7)}
    (a, b), answer = rng.choice(list(results.items()))
    return ask(f"{discipline}.problem", text.format(a=a, b=b), answer, sorted(set(results.values())))


def solved(rng: random.Random, q: Question) -> str:
    q = multiple_choice(rng, q, rng.randrange(4)) if rng.random() < 0.5 else q
    return f"Question: {q.prompt}\nAnswer: {q.answer}"


def text_document(rng: random.Random, discipline: str) -> str:
    """About 20 to 150 words: facts, solved questions, perhaps a described scene; nothing in it is held out."""
    facts = [rng.choice(FACTS[discipline]) for _ in range(rng.randint(3, 5))]
    parts = list(dict.fromkeys(statement.format(*rng.choice(pairs(table))) for statement, table in facts))
    parts.append(solved(rng, draw(text_question, rng, discipline, False)))
    if discipline == "general":
        parts.append(solved(rng, draw(general_question, rng, discipline, False)))
    elif rng.random() < 0.5:
        scene = draw(make_scene, rng, discipline, False)
        parts.append(f"Picture: {scene.caption}\n{solved(rng, rng.choice(scene.questions))}")
    rng.shuffle(parts)
    return "\n".join([f"Notes on {discipline}.", *parts])


# ---- files
def png(image: Image.Image, name: str) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": f"{name}.png"}


def turns(questions: list[Question], tag: str) -> list[dict]:
    said = [text for q in questions for text in (q.prompt, q.answer)]
    said[0] = tag + said[0]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def some_questions(rng: random.Random, scene: Scene, most: int) -> list[Question]:
    """1 to `most` different questions about the scene, some as multiple choice, half of these after their open form."""
    asked = []
    for q in rng.sample(scene.questions, min(rng.randint(1, most), len(scene.questions))):
        asked.append(multiple_choice(rng, q, rng.randrange(4)) if rng.random() < MULTIPLE_CHOICE else q)
        if most > 1 and asked[-1].options and rng.random() < 0.5:
            asked.insert(-1, q)
    return asked


def text_row(rng, i: int, held_out: bool) -> dict:
    topic = [*DISCIPLINES, "general"][i % 9]
    return {"id": f"text_{i:06d}", "text": draw(text_document, rng, topic, held_out), "discipline": topic}


def align_row(rng, i: int, folder: Path) -> dict:
    scene = draw(make_scene, rng, DISCIPLINES[i % 8], False)
    prompt = rng.choice(["Describe the picture briefly.", "What does the picture show?", "Give a short caption."])
    path = folder / "images" / f"{i // 1000:05d}" / f"{i:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(scene.image, path.stem)["bytes"])
    human = f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"
    return {"id": f"{i:06d}", "image": str(path.relative_to(folder)), "conversations": [
        {"from": "human", "value": human}, {"from": "gpt", "value": scene.caption.split(". ")[0] + "."}]}


def mid_row(rng, i: int) -> dict:
    scene, name = draw(make_scene, rng, DISCIPLINES[i % 8], False), f"mid/{i:06d}"
    return {"id": name, "caption": scene.caption, "image": png(scene.image, name)}


def instruct_row(rng, i: int) -> dict:
    """Every sixth row is only text, half of these general; the others have 1 to 4 questions about a picture."""
    name = f"instruct_{i:06d}"
    if i % 6 == 0:
        topic = "general" if rng.random() < 0.5 else rng.choice(DISCIPLINES)
        questions, tag, image = [draw(text_question, rng, topic, False)], "", None
    else:
        topic = rng.choice(DISCIPLINES)
        scene = draw(make_scene, rng, topic, False)
        questions, tag, image = some_questions(rng, scene, 4), "<image>\n", png(scene.image, name)
    return {"id": name, "image": image, "conversations": turns(questions, tag), "data_source": topic}


def rl_row(rng, i: int) -> dict:
    scene, name = draw(make_scene, rng, DISCIPLINES[i % 8], False), f"rl_{i:06d}"
    q = rng.choice(scene.questions)  # open: letters are guessed at this size, and a guess that is paid for is noise
    return {"id": name, "images": [png(scene.image, name)], "problem": "<image>\n" + q.prompt, "answer": [q.answer],
            "problem_type": "counting" if q.answer_type == "number" else "stem", "answer_type": q.answer_type,
            "source": scene.discipline, "prompt_type": "normal"}


def held_out_rows(rng, discipline: str, n: int, folder: Path) -> list[dict]:
    """n held-out questions, templates and then answers in turn, each about a picture of its own."""
    pool, cells = {}, defaultdict(lambda: defaultdict(list))  # cells: template -> answer -> candidates
    for _ in range(60 + 4 * n):
        if discipline == "general":
            q = draw(general_question, rng, discipline, True)
            pool[q.content] = None, q
        else:
            scene = draw(make_scene, rng, discipline, True)
            pool[scene.content] = scene, rng.choice(scene.questions)
    for scene, q in pool.values():
        cells[q.template][q.answer].append((scene, q))
    rows, eligible = [], 0
    for i in range(n):
        template, turn = sorted(cells)[i % len(cells)], i // len(cells)
        answers = sorted(cells[template])
        scene, q = cells[template][answers[turn % len(answers)]].pop()
        if scene and len(q.answers) >= 4:
            eligible += 1
            if int(eligible * MULTIPLE_CHOICE) > int((eligible - 1) * MULTIPLE_CHOICE):
                q = multiple_choice(rng, q, int(eligible * MULTIPLE_CHOICE) % 4)
        name = f"{discipline.replace(' ', '_')}_{i:04d}"
        if scene:
            (folder / "images" / f"{name}.png").write_bytes(png(scene.image, name)["bytes"])
        rows.append({"id": name, "question": q.text, "options": q.options, "answer": q.answer,
                     "answer_type": q.answer_type, "discipline": discipline, "template": q.template,
                     "image": scene and f"images/{name}.png", "chance": q.chance})
    return rows


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the text splitting and the special tokens of Qwen2, the latter at the end."""
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+")
    special = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
               "vision_start vision_end vision_pad image_pad video_pad").split()
    byte_level = dict(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(**byte_level)])
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY - len(special), show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in special])
    size = tokenizer.get_vocab_size()
    assert size == VOCABULARY, f"the texts of this scale gave {size} tokens, not {VOCABULARY}: use a larger --scale"
    return tokenizer


def write_lines(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(work: Path, seed: int, scale: float) -> dict:
    """All files below `work`. -> number of rows of each part"""
    n = {part: max(18, round(scale * rows)) for part, rows in ROWS.items()}
    for folder in ("tokenizer", "pretrain", "pretrain_val", "align", "mid", "instruct", "rl", "heldout/images"):
        (work / folder).mkdir(parents=True)

    def rows(part, make, *args):
        rng = random.Random(f"{seed} {part}")
        return [make(rng, i, *args) for i in tqdm(range(n[part]), f"{part:12s}", mininterval=1)]

    documents = rows("pretrain", text_row, False)
    write_lines(work / "pretrain/text.jsonl", documents)
    write_lines(work / "pretrain_val/text.jsonl", rows("pretrain_val", text_row, True))
    write_json(work / "align/llava.json", rows("align", align_row, work / "align"))
    mid, instruct = rows("mid", mid_row), rows("instruct", instruct_row)
    pq.write_table(pa.Table.from_pylist(mid), work / "mid/000000.parquet", row_group_size=500)
    pq.write_table(pa.Table.from_pylist(instruct), work / "instruct/SFT_00000.parquet", row_group_size=500)
    rl = pa.Table.from_pylist(rows("rl", rl_row))
    pq.write_table(rl, work / "rl/train-00000-of-00001.parquet", row_group_size=500)

    rng, heldout = random.Random(f"{seed} heldout"), []
    for topic in tqdm([*DISCIPLINES, "general"], f"{'heldout':12s}"):
        number = max(2, round(scale * (HELD_OUT_GENERAL if topic == "general" else HELD_OUT)))
        heldout += held_out_rows(rng, topic, number, work / "heldout")
    write_lines(work / "heldout/toy.jsonl", heldout)

    texts = [row["text"] for row in documents] + [row["caption"] for row in mid]
    texts += [turn["value"] for row in instruct for turn in row["conversations"]]
    texts += ["system\nYou are a helpful assistant.", "user\n"] * len(instruct)  # of the chat template
    train_tokenizer(texts).save(str(work / "tokenizer/tokenizer.json"))
    write_json(work / "tokenizer/tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", add_prefix_space=False))
    return n | {"heldout": len(heldout)}


def make(c: Config):
    out, work = Path(c.out), Path(c.out.rstrip("/") + ".tmp")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / "toy.json").exists():
            raise UserError(f"{out} is there and was not written by toy.py: choose another --out")
        if not c.overwrite:
            raise UserError(f"{out} holds a toy world: choose another --out or add --overwrite")
    shutil.rmtree(work, ignore_errors=True)
    rows = write_world(work, c.seed, c.scale)
    write_json(work / "toy.json", {"seed": c.seed, "scale": c.scale, "rows": rows})
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)
    print("\n".join(f"{part:13s}{count:7d} rows" for part, count in rows.items()))
    print(f"wrote {out}\nnext: python train_sft.py --stage pretrain --model preset:tiny --tokenizer {out}/tokenizer "
          f"--data {out}/pretrain --out runs/toy/pretrain")


# ---- the report of a finished demo
def read(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path} is missing: finish the demo's stages and evaluations before the report")
    return path.read_text()


def right(sample: dict) -> bool:
    return next(iter(sample["numbers"].values())) == 1


def accuracy(samples: list[dict]) -> float:
    return statistics.fmean(map(right, samples))


def draw_answers(path: Path, samples: list[dict]):
    """The first picture question of three disciplines in the file's order, right or wrong, with both answers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    first = {}
    for sample in samples:
        if sample["images"]:
            first.setdefault(sample["group"], sample)
    shown = [first[name] for name in ("chemistry", "earth science", "astronomy")]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.4 * len(shown), 4.4))
    for axis, sample in zip(axes, shown):
        axis.imshow(Image.open(sample["images"][0]))
        axis.set(title=sample["group"], xticks=[], yticks=[])
        question = "\n".join(textwrap.fill(part, 34) for part in sample["question"].splitlines())
        axis.set_xlabel(f"{question}\nright answer: {sample['gold']}\nmodel: {sample['read']}",
                        color="darkgreen" if right(sample) else "darkred")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(folder: Path):
    print(f"{'stage':<14}{'seconds':>9}{'loss first':>12}{'loss last':>11}")
    for stage in ("pretrain", "align", "mid", "instruct"):
        log = [json.loads(row) for row in read(folder / stage / "metrics.jsonl").splitlines()]
        first, last = (statistics.fmean(row["loss"] for row in rows) for rows in (log[:5], log[-5:]))
        print(f"{stage:<14}{log[-1]['seconds']:>9.0f}{first:>12.3f}{last:>11.3f}")

    names = ("before", "after", "shuffled")
    files = [read(folder / f"eval_{name}" / "samples_toy.jsonl") for name in names]
    before, after, shuffled = ([json.loads(row) for row in text.splitlines()] for text in files)
    print(f"\n{'discipline':<14}{'n':>5}{'chance':>8}{'before':>8}{'after':>8}{'images shuffled':>17}")
    groups = {name: [[s for s in part if s["group"] == name] for part in (before, after, shuffled)]
              for name in dict.fromkeys(s["group"] for s in after)}
    for name, parts in [*groups.items(), ("all", (before, after, shuffled))]:
        accuracies = "".join(f"{accuracy(part):>{width}.3f}" for part, width in zip(parts, (8, 8, 17)))
        print(f"{name:<14}{len(parts[1]):>5}{statistics.fmean(s['chance'] for s in parts[1]):>8.3f}{accuracies}")
    seeing = [s for s in shuffled if s["images"]]
    blind, guess = accuracy(seeing), statistics.fmean(s["chance"] for s in seeing)
    print(f"\nquestions with a picture, images shuffled: {blind:.3f}, chance {guess:.3f}")
    draw_answers(folder / "demo.png", after)
    print(f"wrote {folder / 'demo.png'}")

    missed = [f"overall accuracy {accuracy(after):.3f} is under 0.75"] if accuracy(after) < 0.75 else []
    missed += [f"{name}: accuracy {accuracy(part):.3f} is under 0.5" for name, (_, part, _) in groups.items()
               if accuracy(part) < 0.5]
    if abs(blind - guess) > 0.10:
        missed.append(f"with shuffled images accuracy {blind:.3f} is more than 0.10 from chance {guess:.3f}")
    if missed:
        sys.exit("\n".join(f"goal missed: {text}" for text in missed))
    print("all goals reached")


def main():
    if command(("make", "report"), __doc__) == "make":
        return make(parse(Config, sys.argv[2:], __doc__))
    if len(sys.argv) != 3 or sys.argv[2].startswith("-"):
        raise UserError("python toy.py report RUN_DIR: the folder of a finished demo is missing")
    report(Path(sys.argv[2]))


if __name__ == "__main__":
    run(main)
