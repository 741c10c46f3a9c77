"""Files of benchmarks, and how a row becomes a document: one function for each format, not for each benchmark.

    rows(path)    rows of a parquet, jsonl, json, csv or tab-separated file, as dicts
    document()    one question: what is shown, what is right
    ask(..)       a chat question: template, options, picture and right answer by field names
    letters(..), compare(..), complete(..)    the harness' forms: letter or text by log-probability, completion

A row carries its file: _root is the data root, _file the path below it. A loader returns None for a row that is no
question of its task, and raises BadRow for one that cannot be asked (it counts as wrong).
"""
import ast
import csv
import functools
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from common import UserError
from data import BadRow, JsonlFile, ParquetFile, _images
from prompts import (ARENA, BOXED, CAPTION2MOL, CLUEWSC, DIRECT, GPQA, HINTS, MMMU_DOMAINS, MOL2CAPTION, PROPERTIES,
                     PROPERTY, SFE, XLRS, XLRS_SEVERAL)
from rewards import LETTERS, boxed, molecule_of
from scorers import one_header

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".txt")
YES = {"labels": ("Yes", "No")}


def document(gold, *, text: str = "", system: str = "", context: str = "", pairs=(), shot: str = "", examples=(),
             description: str = "", images=(), options=None, group="", cluster=None, id="", scorer: str = "",
             metric: str = "", kw: dict | None = None, chance: float | None = None, extra: dict | None = None) -> dict:
    """One question. Of messages (from text and system), context and pairs exactly one is filled.

    messages: chat turns with one <image> for each of images (paths or bytes). context: a plain prompt to be continued.
    pairs: (context, continuation) of each choice, to be compared by log-probability; gold is the index of the right
    one, or a list. gold: what the scorer gets; None where it is not published. options: texts of the choices; acc_norm
    divides by their lengths. group: subject, reported on its own; "a/b" also under "a". cluster: questions that
    belong together (copies of one question, steps of one problem). scorer, metric, kw: where a row has its own.
    chance: accuracy of guessing.
    error: why it cannot be asked. Only until tasks.documents has put them in front: description, examples (of its
    own), shot (the document as an example for others).
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages = [*messages, {"role": "user", "content": text}] if text else []
    if chance is None:
        count = len(options or pairs or (kw or {}).get("labels", ()))
        chance = 1 / count if count else 0.0
    return dict(id=str(id), messages=messages, context=context, pairs=list(pairs), images=list(images), gold=gold,
                options=list(options) if options else None, group=str(group or ""), cluster=cluster, scorer=scorer,
                metric=metric, kw=kw or {}, chance=chance, extra=extra or {}, error=None, shot=shot,
                examples=list(examples), description=description)


# ---- files ----------------------------------------------------------------------------------------------------------
def find(root: Path, files: str) -> list[Path]:
    """Files of the first alternative that is there. An alternative is a glob that ends in a suffix, or FOLDER/NAME for
    FOLDER/**/NAME.* and FOLDER/**/NAME-*.* (a split as the hub stores it) or all that is in that folder."""
    for pattern in files.split():
        folder, _, name = pattern.rpartition("/")
        for glob in [pattern] if pattern.endswith(SUFFIXES) else [f"{folder}/**/{name}[.-]*", f"{pattern}/**/*"]:
            if found := sorted(p for p in Path(root).glob(glob) if p.name.endswith(SUFFIXES)):
                return found
    return []


def rows(path: Path, columns: tuple[str, ...] = ()) -> Iterator[dict]:
    """json: a list, or a list under "examples". columns: of a csv file without a header. Tab-separated files have no
    quotes."""
    if path.name.endswith((".parquet", ".jsonl", ".jsonl.gz")):
        file = ParquetFile(path) if path.suffix == ".parquet" else JsonlFile(path)
        yield from map(file.raw, range(file.count))
    elif path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"{path}: not valid JSON ({e}); the file is cut or damaged") from None
        yield from value["examples"] if isinstance(value, dict) else value
    else:
        tabs = {} if path.suffix == ".csv" else dict(delimiter="\t", quoting=csv.QUOTE_NONE)
        with open(path, newline="", encoding="utf-8-sig") as f:
            yield from csv.DictReader(f, columns or None, **tabs)


# ---- what a row says ------------------------------------------------------------------------------------------------
def lines(options: list[str], mark: str = "{}. {}") -> str:
    """'A. red' and so on, one line each."""
    return "\n".join(mark.format(label, option) for label, option in zip(LETTERS, options))


def bare(options: list[str]) -> list[str]:
    """Options without the labels that some sets print in them: "(A) red", "a) red", "B. red", "option 1: red"."""
    return [re.sub(r"^\s*(?:\(\w\)|\w[.):]|option \d:)\s*", "", option) for option in options]


def of(row: dict, name: str | Callable | None):
    return name(row) if callable(name) else row.get(name) if name else None


def options_of(row: dict, options: str | Callable | None) -> list[str] | None:
    """A function of the row, a list field, or several fields, of which the empty ones are left out."""
    if callable(options) or options is None:
        return of(row, options)
    names = options.split()
    found = row[options] if len(names) == 1 else [row.get(name) for name in names]
    return [str(o).strip() for o in found if o not in (None, "", "nan")]


def pictures(row: dict, value) -> list:
    """Picture(s) of a row: file name, {bytes, path}, or a list of these; names count from the file's folder."""
    return _images(value, row["_root"] / row["_file"].parent)


