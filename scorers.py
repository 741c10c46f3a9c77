"""Scores of benchmarks: fourteen scorers that read an answer out of a response and say in numbers how right it is, and
the ways their numbers are averaged. What is read where is the business of rewards.py, the verifiers of RL.

    score("choice", "<think>C?</think>The answer is (B).", "B", labels="ABCD")     # Scored({"acc": 1.0}, "B")
    score("regress", "I cannot say.", -3.1)                                # Scored({"squared_error": None}, None)
    mean([1.0, None, 0.0])     # {"value": 0.33, "stderr": 0.33, "n": 3, "unparsed": 1}

The first number is the benchmark's metric (main= puts another one first). None: unparsed, the response holds no answer
of the kind. Means count that as 0 and say how often; a root mean square leaves it out and says how often. Text up to
</think> is no part of an answer, and a thinking that never ends has none. Several right answers: the best one counts,
but for sets, tables and boxes, which are compared as a whole. A right answer that is empty raises, and so does one that
is not of the scorer's kind (math, exact, contains, relaxed, anls and overlap take any text).

Departures from the released evaluation (lmms-eval fork) and from the benchmarks' own scripts
1. choice: a letter counts where an answer names one (there: the first character, any letter, or a random one).
2. molecule: an invalid molecule is 0 in every similarity (there: left out); validity stands beside it.
3. regress: an unreadable number is unparsed (there: 0.0, and a sign is not read).
4. relaxed: 45% is 0.45, and 45 where only one side has the sign, as ChartQA's answers often leave it out (there: always
   0.45, so that 45% is wrong for 45). The number is read out of a sentence (there: the response is a number or wrong).
5. iou: extra boxes count as misses, and the best pairs are matched first (there: in the order of the response).
6. set-f1: equal but for case and spaces (SciAssess: neighbours in an embedding). table: a cell matches or not
   (SciAssess: parts of strings count, and so do similar ones); a column under two headings needs both (the lower).
7. METEOR without WordNet's synonyms; BLEU over words and signs unless a WordPiece vocabulary is given.
8. wemath: strict and loose scores as the benchmark's own script has them (there: declared, never computed).
9. Names of molecules (exact with split) are compared as they stand, as there: N- and n-, (R) and (r), 1,12 and 11,2 are
   different. Not so spaces, tags and a point at the end (there: these, too).
"""
import csv
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import zip_longest
from typing import NamedTuple

from rewards import (LETTERS, NUMBER, SUPERSCRIPTS, _answer_or_last_line, _science, anls, canonical, edit_distance,
                     equation_equal, extract_answer, iou, is_formula, marked, math_expression, molecule_of,
                     plain_numbers, predict, read_boolean, read_choice, read_number, tanimoto, text_equal, value_of,
                     visible, whole_number, word_numbers)


class Scored(NamedTuple):
    numbers: dict[str, float | None]  # the first one is the metric; all None: unparsed
    read: str | None                  # the answer as it was read


def score(scorer: str, response: str, gold, main: str = "", **kw) -> Scored:
    """gold: one right answer or a list (scorers of ANY_OF: one of them suffices). kw: those of the scorer."""
    assert scorer in SCORERS, f"scorer {scorer!r}: choose one of {', '.join(SCORERS)}"
    compare, names = SCORERS[scorer]
    assert not main or main in names, f"{scorer} has no number {main!r}: choose one of {', '.join(names)}"
    names = sorted(names, key=lambda name: name != main)
    text = visible(response) or ""  # the only place that knows about <think>
    golds = list(gold) if scorer in ANY_OF and isinstance(gold, (list, tuple)) else [gold]
    golds = [g for g in golds if scorer not in ANY_OF or str(g).strip()]
    assert golds, f"{scorer}: there is no right answer"
    found = [f for f in (compare(text, g, **kw) for g in golds) if f is not None]
    if not found:
        return Scored(dict.fromkeys(names), None)
    read, numbers = max(found, key=lambda f: f[1][names[0]])
    return Scored({name: float(numbers[name]) for name in names}, read)


# ---- where the answer stands ----------------------------------------------------------------------------------------
WIDE = str.maketrans("（）：！？；＝－＋．　" + "".join(chr(ord(c) + 0xFEE0) for c in "ABCDEFGHIJ0123456789"),
                     "():!?;=-+. ABCDEFGHIJ0123456789")
HAN = r"[\u4e00-\u9fff]"


def said(text: str) -> str:
    """The text with other ways to mark an answer turned into the one that rewards.marked reads: a JSON object's
    "answer", "the correct option is ..", 答案是.., 选.."""
    if found := re.findall(r'"(?:final[_ ])?answer"\s*:\s*("(?:[^"\\]|\\.)*"|\[[^\[\]]*\]|[-+.\w]+)', text, re.I):
        try:
            value = json.loads(found[-1])
        except ValueError:
            value = found[-1].strip('"')
        return f"<answer>{', '.join(map(str, value)) if isinstance(value, list) else value}</answer>"
    text = re.sub(r"\b(?:(?:correct|right|best) (?:answer )?(?:option|choice)(?: is| would be|\s*:)"
                  r"|answer (?:is|would be|:))", "answer is",
                  text.translate(WIDE), flags=re.I)
    text = re.sub(rf"^([^\w\n]*[A-J])、(?={HAN})", r"\1. ", text, flags=re.M)
    label = r"\(?[A-J]\)?"
    text = re.sub(rf"(?<!不)(?<!不[能应可])选择?\s*:?\s*({label}(?:[、,，和 ]*{label})*)(?![A-Za-z]|\s*或)",
                  lambda m: f"\nThe answer is {' '.join(re.findall('[A-J]', m[1]))}.\n", text)
    return re.sub(r"(?:答案|(?:正确|最佳)的?选项)\s*(?:应该?)?\s*(?:[是为选]|=|:)+\s*:?\s*[\"“]?([^\n。；;，”\"]+?)(?:选?项)?[\"”]?"
                  r"(?=[\n。；;，]|因为|$)", r"\nThe answer is \1.\n", text)


