"""Rules that read an answer out of a response and compare it with the right one: pure functions of strings.

    score("<think>6 / 2</think><answer>(B)</answer>", "B", "multiple-choice", ["2", "3"])    # True
    predict("So she has $1,250 left.", "number")                                             # '1250'

predict returns what was read (a letter, a number, yes or no, a text), or None where a response names no answer of its
type; score never counts that as right. Nothing is guessed, and nothing is found inside a longer word.

Departures from the released rewards (Innovator-VL, InnovatorVL-RL/reward)
1. An unclosed <think> is no answer; without <answer> tags \\boxed{}, '#### x' and 'the answer is x' are read too.
2. multiple-choice: a letter counts where an answer names one, and several letters are a set (there: the first
   character, so "The answer is B" is "T" and two letters never match).
3. number: values are compared, with sign, separators, fractions, powers and percent (there: equal strings of digits).
4. boolean: whole words (there: "no" is found inside "know").
5. any: articles, punctuation and number words do not matter, but a formula (SMILES, code) is compared as it stands.
6. math-expressions: a number or a normalised string; no computer algebra.
"""
import re
from fractions import Fraction

LETTERS = "ABCDEFGHIJ"
ANSWER_TYPES = ("multiple-choice", "number", "boolean", "any", "math-expressions")
SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


# ---- finding the answer ---------------------------------------------------------------------------------------------
def visible(response: str) -> str | None:
    """The response without its thinking; None if the thinking never ends. The prompt may already have opened it."""
    text = re.sub(r"<think>.*?</think>", "", response, flags=re.S)
    return None if "<think>" in text else text.rpartition("</think>")[2].strip()


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{} whose braces balance."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?box(?:ed)?\s*\{", text)]):
        depth, i = 1, start
        while i < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 2 if text[i] == "\\" else 1  # \{ is no brace
        if depth == 0:
            return text[start:i - 1].strip()
    return None


def marked(text: str) -> str | None:
    """What a text marks as its answer: last <answer>, last \\boxed{}, last '#### x', last 'the answer is x'."""
    if tagged := re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.S):
        inner = boxed(tagged[-1])
        return tagged[-1].strip() if inner is None else inner
    if (inner := boxed(text)) is not None:
        return inner
    if hashes := re.findall(r"####[ \t]*([^\n]*)", text):
        return hashes[-1].strip()
    said = re.findall(r"\banswers?\b[*\s]*(?:\bis\b|\bare\b|:|=)[:*\s]*([^\n]+?)[*\s]*"
                      r"(?=[.;!?](?:\s|$)|\s(?:because|since)\b|\n|$)", text, re.I)
    return said[-1].strip() if said else None


def extract_answer(response: str) -> str | None:
    """The marked answer, else the whole response if that is one short line, else None.

    extract_answer("<think>a</think>It is <answer>7</answer>") == "7"; extract_answer("<think>It is 7") is None
    """
    text = visible(response)
    if text is None:
        return None
    answer = marked(text)
    if answer is None and "\n" not in text and len(text) <= 300:
        answer = text
    return answer or None


def _answer_or_last_line(response: str) -> str:
    """For answers of one word: a longer response without a mark may still end in a line that is nothing else."""
    text = visible(response) or ""
    return extract_answer(response) or ("" if marked(text) is not None else text.rpartition("\n")[2].strip())