def plain(value):
    """Text without white space around it and without the word <image>, which would stand for a picture."""
    return value.replace("<image>", "").strip() if isinstance(value, str) else value


def part(row: dict) -> str:
    """The subject in test/anatomy_test.csv, anatomy/test-00000-of-00001.parquet or test/anatomy.csv."""
    stem, split = row["_file"].name.partition(".")[0], "(?:test|val|dev|train)"
    return row["_file"].parent.name if re.match(rf"{split}\b", stem) else re.sub(rf"_{split}$", "", stem)


# right answers: (field, options) -> gold
def as_text(value, options): return str(value).strip()
def as_list(value, options): return [str(v) for v in value] if isinstance(value, list) else [str(value)]
def by_index(value, options): return LETTERS[int(value)]
def by_letter(value, options): return m[1].upper() if (m := re.match(r"\W*([A-Za-z])\b", value)) else value.strip()
def by_text(value, options): return LETTERS[options.index(value)] if options and value in options else str(value)
def by_either(value, options): return by_letter(by_text(value, options) if len(value.strip()) > 1 else value, options)
def whole(value, options): return f"{value:g}" if isinstance(value, float) else str(value).strip()
def digit(value, options): return re.search(r"\d+", str(value))[0]
def last_box(value, options): return boxed(value)
def after_hashes(value, options): return value.rpartition("####")[2].strip()


def open_kind(row: dict, gold: str | None) -> str:
    """Scorer of an answer in free form: yes or no, number, SMILES, or text; the task's own where there is no answer."""
    if gold is None:
        return ""
    if gold.lower().strip(".") in ("yes", "no"):
        return "choice"
    if re.fullmatch(r"[-+]?[\d.,]+\s*%?", gold):
        return "math"
    smiles = gold.partition("<sep>")[0].strip()
    drawn = re.fullmatch(r"\S{3,}", smiles) and re.search(r"[=#()\[\]]|[A-Zcnos]{3}", smiles)
    return "molecule" if drawn and _is_molecule(smiles) else "exact"


def _is_molecule(smiles: str) -> bool:
    """THF and Pd(PPh3)4 only look like one."""
    try:
        return molecule_of(smiles) is not None
    except UserError:  # without RDKit: the scorer says so
        return True


def open_kw(row: dict, gold: str | None) -> dict:
    return YES if open_kind(row, gold) == "choice" else {}


def in_picture(row: dict, gold: str | None) -> dict:
    """Some questions have their options in the picture only."""
    return {"labels": "ABCDE"} if gold and re.fullmatch("[A-E]", gold) and not row.get("options") else {}