def said_number(text: str) -> str:
    """said, without Chinese units behind a number and with a space between a Chinese character and a number."""
    text = re.sub(rf"(?<=\d)\s*{HAN}+(?=[\s}}<。.,，]|$)", "", said(text))
    return re.sub(rf"(?<={HAN})(?=[-\d])|(?<=\d)(?={HAN})", " ", text)


def places(text: str) -> list[str]:
    """Where a short answer may stand, the surest first: what is marked, else a short text, else its last line."""
    text = said(text)
    mark = marked(text)
    found = [_answer_or_last_line(text)] if mark is None else [mark, marked(mark) or ""]
    return [p for p in found if p]


def short_answer(text: str) -> str | None:
    return next(iter(places(text)), None)


# ---- S1, S2: labels -------------------------------------------------------------------------------------------------
LABEL = r"(?:the )?(?:(?:option|choice|answer) )?[*$]*\(?([{}])\)?[*$]*"


def ends_in(text: str, labels: str) -> str | None:
    """The label of a last sentence "Thus, B." NOTE a response that is cut at "Thus, A" or "So, I" names none."""
    m = re.search(r"(?:^|[.!?;:,]\s|\n)\**(?:thus|therefore|hence|so|Thus|Therefore|Hence|So), " + LABEL.format(labels)
                  + r"(?:[.!)*]+|(?<![AI]))\s*$", text)
    return m and m[1].upper()


def concluded(text: str, labels: str) -> str | None:
    """The only label that "the answer should be B." or "I choose B." names, with no "but" behind it. NOTE the sentence
    ends with the label: "must be between", "should be A or B" name none. These are no marks in `said`, as "the answer
    is" is: "The answer must be positive. I get 7." would lose its number."""
    verb = r"(?:answer|option|choice) (?:should|must|has to) be:?|\bI(?:'d|'ll| would| will)? (?:choose|pick|select)"
    end = r"(?=[.!]?[ \t]*(?:\n|$)|[.!][ \t]+(?![a-z])|,? (?:because|since|as)\b)"
    last = max((m.start() for m in re.finditer(r"\b(?:but|however|wait|actually)\b", text, re.I)), default=-1)
    found = {m[1] for m in re.finditer(rf"(?<!if )(?<!If )(?:{verb}) {LABEL.format(labels)}{end}", text)
             if m.start() > last}
    return found.pop().upper() if len(found) == 1 else None


def read_label(text: str, labels: str, options: list[str] | None) -> str | None:
    """One label; failing the places of an answer: a first line that is one, the only one called correct or chosen, the
    only option that a short answer mentions. A list of the options names none."""
    plain = said(text)
    listed, free = re.findall(rf"^[^\w\n]*([{labels}])[.):]", plain, re.M | re.I), marked(plain) is None
    if free and (last := ends_in(plain, labels)):
        return last
    is_list = free and len(listed) > 1 and listed == sorted(set(listed))
    def item(line): return is_list and re.match(rf"\W*[{labels}][.):]", line, re.I) and not bare(line)
    def bare(line): return re.fullmatch(r"\W*(?:option|choice)?\W*\w\W*", line, re.I)
    ends = [line for line in (plain.rpartition("\n")[2], plain.partition("\n")[0]) if free or bare(line)]
    for line in places(text) + ends:
        if not item(line):
            for style in dict.fromkeys((labels.upper(), labels)):
                if got := read_choice(line, options, style):
                    return got
    called = re.findall(rf"(?<!or )(?<!and )(?<!nor )\b([{labels}])\)? is (?:the )?(?:correct|right|best)\b", plain)
    called += re.findall(rf"(?<![A-Za-z和或])([{labels}])(?:选?项)?是?正确", plain)
    if len(set(called)) == 1:
        return called[0].upper()
    if free and (chosen := concluded(plain, labels)):
        return chosen
    answer = short_answer(text) or ""
    if options and not item(answer) and not re.search(r"\b(?:not|never|except|neither|cannot)\b|n't\b|[不非没]", answer):
        spaced = [re.sub(HAN, r" \g<0> ", t) for t in (answer, *options)]  # a Chinese character is a word
        answer, *names = (f" {normal(t)} " for t in spaced)
        named = [k for k, name in enumerate(names) if name.strip() and name in answer]
        if len(named) == 1:
            return labels[named[0]].upper()
    return None


def polarity(text: str) -> bool | None:
    m = re.match(r"\W*(?:(不|否|错|没有)|(是|对|正确|能|可以|有))", text)
    return bool(m[2]) if m else read_boolean(text)


def read_polarity(text: str) -> bool | None:
    """A line of one word is surer than a sentence, the last line surer than the first."""
    plain = said(text)
    lines = [plain.rpartition("\n")[2], plain.partition("\n")[0]] if marked(plain) is None else []
    lines = [line for line in lines if re.fullmatch(r"\W*\w+\W*", line)] + places(text) + lines
    return next((p for p in map(polarity, lines) if p is not None), None)


def choice(text: str, gold: str, labels: str | Sequence[str] = LETTERS, options: list[str] | None = None):
    """labels: letters or digits, "ABCD" or "1234567", or a pair of words: ("yes", "no"), ("True", "False"), "是否".
    gold: one of them, or an option's text."""
    if all(re.fullmatch("[A-Za-z0-9]", label) for label in labels):
        labels = "".join(labels)
        want, got = read_label(gold, labels, options), read_label(text, labels, options)
        assert want and len(want) == 1, f"the right answer {gold!r} is none of {labels} {options or ''}"
    else:
        want, said_yes = polarity(gold), read_polarity(text)
        assert want is not None and len(labels) == 2, f"the right answer {gold!r} is none of {labels}"
        want, got = (labels[not yes] if yes is not None else None for yes in (want, said_yes))
    return got and (got, {"acc": got == want})