# ---- multiple choice ------------------------------------------------------------------------------------------------
def read_choice(text: str, options: list[str] | None = None) -> str | None:
    """Letters that a text names, as 'B' or 'AC': "B", "(b)", "A and C", "AC", "B. text", "option B", or an option's
    text."""
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    plain = re.sub(r"[$*`]", "", plain).strip().rstrip(" .,!:")
    valid = LETTERS[:len(options)] if options else LETTERS
    up, low = f"[{valid}]", f"[{valid}{valid.lower()}]"
    if m := re.fullmatch(rf"\(?({low})\)?", plain):
        return m[1].upper()
    for letter, option in zip(LETTERS, options or ()):
        behind = re.sub(rf"^\(?{letter}\s*[.):]\s*", "", plain)
        if text_equal(text, option) or behind != plain and text_equal(behind, option):
            return letter
    if re.fullmatch(rf"\(?{up}\)?(?:(?:\s*(?:,\s*and\b|\band\b|[,;&/])\s*|\s+)\(?{up}\)?)+", plain):
        return "".join(sorted(set(re.findall(rf"\b{up}\b", plain))))
    if re.fullmatch(rf"{up}{{2,}}", plain) and len(set(plain)) == len(plain):
        return "".join(sorted(plain))
    if re.search(rf"\bor\s+\(?{up}\b", plain):  # two answers are none
        return None
    # NOTE "A" may be an article and "I" a pronoun: a bare letter needs a sign or a verb behind it
    m = re.match(rf"\(({low})\)|({up})[.:]\s|({low})\)\s|({up})(?=\s(?:is|because|since)\b|,\s(?!or\b|and\b)[a-z]{{2}})"
                 rf"|(?:[Tt]he )?(?:[Oo]ption|[Cc]hoice) \(?({low})\b", plain)
    return next(g for g in m.groups() if g).upper() if m else None


def multiple_choice(response: str, gold: str, options: list[str] | None = None) -> bool:
    """gold: a letter, several letters (all and no other must be named), or the text of an option."""
    want = read_choice(gold, options)
    assert want or not options, f"the right answer {gold!r} is none of the options {options}"
    if want is None:
        return exact_text(response, gold)
    return read_choice(_answer_or_last_line(response), options) == want


# ---- numbers --------------------------------------------------------------------------------------------------------
NUMBER = re.compile(r"""
    (?<![\w.^{\\])(?P<sign>(?<![)\]])[-+])?              # not inside a word, a decimal or an exponent
    (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    (?:[eE](?P<e>[-+]?\d+))?
    (?:\^\{?(?P<power>[-+]?\d+)\}?)?
    (?:\s*\*\s*10\s*\^\s*\{?(?P<ten>[-+]?\d+)\}?)?
    (?:\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)|\s*/\s*(?P<under>\d+(?:\.\d+)?))?
    (?P<percent>\s*(?:%|percent\b))?
    (?!\d|\.\d|,\d{3}(?!\d)|\^|\(|[eE]\d|\s*/\s*\d|[xyzn]\b|\s*(?:\\pi|\\sqrt|π|√))   # 5x and 5π are not 5
    """, re.X)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
SPELLINGS = [  # in this order: notations of numbers to the ones that NUMBER reads
    (r"[−–]", "-"), (r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m[0].translate(SUPERSCRIPTS)),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "), (r"\^\s*\{?\\circ\}?|\\degree\b|°", ""),
    (r"\\%", "%"), (r"\\[,!;:]|\\left\b|\\right\b|\\?[$€£]|[*`]{2}", ""), (r"\{,\}", ","), (r"~|\\ ", " "),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"(?<=\d)\s*\\[dtc]?frac", r" \\frac"),
    (r"\\[dtc]?frac\s*\{\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}", r"\1/\2"),
    (r"\\times|\\cdot|[×·]|(?<=\d)\s*[xX](?=\s*10\s*\^)", "*"),
    (r"(?<=[A-Za-zµΩ])\s*\^\s*\{?[-+]?\d+\}?", "")]  # the exponent of a unit is no number


def plain_numbers(text: str) -> str:
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    return text.strip()


def word_numbers(text: str) -> str:
    """Number words below a hundred to digits: "twenty-one dogs" -> "21 dogs"."""
    def digits(m):
        tens, small, alone = (g and g.lower() for g in m.groups())
        return (str(SMALL.index(alone)) if alone else
                str(10 * TENS.index(tens) + 20 + (SMALL.index(small) if small else 0)))
    return re.sub(rf"\b(?:({'|'.join(TENS)})(?:[- ]({'|'.join(SMALL[1:10])}))?|({'|'.join(SMALL)}))\b", digits, text,
                  flags=re.I)