# ---- chat questions -------------------------------------------------------------------------------------------------
def ask(template: str, answer: str = "answer", gold=as_text, *, image="image", options=None, mark: str = "{}. {}",
        group=None, cluster=None, id=None, more=None, system: str = "", scorer=None, kw=None, extra=None,
        text_only: bool = False):
    """The template names fields of the row, {images}, {options}, and what `more` makes of the row.

    answer, gold: field, and how the right answer is made of it. image, options, group, cluster, id: a field or a
    function of the row. scorer, kw: functions of row and gold, where they differ from row to row; gold is None where
    the row has no answer. extra: fields to be kept. text_only: some rows have no picture, though the template has one.
    """
    def load(row: dict, i: int) -> dict:
        shown = options_of(row, options)
        if shown == []:
            raise BadRow("no options")
        if "{images}" in template and not callable(image) and image not in row:  # never asked without its picture
            raise KeyError(image)
        found = image(row) if callable(image) else pictures(row, row.get(image) or None)
        right = gold(row[answer], shown) if row[answer] not in (None, "", "nan") else None
        if "{images}" in template and not found and not text_only:
            raise BadRow(f"no picture: {'the field' if callable(image) else image} is empty")
        fields = {k: plain(v) for k, v in row.items()} | (more(row) if more else {})
        text = template.format_map(fields | {"images": "<image>\n" * len(found), "options": lines(shown or [], mark)})
        return document(right, text=text, system=system, images=found, options=shown, group=of(row, group),
                        cluster=of(row, cluster), id=of(row, id) or "", scorer=scorer(row, right) if scorer else "",
                        kw=({"options": shown} if shown else {}) | (kw(row, right) if kw else {}),
                        extra={k: row[k] for k in extra or ()})
    return load


def renamed(load, **names: str):
    """The loader, with fields called otherwise, where a source has them: renamed(load, question="input")."""
    return lambda row, i: load(row | {new: row[old] for new, old in names.items() if new not in row and old in row}, i)


def listed(before: str = "", field: str = "multi-choice options"):
    """For `more`: the options as the set prints them, after a sentence."""
    return lambda row: {"listed": "\n".join([before, *row[field]] if before else row[field])}


def mathvista(row: dict) -> dict:
    """For `more`: the question with its unit, choices and hint."""
    kind = f"float {row['precision']:.0f}" if row["answer_type"] == "float" and row["precision"] else row["answer_type"]
    hint = HINTS.get(row["question_type"]) or HINTS.get(kind)
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    choices = row.get("choices") and f"Choices:\n{lines(row['choices'], '({}) {}')}"
    parts = [f"Question: {plain(row['question'])}{unit}", choices, hint and f"Hint: {hint}"]
    return {"asked": "\n".join(filter(None, parts))}


def in_lines(field: str):
    """For `options`: those that a field lists as lines, "A. left" and so on, or None. The last list counts: a caption
    may begin with "A." """
    def read(row):
        found = re.findall(r"^[ \t]*\(?([A-Ha-h])[.):。][ \t]*(\S.*?)[ \t]*$", row[field], re.M)
        labels = "".join(label for label, _ in found).upper()
        start = max(labels.rfind("A"), 0)
        return [text for _, text in found[start:]] if labels and LETTERS.startswith(labels[start:]) else None
    return read