def choice_set(text: str, gold: str | Sequence[str], labels: str = LETTERS, options: list[str] | None = None):
    """All right letters and no other, in any order."""
    frame = re.compile(r"^\W*(?:the )?(?:correct )?(?:options?|choices?|answers?|statements?)\s+(?=\W*[A-J]\b)"
                       r"|\s+(?:are|is) (?:both |all )?(?:correct|right|true)\W*$", re.I)
    def read(text): return read_choice(frame.sub("", text), options, labels)
    want = read_choice(gold if isinstance(gold, str) else ", ".join(gold), options, labels)
    assert want, f"the right answer {gold!r} names none of {labels}"
    text = re.sub(r"\}\$?[\s,;]*(?:and)?\s*\$?\\boxed\{", ", ", text)  # \boxed{A}, \boxed{C}
    first = re.split(r"\n|[.。](?:\s|$)", said(text))[0] if marked(said(text)) is None else ""
    got = next((g for g in map(read, [*places(text), first]) if g), None)
    return got and (got, {"acc": got == want})


# ---- S3 to S7: mathematics and short texts --------------------------------------------------------------------------
def maths(text: str, gold: str, rel_tol: float = 1e-6, abs_tol: float = 0.0, labels: str = "ABCDEFGH",
          options: list[str] | None = None, equation: bool = False):
    """strict: the answer is marked, too (\\boxed{}, '#### x', 'the answer is x'). A single letter as right answer is a
    choice; whole numbers are equal or within abs_tol, or within rel_tol where that is above 1e-4. equation: the answer
    is one, too."""
    text, strict = said_number(text), marked(said(text)) is not None
    letter = re.fullmatch(r"\(?([A-Z])\)?", re.sub(r"\\(?:text|textbf|mathrm)\{(.*)\}", r"\1", gold.strip()))
    if letter and letter[1] in labels:
        found = choice(text, letter[1], labels, options)
        return found and (found[0], found[1] | {"strict": strict and found[1]["acc"]})
    only_number = not strict and whole_number(gold) is not None  # an unmarked text without a number is no answer
    read = predict(text, "number" if only_number else "math-expressions")
    right = read is not None and math_expression(text, gold, rel_tol, abs_tol)
    if equation and read is not None and not only_number:
        of = [m and m[1] for m in (re.match(r"[\s$]*([A-Za-z](?:\([a-z]\))?)\s*=", s) for s in (read, gold))]
        right = "=" in read and (right and (None in of or of[0] == of[1]) or equation_equal(read, gold))
    return read and (read, {"acc": right, "strict": strict and right})


def normal(text: str, ignore: Sequence[str] = ("case", "punctuation", "articles")) -> str:
    """What is left of a text without differences of these kinds; number words become digits with "numbers"."""
    text = text.translate(WIDE)
    text = text.casefold() if "case" in ignore else text
    text = word_numbers(text) if "numbers" in ignore else text
    if "punctuation" in ignore:  # a point or comma inside a number and a sign before it are no punctuation
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        text = re.sub(r"(?<=\d)[.:/](?=\d)|(?<!\S)-(?=\.?\d)|[^\W_]|\s|([\W_])", lambda m: "" if m[1] else m[0], text)
    if "articles" in ignore:
        text = re.sub(r"\b(?:a|an|the)\b(?=\s+\S)", " ", text, flags=re.I)
    return " ".join(text.split())


def exact(text: str, gold: str, ignore: Sequence[str] = ("case", "punctuation", "articles"), split: str = "",
          options: list[str] | None = None):
    """ignore: differences that do not matter, of case, punctuation, articles, numbers (words for digits). Formulas are
    compared as they stand but for spaces. split: both are lists with this sign between, in any order."""
    answer = short_answer(text)
    if answer is None:
        return None
    if options or re.fullmatch(r"\(?[A-R]\)?", gold.strip()):  # BIG-Bench Hard has options (A) to (R)
        if found := choice(text, gold, "ABCDEFGHIJKLMNOPQR", options):
            return found[0], {"exact": found[1]["acc"]}
    if split:
        def parts(t): return sorted(filter(None, (normal(p, ignore).strip(" .") for p in t.split(split))))
        answer = re.sub(r"</?[A-Z]+>", "", answer).strip()  # <IUPAC>
        return answer, {"exact": parts(answer) == parts(gold) != []}
    if is_formula(gold):
        return answer, {"exact": text_equal(answer, gold)}
    return answer, {"exact": normal(answer, ignore) == normal(gold, ignore) != "" or answer.strip() == gold.strip()}


def contains(text: str, gold: str, spaces: bool = True):
    """The right text anywhere in the response, but for case. spaces: False drops all of them (HME100k)."""
    a, b = ((" " if spaces else "").join(t.casefold().split()) for t in (text, gold))
    assert b, "the right text is empty"
    return (text, {"contains": b in a}) if a else None


def relaxed(text: str, gold: str, tol: float = 0.05):
    """A number within tol of the right one, relative to it; other texts equal but for case, articles, punctuation."""
    answer, want = short_answer(text), whole_number(gold)
    if want is None:
        return answer and (answer, {"relaxed": text_equal(answer, gold)})
    got = whole_number(answer or "") or read_number(said_number(text))
    if got is None:
        return answer and (answer, {"relaxed": False})
    (x, x_percent), (y, y_percent) = value_of(got), value_of(want)
    if x_percent == y_percent or not near(x, y, tol):  # else one of them left the sign out
        x, y = (x / 100 if x_percent else x), (y / 100 if y_percent else y)
    return got[0].strip(), {"relaxed": near(x, y, tol)}


def near(x: Fraction, want: Fraction, tol: float) -> bool:
    return abs(x - want) <= Fraction(str(tol)) * abs(want)


def anls_of(text: str, gold: str, threshold: float = 0.5):
    answer = extract_answer(said(text)) or text
    return (answer, {"anls": anls(answer.translate(WIDE), gold.translate(WIDE), threshold)}) if answer else None