def value_of(m: re.Match) -> tuple[Fraction, bool] | None:
    """Exact value of a NUMBER and whether it is in percent; None for x/0 and for numbers beyond any answer."""
    if len(m[0]) > 400:
        return None
    exponents = [int(m[k] or 0) for k in ("e", "power", "ten")]
    if max(map(abs, exponents)) > 400:
        return None
    try:
        x = Fraction(m["digits"].replace(",", "")) * Fraction(10) ** exponents[0]
        x = (x ** exponents[1] if m["power"] else x) * Fraction(10) ** exponents[2]
        x = x + Fraction(int(m["top"]), int(m["bottom"])) if m["top"] else x / Fraction(m["under"]) if m["under"] else x
    except ZeroDivisionError:
        return None
    return -x if m["sign"] == "-" else x, bool(m["percent"])


def read_number(response: str) -> re.Match | None:
    """The number a response answers with. Of a marked answer: behind the last equals sign, the number that it starts
    with, else its last one. Of free text: the last one."""
    text = visible(response)
    if text is None:
        return None
    answer = marked(text)
    plain = plain_numbers(text if answer is None else answer)
    if not re.search(r"\d", plain):
        plain = word_numbers(plain)
    if answer is not None:
        behind = re.split(r"=|≈|\\approx", plain)[-1]
        plain = behind if NUMBER.search(behind) else plain
    found = [m for m in NUMBER.finditer(plain) if value_of(m)]
    starts = found and answer is not None and not plain[:found[0].start()].strip(" ([")
    return found[0 if starts else -1] if found else None


def whole_number(text: str) -> re.Match | None:
    """The number that a text is, maybe in parentheses, with a name before (x = 5) or a unit behind (5 cm); a
    calculation's result; None for expressions, equations, lists and sentences."""
    before, _, plain = re.sub(r"^[A-Za-z](?:\([a-z]\))?\s*=", "=", plain_numbers(text)).rpartition("=")
    if re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", before)):
        return None
    plain = re.sub(r"^\((.*)\)$", r"\1", plain.strip(" .")).strip()
    m = NUMBER.match(plain)
    unit = m and re.fullmatch(r"|[ckmn]m|[km]g|m[lLs]|k?Hz|eV|kJ|mol|"
                              r"\s+(?:[A-Za-zµΩ]{2,}[A-Za-zµΩ /.*-]*|[mgslhVNJWKCAF])", plain[m.end():])
    return m if unit and value_of(m) else None


def same_value(a: re.Match, b: re.Match, rel_tol: float) -> bool:
    """Whole numbers must be equal. 45% is 0.45, and 45 where the other side left the sign out."""
    (x, x_percent), (y, y_percent) = value_of(a), value_of(b)
    def close(x, y):
        return x == y or x.denominator * y.denominator > 1 and abs(x - y) <= Fraction(rel_tol) * max(abs(x), abs(y))
    return close(x, y) or x_percent != y_percent and close(x / 100 if x_percent else x, y / 100 if y_percent else y)


def number(response: str, gold: str, rel_tol: float = 1e-6) -> bool:
    got, want = read_number(response), read_number(f"<answer>{gold}</answer>")
    assert want, f"the right answer {gold!r} is not a number"
    return got is not None and same_value(got, want, rel_tol)


# ---- yes and no, texts, expressions ---------------------------------------------------------------------------------
def read_boolean(text: str) -> bool | None:
    """By the first word, else by the only such word of a text without a negation."""
    words = re.findall(r"[a-z']+", text.lower())
    said = [w in ("yes", "true") for w in words if w in ("yes", "true", "no", "false")]
    if words and words[0] in ("yes", "true", "no", "false"):
        return said[0]
    negated = any(w in ("not", "cannot", "never") or w.endswith("n't") for w in words)
    return said[0] if len(set(said)) == 1 and not negated else None


def boolean(response: str, gold: str) -> bool:
    want = read_boolean(gold)
    assert want is not None, f"the right answer {gold!r} is neither yes nor no"
    return read_boolean(_answer_or_last_line(response)) == want