def vstar(row: dict) -> list[str]:
    return [o.strip() for o in re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", row["text"])]


def mmmu(post: str, open_post: str = ""):
    """MMMU, MMMU-Pro: options as a printed list; pictures in image_1, image_2, .., as far as the text names them."""
    def load(row, i):
        choice = row.get("question_type", "multiple-choice") == "multiple-choice"
        options = ast.literal_eval(row["options"]) if choice else None
        text = "\n".join([row["question"].strip(), *([lines(options)] if choice else [])])
        names = sorted({name.replace(" ", "_") for name in re.findall(r"<(image \d+)>", text)})
        if empty := [name for name in names if not row[name]]:
            raise BadRow(f"the question names {empty[0]}, which is empty")
        images = [image for name in names for image in pictures(row, row[name])]
        gold = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else row["answer"]
        subject = row.get("subject") or re.sub(r"^[^_]*_|_\d+$", "", row["id"])
        domain = next((d for d, names in MMMU_DOMAINS.items() if subject in names.split()), "")
        return document(gold, text="<image>\n" * len(images) + f"{text}\n\n{post if choice else open_post}",
                        images=images, options=options, scorer="choice" if choice else "math", id=row["id"],
                        kw={"options": options} if choice else {"abs_tol": 0.005},  # two decimals
                        group=f"{domain}/{subject}" if domain else subject)
    return load


def xlrs(row, i):
    several = row["category"] == "Land use classification/Overall Land use classification"
    return ask("{images}{question}{listed}\n" + (XLRS_SEVERAL if several else XLRS), group="category",
               options=lambda r: bare(r["multi-choice options"]), more=listed("The choices are listed below:"))(row, i)


def sfe(row, i):
    """The scorer by question type; two tasks ask for boxes."""
    kind, gold = row["question_type"], row["answer"].strip()
    options = row["options"] if kind == "mcq" else None
    scorer = {"mcq": "choice", "open_ended": "overlap"}.get(kind) or open_kind(row, gold).replace("molecule", "exact")
    if row["id"].split("/")[0].lower() in ("e011", "e012"):
        scorer = "iou"
    images = [image if isinstance(image, bytes) or image.exists() else row["_root"] / "sfe" / "images" / image.name
              for image in pictures(row, row["images"])]  # names, of files beside the folders of the languages
    text = (f"You are an expert in {row['field']} and need to solve the following question.\n{SFE[kind]}\n\n"
            f"{plain(row['question'])}")
    return document(gold, text="<image>\n" * len(images) + "\n".join([text, *(options or [])]), images=images,
                    id=row["id"], options=options and bare(options), group=row["field"], scorer=scorer,
                    kw={"options": bare(options)} if options else YES if scorer == "choice" else {})


def superchem(language: str, template: str):
    """Pictures stand inside the question and the options, as <MultiModal>![name](link)</MultiModal>."""
    def load(row, i):
        options = {k: v for k, v in sorted(dict(row[f"options_{language}"] or {}).items()) if v is not None}
        text = template.format(question=row[f"question_{language}"],
                               options="".join(f"{k}: {v}\n" for k, v in options.items()))
        stored = {k: v for field in ("question_images", "options_images")
                  for k, v in dict(row.get(field) or {}).items() if v is not None}
        images = []
        def place(tag):
            link = re.fullmatch(r"\s*!?\s*\[.+\]\s*\(([^)]+)\)\s*", tag[1], re.S)
            if link is None or link[1] not in stored:
                raise BadRow(f"{tag[0][:200]} names no image of question_images or options_images")
            images.append(stored[link[1]])
            return "<image>"
        text = re.sub(r"<MultiModal>(.*?)</MultiModal>", place, text, flags=re.I | re.S)
        choice, gold = row["question_type"] == "multiple_choice", as_list(row[f"answer_{language}"], None)
        return document("".join(gold) if choice else gold[0], text=text, images=images,
                        scorer="choice-set" if choice else "exact", chance=0.0,  # any set of letters may be right
                        kw={"labels": "".join(options)} if choice else {}, id=row.get("uuid") or "")
    return load


def smol(head: str):
    """SMolInstruct: the benchmark's sentence, then a question of the data set; tags such as <SMILES> stay in it."""
    def load(row, i):
        gold = re.sub(r"</?[A-Z_]+>", "", str(row["answer"] if "answer" in row else row["output"])).strip()
        question = row["input"] if "input" in row else row["question"]
        return document(gold, text=f"{head}\n\n{question.strip()}", id=row.get("id") or "")
    return load


def paper(row: dict) -> str:
    """Text of the pages of a paper that a SciAssess row is about."""
    doi = row["doi"].replace("/", "_").replace(" (Supporting Information)", "_si")
    file = row["_root"] / "sciassess" / "papers" / f"{doi}.txt"
    if not file.exists():
        raise BadRow(f"the text of the paper {row['doi']} is not there: {file}")
    first, last = row.get("pages") or (1, -1)
    return "\n".join(file.read_text(encoding="utf-8").split("\f")[first - 1:last if last > 0 else None])


def sciassess(row, i):
    """The row's own messages; the paper, where it is about one, in front of the question."""
    gold = row["ideal"][0] if isinstance(row["ideal"], list) else row["ideal"]
    messages, kw, options = [dict(m) for m in row["input"]], {}, row.get("option")
    if row.get("doi"):
        user = messages[-1]["content"]
        messages[-1]["content"] = user.replace("<PDF>", paper(row)) if "<PDF>" in user else f"{paper(row)}\n\n{user}"
    if options:
        gold, options = re.match(r"\s*\(?(\w)\b", gold)[1].upper(), bare(options)
        kw = {"options": options}
    elif "compare_fields" in row:
        gold, kw = named_table(gold, row["compare_fields"], row.get("index"))
    return document(gold, options=options, kw=kw) | {"messages": messages}


def named_table(text: str, fields: list, index: str | None) -> tuple[str, dict]:
    """A right table with one header line, and the scorer's arguments. Fields of two parts stand under two headings."""
    table = list(csv.reader(text.strip().splitlines()))
    if any(isinstance(f, list) for f in fields):
        table = one_header(table)
    table[0][0] = table[0][0] or index or ""  # some tables leave the corner empty
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table)
    names = [" ".join(f) if isinstance(f, list) else f for f in fields]
    return out.getvalue().strip(), {"fields": names} | ({"index": index} if index else {})