# ---- S8: molecules and formulas -------------------------------------------------------------------------------------
def notation(text: str, fits: Callable[[str], bool]) -> str | None:
    """The SMILES, SELFIES or formula of a response: in its tag, marked, in a code span, or the last word behind "is" or
    ":". The first that fits, else the first that is one word: a molecule that is not valid."""
    text = re.sub(r"\\(?:text|mathrm|texttt)\{([^{}]*)\}", r"\1", text)
    tags = re.findall(r"<(SMILES|SELFIES|MOLFORMULA)>\s*(.*?)\s*</\1>", text, re.S | re.I)
    spans = re.findall(r"```\w*\n?(.*?)```|`([^`]+)`", text, re.S)
    found = [tags[-1][1] if tags else "", marked(said(text)) or "", "".join(spans[-1]) if spans else "", text,
             text.rpartition("\n")[2], *re.findall(r"(?:\bis|:)\s+(\S+)\s*$", text),
             *[word for word in text.split(None, 1)[:1] if re.search(r"[()=#\[\]\d]", word)]]
    found = [re.sub(r"^(?:SMILES|SELFIES)\s*[:=]?\s*|^(?:[$`\"]|\*\*)+|[.,]?(?:[$`\"]|\*\*)*[.,]?$", "", f.strip())
             for f in found]
    found = [f for f in found if f and not re.search(r"\s", f)]
    return next((f for f in found if fits(f)), found[0] if found else None)


def plain_smiles(text: str) -> str:
    """As it stands, SELFIES decoded; ';' parts molecules in SmolInstruct."""
    selfies, text = _science("selfies"), text.strip().replace(";", ".")
    if re.fullmatch(r"(?:\[[^\[\]]+\]\.?)+", text):
        try:
            return selfies.decoder(text)
        except (selfies.DecoderError, RecursionError):
            pass
    return text


def molecule(text: str, gold: str):
    """SMILES or SELFIES. exact: the same canonical SMILES, with stereochemistry (and the same tags behind <sep>, in
    E-SMILES); levenshtein: similarity of the strings, 1 is equal. An invalid molecule is 0 in all but levenshtein."""
    def parts(t): return [p.strip() for p in t.partition("<sep>")[::2]]
    want, tags = parts(gold)
    want = plain_smiles(want)
    target = molecule_of(want)
    assert target is not None, f"the right answer {gold!r} is no molecule"
    read = notation(text, lambda t: molecule_of(plain_smiles(parts(t)[0])) is not None)
    if read is None:
        return None
    got, got_tags = parts(read)
    got = plain_smiles(got)
    mol = molecule_of(got)
    similar = {"levenshtein": 1 - edit_distance(got[:4000], want) / max(len(got[:4000]), len(want))}
    if mol is None:
        return read, dict.fromkeys(SCORERS["molecule"][1], 0.0) | similar
    formula, same = _science("rdkit.Chem.rdMolDescriptors").CalcMolFormula, canonical(got) == canonical(want)
    return read, similar | {
        "exact": same and "".join(got_tags.split()) == "".join(tags.split()), "valid": 1.0,
        "tanimoto": tanimoto(got, want), "maccs": key_similarity(mol, target),
        "rdk": 1.0 if same else path_similarity(mol, target),  # a single atom has no paths, and 0 with itself
        "formula_match": formula(mol) == formula(target)}


def key_similarity(a, b) -> float:
    return _science("rdkit.DataStructs").TanimotoSimilarity(*map(_science("rdkit.Chem.MACCSkeys").GenMACCSKeys, (a, b)))


def path_similarity(a, b) -> float:
    return _science("rdkit.DataStructs").TanimotoSimilarity(*map(_science("rdkit.Chem").RDKFingerprint, (a, b)))


def count_atoms(text: str) -> Counter | None:
    """Elements and charge of a molecular formula: C5H8, H8C5, Ca(OH)2, C₂H₄·HCl, NH4+, SO4^2-; None for others."""
    text = re.sub(r"[⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(SUPERSCRIPTS), text)
    text = text.translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉−·", "0123456789-."))
    text = re.sub(r"\\(?:mathrm|text|ce)\b|[\s_{}$\[\]]", "", text)
    if len(text) > 400:
        return None
    m = re.search(r"[\^(](?P<n>\d*)(?P<sign>[+-])\)?$|\^?(?P<sign2>[+-])(?P<n2>\d*)$", text)
    charge = int((m["sign"] or m["sign2"]) + (m["n"] or m["n2"] or "1")) if m else 0
    total = Counter({"charge": charge})
    for part in (text[:m.start()] if m else text).split("."):
        while inner := re.search(r"\(((?:[A-Z][a-z]?\d*)+)\)(\d*)", part):
            unit = re.sub(r"([A-Z][a-z]?)(\d*)", lambda e: e[1] + str(int(e[2] or 1) * int(inner[2] or 1)), inner[1])
            part = part[:inner.start()] + unit + part[inner.end():]
        if not (whole := re.fullmatch(r"(\d*)((?:[A-Z][a-z]?\d*)+)", part)):
            return None
        for element, n in re.findall(r"([A-Z][a-z]?)(\d*)", whole[2]):
            total[element] += int(n or 1) * int(whole[1] or 1)
    return total


def formula(text: str, gold: str):
    """The same atoms and charge. Lists parted by ';' are compared in any order."""
    def read(t):
        counts = [count_atoms(p) for p in t.split(";")]
        return None if None in counts else sorted(map(repr, (sorted(c.items()) for c in counts)))
    want = read(gold)
    assert want, f"the right answer {gold!r} is no molecular formula"
    text = re.sub(r"\s+(\d?[+-])(?=[\s.,<]|$)", r"^\1", re.sub(r";\s+", ";", text))  # SO4 2-
    answer = notation(text, lambda t: read(t) is not None)
    return answer and (answer, {"formula_match": read(answer) == want})


# ---- S9: overlap of texts -------------------------------------------------------------------------------------------
def words(text: str) -> list[str]:
    """Lower-case words, numbers and signs; a Chinese character is a word."""
    return re.findall(rf"{HAN}|(?:(?!{HAN})[^\W_])+|[^\w\s]|_", text.lower())


@functools.cache
def word_pieces(vocab: str) -> Callable[[str], list[str]]:
    """BERT's tokenizer with a vocab.txt (MolT5 counts BLEU and METEOR in the pieces of SciBERT, uncased)."""
    from tokenizers import BertWordPieceTokenizer
    tokenizer = BertWordPieceTokenizer(vocab, lowercase=True)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).tokens[:512]