def text_equal(a: str, b: str) -> bool:
    """Equal but for case, articles, punctuation, spaces and number words. If b is a formula (symbols, or digits beside
    letters, and no plain word), equal but for spaces: case and brackets carry meaning in SMILES and code."""
    formula = (re.search(r"[=#@()\[\]{}\\/+*^<>_]|\d[A-Za-z]|[A-Za-z]\d", b)
               and not re.search(r"\b[A-Za-z]?[a-z]{3,}\b", b))
    if formula:
        return _squeeze(a) == _squeeze(b)
    a, b = _tokens(a), _tokens(b)
    return a == b and a != []


def _squeeze(text: str) -> str:
    return re.sub(r"\s|^[$`]+|[$`.]+$", "", text.strip())


def _tokens(text: str) -> list[str]:
    """Words, numbers (with sign and decimals, in one spelling) and symbols, without punctuation and articles."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word_numbers(text.replace("−", "-")))
    found = re.findall(r"(?<!\S)-?\d+(?:\.\d+)?|\d+(?:\.\d+)?|[^\W\d_]+|[%<>=+~^|°]", text)
    kept = [t for k, t in enumerate(found)  # a last word is no article, nor a capital A inside: "type A", "vitamin A"
            if k + 1 == len(found) or t not in ("a", "an", "the") and (k > 0 or t.lower() not in ("a", "an", "the"))]
    return [str(Fraction(t)) if t[-1].isdecimal() and len(t) < 400 else t.casefold() for t in kept]


def exact_text(response: str, gold: str) -> bool:
    answer = extract_answer(response)
    return answer is not None and text_equal(answer, gold)


def expression_equal(a: str, b: str) -> bool:
    """Equal LaTeX but for its spacing, delimiters and the name before an equals sign."""
    def norm(s):
        s = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", s)
        s = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,!;: ]|[$\s~]|\^\{?\\circ\}?|°|\.$", "", s)
        s = re.sub(r"\\[dtc]frac", r"\\frac", s)
        s = re.sub(r"(frac|sqrt|[\^_])([A-Za-z0-9])", r"\1{\2}", s)
        s = re.sub(r"(frac\{[^{}]*\})([A-Za-z0-9])", r"\1{\2}", s)
        return re.sub(r"^[A-Za-z](?:\([a-z]\))?=", "", s)
    return norm(a) == norm(b) or re.fullmatch(r"[A-Za-z ]+", b) is not None and text_equal(a, b)


def math_expression(response: str, gold: str, rel_tol: float = 1e-6) -> bool:
    want, seen = whole_number(gold), visible(response)
    if want is None or seen is None:
        answer = extract_answer(response)
        return answer is not None and expression_equal(answer, gold)
    answer = marked(seen)
    got = read_number(response) if answer is None else whole_number(answer)
    return got is not None and same_value(got, want, rel_tol)


# ---- all types ------------------------------------------------------------------------------------------------------
def predict(response: str, answer_type: str, options: list[str] | None = None) -> str | None:
    """What is read as the answer, to be shown beside the right one; None: no answer of this type was found."""
    assert answer_type in ANSWER_TYPES, f"answer type {answer_type!r}: choose one of {', '.join(ANSWER_TYPES)}"
    if answer_type == "multiple-choice":
        return read_choice(_answer_or_last_line(response), options)
    if answer_type == "boolean":
        return {True: "yes", False: "no", None: None}[read_boolean(_answer_or_last_line(response))]
    found = read_number(response)
    if answer_type == "number":
        return found and found[0].strip().replace(",", "")
    answer = extract_answer(response)
    return found[0].strip() if answer is None and found and answer_type == "math-expressions" else answer


def score(response: str, gold: str, answer_type: str, options: list[str] | None = None) -> bool:
    """Is the response's answer right?"""
    assert answer_type in ANSWER_TYPES, f"answer type {answer_type!r}: choose one of {', '.join(ANSWER_TYPES)}"
    if answer_type == "multiple-choice":
        return multiple_choice(response, gold, options)
    scorers = {"number": number, "boolean": boolean, "any": exact_text, "math-expressions": math_expression}
    return scorers[answer_type](response, gold)