def olympicarena(row, i):
    kind, answer = row["answer_type"], row["answer"]
    if not answer:
        raise BadRow("no answer: the test part has none, take the validation part")
    gold = ", ".join(as_list(answer, None))
    scorer = {"SC": "choice", "MC": "choice-set", "TF": "choice"}.get(kind, "math")
    kw = {"labels": ("True", "False")} if kind == "TF" else {"abs_tol": 1e-5} if scorer == "math" else {}
    kw |= {"equation": True} if kind == "EQ" and "=" in gold else {}
    return document([gold, f"\\{{{gold}\\}}"] if kind == "SET" else gold, text=plain(row["prompt"]), system=ARENA,
                    scorer=scorer, kw=kw, group=row.get("modality"), id=row["id"])


def olympiad(row, i):
    return document(row["final_answer"][0], text=row["question"].strip(), system=BOXED, group=row["subfield"],
                    id=row["id"], kw={"abs_tol": float(row["error"] or 1e-8)})


def scibench(row, i):
    if row["_file"].stem.endswith("_sol"):  # worked examples
        return None
    unit = row["unit"].strip()
    text = f"You are a helpful assistant. {row['problem_text'].strip()}"
    return document(row["answer_number"].strip(), text=text + (f" Give the answer in {unit}." if unit else ""),
                    group=row["source"])


def selfies(smiles: str) -> str:
    try:
        import selfies as library
    except ImportError:
        raise UserError("this task needs selfies: pip install -r requirements-science.txt") from None
    try:
        return library.encoder(smiles, strict=False)  # nitro groups with five bonds, too
    except library.EncoderError as e:
        raise BadRow(f"SMILES {smiles} has no SELFIES: {' '.join(str(e).split())[:200]}") from None


def molecule_property(row, i):
    question, smiles, column = PROPERTIES[row["_file"].stem]
    if row[column] not in ("0", "1"):  # not measured
        return None
    return document(("False", "True")[int(row[column])], group=row["_file"].stem, chance=0.5,
                    text=PROPERTY.format(question=question, molecule=selfies(row[smiles].replace("\\\\", "\\"))))


def describe_molecule(row, i):
    return document(row["description"], text=MOL2CAPTION.format(molecule=selfies(row["SMILES"])), id=row["CID"])


def draw_molecule(row, i):
    return document(row["SMILES"], text=CAPTION2MOL.format(description=row["description"]), id=row["CID"])


def toy(row, i):
    """toy.py's held-out questions."""
    text, options = row["question"], row["options"]
    if options == []:
        raise BadRow("no options")
    if options and lines(options) not in text:
        text += f"\n{lines(options)}\n{DIRECT}"
    images = pictures(row, row["image"] or None)
    scorer = {"multiple-choice": "choice", "boolean": "choice", "number": "math", "any": "exact"}[row["answer_type"]]
    return document(row["answer"], text="<image>\n" * len(images) + text, images=images, options=options, id=row["id"],
                    group=row["discipline"], chance=row["chance"], scorer=scorer,
                    kw={"options": options} if options else YES if scorer == "choice" else {})


# ---- the harness' forms: plain prompts ------------------------------------------------------------------------------
def exam(row: dict) -> dict:
    """MMLU, C-Eval and CMMLU alike, from csv or the hub: question, choices, answer (a letter), subject."""
    row = row | {k.lower() if len(k) > 1 else k: v for k, v in row.items()}
    answer = row["answer"] if isinstance(row["answer"], str) else LETTERS[row["answer"]]
    return row | {"question": row["question"].strip(), "choices": row.get("choices") or [row[c] for c in "ABCD"],
                  "answer": answer, "subject": row.get("subject") or part(row)}


def letters(description: str, template: str, names: dict[str, str] | None = None):
    """The letter A-D of the highest log-probability. names: the subjects' names in the description."""
    def load(row, i):
        row = exam(row)
        gold, subject = LETTERS.index(row["answer"]), row["subject"]
        if gold > 3:
            raise BadRow(f"the right answer {row['answer']} is none of A to D")
        text = template.format(question=row["question"], options=lines(row["choices"]))
        return document(gold, pairs=[(text, f" {c}") for c in "ABCD"], options="ABCD", group=subject,
                        shot=f"{text} {LETTERS[gold]}",
                        description=description.format(names[subject] if names else subject.replace("_", " ")))
    return load