def bleu(pairs: Sequence[tuple[list[str], list[str]]], n: int) -> float:
    """Corpus BLEU-n of (tokens, right tokens), one reference each, not smoothed (Papineni et al. 2002)."""
    def grams(t, k): return Counter(zip(*(t[i:] for i in range(k))))
    logs = 0.0
    for k in range(1, n + 1):
        hits = sum((grams(a, k) & grams(b, k)).total() for a, b in pairs)
        count = sum(max(1, len(a) - k + 1) for a, _ in pairs)
        if hits == 0:
            return 0.0
        logs += math.log(hits / count) / n
    ours, theirs = (sum(map(len, side)) for side in zip(*pairs))
    return math.exp(logs + min(0.0, 1 - theirs / ours))


def meteor(got: list[str], want: list[str]) -> float:
    """METEOR (Lavie and Agarwal 2007: alpha 0.9, beta 3, gamma 0.5) over equal words, then equal Porter stems."""
    stem = _science("nltk.stem.porter").PorterStemmer().stem  # rouge-score requires nltk
    left, right, pairs = list(enumerate(got)), list(enumerate(want)), []
    for key in (str.lower, stem):
        free = {}
        for j, w in right:
            free.setdefault(key(w), []).append(j)
        for i, w in reversed(left):
            if free.get(key(w)):
                pairs.append((i, free[key(w)].pop()))
        used = [set(side) for side in zip(*pairs)] or [(), ()]
        left, right = [x for x in left if x[0] not in used[0]], [x for x in right if x[0] not in used[1]]
    if not pairs:
        return 0.0
    pairs.sort()
    chunks = 1 + sum((a[0] + 1, a[1] + 1) != b for a, b in zip(pairs, pairs[1:]))
    precision, recall = len(pairs) / len(got), len(pairs) / len(want)
    return precision * recall / (0.9 * precision + 0.1 * recall) * (1 - 0.5 * (chunks / len(pairs)) ** 3)


class _Words:
    """rouge-score's tokens, with Chinese characters as words."""
    def __init__(self, stem: bool):
        self.stem = _science("nltk.stem.porter").PorterStemmer().stem if stem else lambda word: word

    def tokenize(self, text: str) -> list[str]:
        found = re.findall(rf"{HAN}|[a-z0-9]+", text.lower())
        return [self.stem(w) if len(w) > 3 else w for w in found]


def rouge(got: str, want: str, stem: bool) -> dict[str, float]:
    kinds = ["rougeL", "rouge1", "rouge2"]
    found = _science("rouge_score.rouge_scorer").RougeScorer(kinds, tokenizer=_Words(stem)).score(want, got)
    return {k: found[k].fmeasure for k in kinds}


def overlap(text: str, gold: str, stem: bool = True, vocab: str = ""):
    """F of ROUGE, BLEU of this one text, METEOR. stem: in ROUGE. vocab: a WordPiece vocab.txt for BLEU and METEOR."""
    assert words(gold), "the right text is empty"
    answer = (extract_answer(text) or text)[:20000]
    if not answer:
        return None
    pieces = word_pieces(vocab) if vocab else words
    pair = pieces(answer), pieces(gold)
    return answer, rouge(answer, gold, stem) | {"bleu2": bleu([pair], 2), "bleu4": bleu([pair], 4),
                                                "meteor": meteor(*pair)}


# ---- S10: regression ------------------------------------------------------------------------------------------------
def regress(text: str, gold: float | str):
    """Of free text: the number it starts with, else the last one behind "is", "=", ":", "≈" or "about", else its last
    one."""
    want = Fraction(str(gold))
    if tagged := re.findall(r"<NUMBER>(.*?)</NUMBER>", text, re.S | re.I):
        text = f"<answer>{tagged[-1]}</answer>"
    text = said_number(text)
    got = read_number(text)
    if got is not None and marked(text) is None:
        plain = plain_numbers(text)
        behind = [m for m in NUMBER.finditer(plain) if value_of(m) and
                  re.search(r"(?:\bis|=|:|≈|\babout|\bapproximately)[\s*\[(]*$", plain[:m.start()][-30:])]
        got = NUMBER.match(plain.lstrip(" *[(")) or (behind[-1] if behind else got)
    if got is None or value_of(got) is None:
        return None
    error = min(abs(value_of(got)[0] - want), 10 ** 12)  # no overflow
    return got[0].strip(), {"squared_error": float(error) ** 2}