def compare(read: Callable[[dict], tuple | None]):
    """The choice of the highest log-probability. read: row -> context, choices, index of the right one (or several)
    and, where it matters, group; None: no question."""
    def load(row, i):
        if (found := read(row)) is None:
            return None
        context, choices, gold, *group = found
        if not all(0 <= g < len(choices) for g in (gold if isinstance(gold, list) else [gold])):
            raise BadRow(f"the right answer, number {gold}, is none of {len(choices)} options")
        right = choices[gold[0] if isinstance(gold, list) else gold]
        return document(gold, pairs=[(context, f" {c}") for c in choices], options=choices, shot=f"{context} {right}",
                        group=group and group[0])
    return load


def arc(row):
    choices = row["choices"]
    if row["answerKey"] not in choices["label"]:
        raise BadRow(f"the right answer {row['answerKey']} is none of the options {choices['label']}")
    return f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"])


def hellaswag(row):
    def clean(text):  # brackets come from WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in row["endings"]], int(row["label"])


def agieval(row):
    if not row.get("choices"):  # the two open subsets have tasks of their own
        return None
    subset = re.sub(r"^agieval-", "", row["_file"].parts[row["_file"].parts.index("agieval") + 1])
    return row["query"], row["choices"], [int(g) for g in row["gold"]], subset


def cluewsc(row):
    return CLUEWSC.format(text=row["text"], **row["target"]), ["A", "B"], int(str(row["label"]).lower() != "true")


@functools.lru_cache
def shuffles(count: int) -> list[list[int]]:
    rng, orders = random.Random(42), [list(range(4)) for _ in range(count)]
    for order in orders:
        rng.shuffle(order)
    return orders


def gpqa(row, i):
    answers = [(row[c] or " ").strip().replace(" [title]", ". ").replace("  ", " ") for c in
               ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")]
    order, labels = shuffles(1000)[i], [f"({c})" for c in "ABCD"]
    text = f"Question: {row['Question']}\nChoices:\n{lines([answers[k] for k in order], '({}) {}')}\nAnswer:"
    gold = order.index(3)
    return document(gold, pairs=[(text, f" {label}") for label in labels], options=labels, description=GPQA,
                    shot=f"{text} {labels[gold]}", group=row.get("High-level domain"))


def winogrande(row, i):
    """The same end after two beginnings (partial evaluation)."""
    if "sentence" not in row:  # LLM-Adapters' form of the validation part
        m = re.search(r"sentence: (.*)\s+Option1: (.*) Option2: (.*) Answer format", row["instruction"], re.S)
        row = {"sentence": m[1].rstrip(), "option1": m[2], "option2": m[3], "answer": row["answer"][-1]}
    before, after = row["sentence"].split("_", 1)
    pairs, gold = [(before + row[f"option{k}"], " " + after.strip()) for k in (1, 2)], int(row["answer"]) - 1
    return document(gold, pairs=pairs, options=[context for context, _ in pairs], shot="".join(pairs[gold]))


def complete(template: str, answer: str = "answer", gold=as_text, *, shot: Callable[[dict], str] | None = None,
             description: str = "", group=None, examples=(), more=None):
    """The model goes on behind the template. shot: the answer as an example gives it."""
    def load(row, i):
        context, subject = template.format_map(row | (more(row) if more else {})), of(row, group)
        return document(gold(row[answer], None), context=context, group=subject, examples=examples,
                        shot=shot and f"{context} {shot(row)}", description=description.format(subject))
    return load


def bbh(row, i):
    """The authors' prompt file of the task: a sentence, then three examples of reasoning."""
    task = row["_file"].stem
    file = row["_root"] / row["_file"].parent / "cot-prompts" / f"{task}.txt"
    text = file.read_text(encoding="utf-8").replace("step by step. ", "step by step.\n")  # one of the 27 has a space
    description, *examples = text.partition("-----\n")[2].strip().split("\n\nQ: ")
    return document(row["target"], context=f"Q: {row['input']}\nA: Let's think step by step.\n", group=task,
                    description=f"{description}\n\n", examples=[f"Q: {e}" for e in examples])