# ---- S11: sets and tables -------------------------------------------------------------------------------------------
def body(text: str) -> str:
    """Of an answer of many lines."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    return tagged[-1] if tagged else text


def _outside(text: str, sign: str) -> list[str]:
    """Parts between the signs that stand outside of brackets; a comma between two digits belongs to a name."""
    depth, start, parts = 0, 0, []
    for k, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        name = c == "," and text[k - 1:k].isdigit() and text[k + 1:k + 2].isdigit()
        if c in sign and depth <= 0 and not name:
            parts, start = parts + [text[start:k]], k + 1
    return [p.strip() for p in parts + [text[start:]] if p.strip()]


def read_items(text: str, arity: int) -> set[tuple[str, ...]] | None:
    """Items of "(aspirin),(2,4-dinitrophenol)", of "(aspirin, fever), ..", or of a list with commas or a line each."""
    def clean(t): return " ".join(t.casefold().split()).strip(" .'\"“”`*")
    if re.fullmatch(r"\W*(?:none|n/?a|no \w+|empty|nothing)?\W*", text, re.I):
        return set() if text.strip() else None
    lines = [line for line in re.sub(r"\)\s*(?:,\s*)?and\s*\(", "), (", text).splitlines() if line.rstrip()[-1:] != ":"]
    pieces = [p for line in lines for p in _outside(re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line), ",;")]
    pieces = [re.sub(r"^[^()]*(?::|\b(?:is|are))\s*(?=\()", "", p) for p in pieces]
    groups = [p[1:-1] for p in (p.rstrip(". ") for p in pieces) if re.fullmatch(r"\(.*\)", p)]
    if arity > 1:
        split = [[clean(x) for x in _outside(g, ",")] for g in groups]
        split = [s if len(s) == arity else [clean(x) for x in re.split(r",\s+", g)] for g, s in zip(groups, split)]
        return {tuple(s) for s in split} or None
    return {(clean(p),) for p in groups or pieces if clean(p)} or None


def set_f1(text: str, gold: str | Sequence, arity: int = 1):
    """arity: parts of an item, 1 for entities, 2 for pairs. gold: in the response's notation, or a list of strings or
    of tuples."""
    if not isinstance(gold, str):
        gold = ", ".join(f"({g if isinstance(g, str) else ', '.join(g)})" for g in gold) or "()"
    want, answer = read_items(gold, arity), body(text)
    assert want is not None and all(len(w) == arity for w in want), f"the right items {gold!r} are not {arity} each"
    got = read_items(answer, arity)
    if got is None:
        return None
    hits = len(got & want)
    return answer, f1(hits, len(got), len(want))


def f1(hits: float, got: int, want: int) -> dict[str, float]:
    """Two empty sets are equal."""
    if got == want == 0:
        return {"f1": 1.0, "precision": 1.0, "recall": 1.0}
    return {"f1": 2 * hits / (got + want), "precision": hits / max(got, 1), "recall": hits / max(want, 1)}


def read_table(text: str) -> list[list[str]] | None:
    """Rows of the last fenced block, or of all lines with a sign between columns: CSV or Markdown."""
    fenced = re.findall(r"```[^\n`]*\n(.*?)```", text, re.S)
    lines = [line.strip() for line in (fenced[-1] if fenced else text).splitlines()]
    piped = [line[1:].removesuffix("|") for line in lines
             if line.startswith("|") and not re.fullmatch(r"[|:\s-]+", line)]
    rows = csv.reader(piped or [line for line in lines if "," in line], delimiter="|" if piped else ",",
                      skipinitialspace=True)
    rows = [[cell.strip()[:200] for cell in row] for row in rows][:500]
    return rows if len(rows) > 1 else None


def one_header(rows: list[list[str]]) -> list[list[str]]:
    """Two header lines, "Composition,Composition" over "Fe,Co", as one: "Composition Fe". An upper heading goes on
    until the next."""
    head, above = [], ""
    for upper, lower in zip_longest(rows[0], rows[1], fillvalue=""):
        lower = "" if lower.casefold() == "nan" else lower  # SciAssess' own example has it in the corner
        above = upper or (above if lower else "")
        head.append(f"{above} {lower}".strip())
    return [head, *rows[2:]]


def align(want: Sequence[str], got: Sequence[str], least: float) -> dict[int, int]:
    """Pairs of names, one to one, the most alike first, none less alike than `least`."""
    want, got = (["".join(name.casefold().split()) for name in side] for side in (want, got))
    def like(a, b): return anls(a, b, least) if a and b else float(a == b)
    alike = [(-like(x, y), i, j) for i, x in enumerate(want) for j, y in enumerate(got)]
    pairs = {}
    for _, i, j in sorted(a for a in alike if a[0] <= -least):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


POWERS = {"pm": -12, "nm": -9, "um": -6, "mm": -3}  # of mole a litre
NOTHING = re.compile(r"(?:nan|n\.?/?a\.?|n\.?d\.?|not (?:determined|tested|provided)|[-–—/])?", re.I)


def same_cell(a: str, b: str, tol: float) -> bool:
    """Numbers within tol, with the same sign (<, >) and, where both have one, the same unit; or equal texts. What is
    not given counts as 0, as in SciAssess: it asks for nan where its answers have 0.0."""
    def read(t):
        if NOTHING.fullmatch(t.strip()):
            return "", Fraction(0), ""
        m = re.match(r"([<>≤≥~]?)\s*=?", t)
        number = NUMBER.match(plain_numbers(t[m.end():]))
        if number is None or value_of(number) is None:
            return None
        unit = plain_numbers(t[m.end():])[number.end():].partition("±")[0]
        return m[1], value_of(number)[0], "".join(unit.casefold().replace("µ", "u").replace("μ", "u").split())
    x, y = read(a), read(b)
    if x and y:
        (sign, number, unit), (want_sign, want, want_unit) = x, y
        if {unit, want_unit} <= POWERS.keys():
            number, unit = number * Fraction(10) ** (POWERS[unit] - POWERS[want_unit]), want_unit
        return sign == want_sign and (unit == want_unit or not unit or not want_unit) and near(number, want, tol)
    return " ".join(a.casefold().split()) == " ".join(b.casefold().split())


def table(text: str, gold: str, index: str | Sequence[str] = "", fields: Sequence[str] = (), tol: float = 0.01,
          least: float = 0.9):
    """Cells of the right table that the response has, too. index: the columns that name a row (the first column);
    fields: the columns that are compared (all others), SMILES as molecules. Rows and columns are aligned by their
    names, letters alike by at least `least`; two header lines of a response count as one where more columns fit so.
    precision: of the response's rows, in these columns."""
    want, got = read_table(gold), read_table(body(text)[:100_000])
    assert want, f"the right table {gold[:80]!r} has no rows"
    if got is None:
        return None
    index = [index] if isinstance(index, str) and index else list(index) or [want[0][0]]
    fields = [f for f in fields or want[0] if f not in index]
    absent = [name for name in [*index, *fields] if name not in want[0]]
    assert not absent and fields, f"the right table has the columns {want[0]}, not {absent or 'one to compare'}"
    if len(got) > 2 and got[1][0].casefold() in ("", "nan"):
        got = max(got, one_header(got), key=lambda rows: len(align([*index, *fields], rows[0], least)))
    columns = align([*index, *fields], got[0], least)
    if 0 not in columns.keys() | set(columns.values()):  # as in SciAssess, whose answers have empty corners themselves
        columns[0] = 0
    def cell(row, k): return row[k] if k is not None and k < len(row) else ""
    def key(row, where): return " | ".join(cell(row, k) for k in where)
    here, there = [want[0].index(i) for i in index], [columns.get(k) for k in range(len(index))]
    rows = align([key(r, here) for r in want[1:]], [key(r, there) for r in got[1:]], least)
    def same(a, b, name): return same_cell(a, b, tol) or name == "SMILES" and None is not canonical(a) == canonical(b)
    hits = sum(columns.get(len(index) + k) is not None and
               same(cell(got[1 + j], columns[len(index) + k]), cell(want[1 + i], want[0].index(name)), name)
               for i, j in rows.items() for k, name in enumerate(fields))
    numbers = f1(hits, (len(got) - 1) * len(fields), (len(want) - 1) * len(fields))
    return "\n".join(", ".join(r) for r in got), numbers


# ---- S12: boxes -----------------------------------------------------------------------------------------------------
def read_boxes(text: str) -> list[list[float]]:
    """All x1, y1, x2, y2 in brackets: "[1, 2, 3, 4]", "[[..], [..]]", "[1,2,3,4; 5,6,7,8]", "(1,2),(3,4)"."""
    n = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*"
    found = re.findall(rf"(?=[\[(;]{n},{n},{n},{n}[\]);])", text)
    found = found or re.findall(rf"\({n},{n}\)\s*,?\s*\({n},{n}\)", text)
    return [list(map(float, box)) for box in found]


def boxes(text: str, gold: str | Sequence):
    """Mean IoU of the pairs of boxes, the best first, over the larger number of boxes; acc@t: is it at least t."""
    want = read_boxes(gold if isinstance(gold, str) else json.dumps(gold))
    assert want and all(iou(b, b) == 1 for b in want), f"the right answer {gold!r} is not boxes [x1, y1, x2, y2]"
    answer = marked(text) or text
    got = read_boxes(answer)[:1000]
    if not got:
        return None
    total, free_got, free_want = 0.0, set(range(len(got))), set(range(len(want)))
    for value, i, j in sorted(((iou(a, b), i, j) for i, a in enumerate(got) for j, b in enumerate(want)), reverse=True):
        if i in free_got and j in free_want:
            total += value
            free_got.remove(i)
            free_want.remove(j)
    value = total / max(len(got), len(want))
    return str(got), {"iou": value} | {f"acc@{t}": value >= t for t in (0.1, 0.3, 0.5, 0.7, 0.9)}


SCORERS = {  # name in the table of evaluate.py: the function of visible text, right answer and keywords; its numbers
    "choice": (choice, ("acc",)), "choice-set": (choice_set, ("acc",)), "math": (maths, ("acc", "strict")),
    "exact": (exact, ("exact",)), "contains": (contains, ("contains",)), "relaxed": (relaxed, ("relaxed",)),
    "anls": (anls_of, ("anls",)), "formula": (formula, ("formula_match",)), "regress": (regress, ("squared_error",)),
    "molecule": (molecule, ("exact", "valid", "tanimoto", "maccs", "rdk", "levenshtein", "formula_match")),
    "overlap": (overlap, ("rougeL", "rouge1", "rouge2", "bleu2", "bleu4", "meteor")),
    "set-f1": (set_f1, ("f1", "precision", "recall")), "table": (table, ("recall", "precision", "f1")),
    "iou": (boxes, ("iou", "acc@0.1", "acc@0.3", "acc@0.5", "acc@0.7", "acc@0.9")),
}
ANY_OF = {"choice", "math", "exact", "contains", "relaxed", "anls", "formula", "molecule", "overlap"}


# ---- averages -------------------------------------------------------------------------------------------------------
def _filled(values: Sequence[float | None]) -> tuple[list[float], int]:
    return [0.0 if v is None else float(v) for v in values], sum(v is None for v in values)


def _variance(values: Sequence[float]) -> float:
    """Of a sample, with n - 1."""
    middle = sum(values) / len(values)
    return sum((v - middle) ** 2 for v in values) / (len(values) - 1)


def mean(values: Sequence[float | None]) -> dict:
    """stderr: sample standard deviation / sqrt(n), None for one value."""
    assert values, "there is nothing to average"
    filled, unparsed = _filled(values)
    n = len(filled)
    return {"value": sum(filled) / n, "stderr": (_variance(filled) / n) ** 0.5 if n > 1 else None, "n": n,
            "unparsed": unparsed}


def _by(keys: Sequence, values: Sequence) -> dict:
    assert len(keys) == len(values), f"{len(keys)} keys for {len(values)} values"
    groups = {}
    for k, v in zip(keys, values):
        groups.setdefault(k, []).append(v)
    return groups


def group_mean(values: Sequence[float | None], groups: Sequence) -> dict:
    """Mean of the groups' means, all groups alike. stderr: with the same weights, sqrt(sum of s_g^2 / n_g) / G, where a
    group of one has the variance within the others."""
    filled, unparsed = _filled(values)
    parts = list(_by(groups, filled).values())
    larger = [p for p in parts if len(p) > 1]
    pooled = sum(_variance(p) * (len(p) - 1) for p in larger) / max(1, sum(len(p) - 1 for p in larger))
    spread = sum((_variance(p) if len(p) > 1 else pooled) / len(p) for p in parts)
    return {"value": sum(sum(p) / len(p) for p in parts) / len(parts),
            "stderr": spread ** 0.5 / len(parts) if larger else None, "n": len(filled), "unparsed": unparsed}


def all_in_group(values: Sequence[float | None], groups: Sequence) -> dict:
    """A group counts if all in it are right (MMBench's circular copies: groups of index % 1,000,000)."""
    filled, unparsed = _filled(values)
    return mean([math.prod(p) for p in _by(groups, filled).values()]) | {"unparsed": unparsed}


def wemath(values: Sequence[float | None], ids: Sequence, keys: Sequence[str]) -> dict:
    """We-Math (arXiv 2407.01284): a problem of 2 or 3 steps (rows of one id, keys 2steps_1, 2steps_2, 2steps_multi ..)
    shows insufficient knowledge (a step and the whole are wrong: 0), inadequate generalization (the steps are right,
    the whole is wrong: 1/2), complete mastery (all right: 1) or rote memorization (the whole is right and a step wrong:
    0). loose: that is mastery, too, unless all steps are wrong. Problems with missing rows are left out."""
    filled, unparsed = _filled(values)
    problems = {}
    for (steps, part), i, v in zip((k.split("steps_") if "steps_" in k else ("", k) for k in keys), ids, filled):
        if steps:
            problems.setdefault((steps, i), {})[part] = v
    whole = [([p[str(k + 1)] for k in range(int(steps))], p["multi"]) for (steps, _), p in problems.items()
             if len(p) == int(steps) + 1]
    assert whole, "We-Math: no problem has all its rows"
    kinds = ["mastery" if multi and all(parts) else "rote" if multi and not any(parts) else "loose" if multi else
             "generalization" if all(parts) else "knowledge" for parts, multi in whole]
    def result(worth): return mean([worth.get(kind, 0.0) for kind in kinds]) | {"unparsed": unparsed}
    return {"strict": result({"mastery": 1, "generalization": 0.5}),
            "loose": result({"mastery": 1, "loose": 1, "generalization": 0.5}),
            "kinds": dict(Counter(kinds))}


def rmse(squared_errors: Sequence[float | None]) -> dict:
    """Over the numbers that could be read: value is None without one. stderr by the delta method. score: exp(-rmse), as
    released, times the share that was read, so that silence is worth nothing."""
    read = [e for e in squared_errors if e is not None]
    n, unparsed = len(squared_errors), sum(e is None for e in squared_errors)
    if not read:
        return {"value": None, "stderr": None, "n": n, "unparsed": unparsed, "score": 0.0}
    inner = mean(read)
    value = inner["value"] ** 0.5
    stderr = None if inner["stderr"] is None else inner["stderr"] / (2 * value) if value else 0.0
    return {"value": value, "stderr": stderr, "n": n, "unparsed": unparsed, "score": math.exp(-value) * len(read) / n}


def avg_at_k(samples: Sequence[Sequence[float | None]]) -> dict:
    """samples: of each problem its k scores. The stderr is over problems."""
    return mean([mean(s)["value"] for s in samples]) | {"unparsed": sum(v is None for s in samples for v in s)}


def pass_at_k(samples: Sequence[Sequence[float | None]], k: int) -> dict:
    """Chance that one of k samples is right, estimated without bias from n >= k of each problem (Chen et al. 2021)."""
    def chance(s):
        assert len(s) >= k > 0, f"pass@{k} of {len(s)} samples"
        right = sum(v == 1 for v in s)
        return 1 - math.comb(len(s) - right, k) / math.comb(len(s), k)
    return mean([chance(s) for s in samples]) | {"unparsed": sum(v is None for s in samples for v in s)}


# ---- whole corpora, as the MolT5 repository counts them -------------------------------------------------------------
def corpus_captions(pairs: Sequence[tuple[str | None, str]], vocab: str = "") -> dict[str, float]:
    """(what was read, right caption) of all documents: BLEU of the corpus, means of ROUGE F (without stems) and METEOR.
    The published numbers are in the pieces of SciBERT (uncased): vocab."""
    pieces = word_pieces(vocab) if vocab else words
    tokens = [(pieces(got or ""), pieces(want)) for got, want in pairs]
    rouges = [rouge(got or "", want, stem=False) for got, want in pairs]
    return {"bleu2": bleu(tokens, 2), "bleu4": bleu(tokens, 4), "meteor": mean([meteor(*t) for t in tokens])["value"],
            **{k: mean([r[k] for r in rouges])["value"] for k in ("rouge1", "rouge2", "rougeL")}}


def corpus_molecules(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float | None]:
    """(what was read, right SMILES) of all documents. bleu: of characters; exact: the same InChI; levenshtein: edits of
    the strings; validity. Similarities are means over the valid ones (MACCS, RDK, Morgan counts of radius 2), None
    without one."""
    chem, maker = _science("rdkit.Chem"), _science("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2)
    counts = _science("rdkit.DataStructs").TanimotoSimilarity
    strings = [(plain_smiles(got or ""), plain_smiles(want)) for got, want in pairs]
    mols = [(molecule_of(got), molecule_of(want)) for got, want in strings]
    valid = [(a, b) for a, b in mols if a is not None and b is not None]
    with _science("rdkit.rdBase").BlockLogs():
        exact = sum(chem.MolToInchi(a) == chem.MolToInchi(b) for a, b in valid)
    def over_valid(similarity): return mean([similarity(a, b) for a, b in valid])["value"] if valid else None
    return {"bleu": bleu([(list(a), list(b)) for a, b in strings], 4), "exact": exact / len(pairs),
            "levenshtein": mean([edit_distance(a, b) for a, b in strings])["value"],
            "validity": len(valid) / len(pairs),
            "maccs": over_valid(key_similarity), "rdk": over_valid(path_similarity),
            "morgan": over_valid(lambda a, b: counts(*map(maker.GetSparseCountFingerprint, (a, b))))}
