"""The verifiers beyond those of test_evaluate.py: upstream's defects, each answer type, the sandbox, the judge, the
pool."""
import contextlib
import csv
import functools
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, SHARED, needs_shared

import rewards
import sandbox
from rewards import Judge, Result, Verifiers, reward, score
from sandbox import run_program

DATA = SHARED / "data"


@pytest.fixture
def science():
    for name in ("math_verify", "rdkit", "selfies", "rouge_score"):
        pytest.importorskip(name)


# ---- what the released rewards get wrong ----------------------------------------------------------------------------
@pytest.mark.parametrize("response,gold", [("-3", "-3"), ("3.0", "3"), ("1,250", "1250"), ("5", "$5"), ("5", "5 ")])
def test_upstream_number_compares_strings_of_digits(response, gold):
    assert score(f"<answer>{response}</answer>", gold, "number")


def test_upstream_number_ignores_the_sign():
    assert not score("<answer>-3</answer>", "3", "number")


def test_upstream_number_has_no_tolerance():
    assert not score("9.79", "9.81", "number") and score("9.79", "9.81", "number", rel_tol=0.01)
    assert not score("98", "100", "number", rel_tol=0.01) and score("98", "100", "number", abs_tol=2)
    assert not score("97", "100", "number", abs_tol=2) and score("19.62 m/s", "19.6 m/s", "number", abs_tol=0.05)


def test_whole_numbers_within_a_tolerance_that_is_no_rounding():
    """SciBench's 5% holds for 51 and 50, too; 1e-4 is for decimals only."""
    def right(said, gold, rel_tol=1e-6): return score(f"\\boxed{{{said}}}", gold, "number", rel_tol=rel_tol)
    assert right("51", "50", 0.05) and not right("53", "50", 0.05) and not right("51", "50")
    assert right("1.60009", "1.6", 1e-4) and not right("1.60009", "1.6") and not right("28801", "28800", 1e-4)


def test_upstream_math_verify_arguments_swapped(science):
    """math-verify takes an equation for its right side when it is the second argument, not when it is the first."""
    assert not score("<answer>5x - 7 = 0</answer>", "0", "math-expressions")
    assert score("<answer>x = 2\\sqrt{3}</answer>", "\\sqrt{12}", "math-expressions")


def test_upstream_math_letters_as_answers(science):
    for wrong, gold in (("B", "A"), ("nylevE", "Evelyn"), ("a", "x"), ("(X)", "5")):
        assert not score(f"<answer>{wrong}</answer>", gold, "math-expressions")


def test_upstream_math_exceptions_become_false(science):
    with Verifiers(1) as pool:
        r, = pool.score_many([dict(response="5", gold=None, answer_type="math-expressions")])
    assert r.error and r.accuracy is None and r.reward is None


def test_upstream_choice_first_character():
    assert score("<answer>The answer is B</answer>", "B", "multiple-choice")
    assert not score("<answer>The answer is B</answer>", "T", "multiple-choice")


def test_upstream_choice_several_letters():
    assert score("<answer>A, C</answer>", "AC", "multiple-choice")
    assert score("<answer>A and C</answer>", ["A", "C"], "multiple-choice")
    assert not score("<answer>A</answer>", ["A", "C"], "multiple-choice")


def test_upstream_boolean_substrings():
    for text in ("I know", "not sure", "nothing"):
        assert not score(f"<answer>{text}</answer>", "no", "boolean")
    assert not score("<answer>no, not yes</answer>", "yes", "boolean")


def test_upstream_bbox_zero_area_and_inverted():
    for box in ("[5, 5, 5, 5]", "[9, 9, 1, 1]", "[0, 0, 0, 9]", "[1e999, 0, 2, 3]", "[0,0,1e300,1e300]"):
        assert score(f"<answer>{box}</answer>", "[1, 1, 9, 9]", "bbox") == 0
    for box in ("[5, 5, 5, 5]", "[9, 9, 1, 1]", "[1, 2, 3]", "none"):
        with pytest.raises(AssertionError, match="not a box"):
            score("<answer>[1, 1, 9, 9]</answer>", box, "bbox")


def test_upstream_any_several_answers_joined():
    assert score("<answer>red</answer>", ["crimson", "red"], "any")


def test_upstream_ocr_several_answers_joined():
    assert score("<answer>14 May</answer>", ["May 14, 1998", "14 may"], "ocrtext") == 1


def test_upstream_html_tags_alone():
    gold = "<html><body><h1>Alpha decay</h1><p>Helium nuclei leave at 5 MeV</p></body></html>"
    assert score(re.sub(r">[^<]+<", "><", gold), gold, "html-code") == 0
    assert score("Alpha decay Helium nuclei leave at 5 MeV", gold, "html-code") == 0


def test_upstream_svg_tags_alone():
    gold = '<svg width="9"><circle cx="4" cy="5" r="2"/><rect x="1" y="1"/></svg>'
    assert score("<svg><circle/><rect/></svg>", gold, "svg-code") == 0
    assert score("<circle cx='4'/>", gold, "svg-code") == 0 and score(gold, gold, "svg-code") == 1


def test_upstream_code_memory_kills_numpy():
    code = "import numpy as np\ndef solution(x):\n    return float(np.linalg.norm(x))"
    assert score(f"```python\n{code}\n```", suite(([3, 4], 5.0)), "general-code")


def test_upstream_code_forbidden_words():
    code = "def solution(s):\n    return s.replace('os.system', 'eval(exec)')  # import subprocess"
    assert score(f"```python\n{code}\n```", suite(("os.system", "eval(exec)")), "general-code")


def test_upstream_unused_format_and_judge_default():
    """0.1 format + 0.9 accuracy, as the paper has it; no keyword or length is worth anything."""
    assert reward("<think>a</think><answer>7</answer>", "7", "judge").reward == 1
    assert reward("<answer>7</answer>", "7", "judge").reward == pytest.approx(0.9)
    assert reward("<think>a</think><answer>8</answer>", "7", "judge").reward == pytest.approx(0.1)
    assert reward("therefore because step by step " * 50 + "x = 3 + 4", "99", "judge").reward == 0


def test_upstream_judge_containment():
    assert not score("<answer>it is either red or blue</answer>", "red", "judge")


# ---- the types ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("response,gold,right", [
    ("(x+1)^2", "x^2+2x+1", True), ("2\\sqrt{4}", "4", True), ("0.5\\pi", "\\frac{\\pi}{2}", True),
    ("(2,1)", "(1,2)", False), ("(1, \\frac12)", "(1, 0.5)", True), ("[1,2)", "(1,2)", False),
    ("2, 1", "1, 2", True), ("\\{2,1\\}", "\\{1,2\\}", True), ("1, 1", "1, 2", False), ("\\pm 2", "2", False),
    ("x < 3", "x > 3", False), ("x+1 or x+2", "x+1", False), ("x_1", "x_2", False), ("2^{10}-24", "1000", True),
    ("\\frac{", "x+1", False), ("((1,2),(3,4))", "((1,2),(3,4.0))", True), ("(" * 3000, "x+1", False)])
def test_math(science, response, gold, right):
    assert score(f"<answer>{response}</answer>", gold, "math-expressions") is right


@pytest.mark.parametrize("response,gold,right", [
    (".5", "0.5", True), (".5", "5", False), ("-.5", "-0.5", True), ("-.5", "-5", False), ("0.35625", ".35625", True),
    ("35625", ".35625", False), ("$.5$", "0.5", True), ("5.", "5", True), ("(.5, .25)", "(0.5, 0.25)", True),
    ("x = .5", "\\frac12", True)])
def test_leading_decimal_point(science, response, gold, right):
    for text in (f"\\boxed{{{response}}}", f"<answer>{response}</answer>", f"The answer is {response}."):
        assert score(text, gold, "math-expressions") is right, text
        assert "(" in gold or "frac" in gold or score(text, gold, "number") is right, text
    assert score("<answer>.5</answer>", "0.5", "any") and not score("<answer>.5</answer>", "5", "any")


@pytest.mark.parametrize("a,b,right", [
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", False),
    ("\\begin{pmatrix} 1 \\\\, 2 \\end{pmatrix}", "\\begin{pmatrix}1 2\\end{pmatrix}", False),
    ("x\\, y\\ z", "xyz", True), ("x \\in [-2,7]", "[-2,7]", True), ("x\\in[-2.0,7]", "[-2,7]", True),
    ("x \\in (-2,7]", "[-2,7]", False), ("x = 1, y = 2", "y=2, x=1", True), ("x = 2, y = 1", "x=1, y=2", False),
    ("x \\in [3,4], y \\in [1,2]", "x \\in [1,2], y \\in [3,4]", False), ("n=1, n=-1", "k=-1, k=1", True)])
def test_spelling_of_matrices_intervals_and_names(monkeypatch, a, b, right):
    monkeypatch.setattr(rewards, "_math_verify", lambda: None)  # by the rule alone
    for response, gold in ((a, b), (b, a)):
        assert score(f"\\boxed{{{response}}}", gold, "math-expressions") is right, (response, gold)


def test_math_is_bounded(science):
    start = time.monotonic()
    for bomb in ("9^{9^{9^9}}", "\\sum_{i=1}^{10^9} i^i"):
        assert not score(f"<answer>{bomb}</answer>", "5x", "math-expressions")
    assert time.monotonic() - start < 20


def test_math_without_the_library_says_so_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rewards._math_verify.cache_clear()
    for _ in range(2):
        assert not score("<answer>(x+1)^2</answer>", "x^2+2x+1", "math-expressions")
        assert score("<answer>0.5</answer>", "\\frac12", "math-expressions")
    rewards._math_verify.cache_clear()
    assert capsys.readouterr().err.count("requirements-science.txt") == 1


def test_missing_library_is_one_line(monkeypatch):
    import common
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    with pytest.raises(common.UserError, match="rdkit is not installed: pip install -r requirements-science.txt"):
        score("CCO", "CCO", "molecule")


def test_bbox():
    assert score("<answer>[0, 0, 10, 10]</answer>", "[0, 0, 10, 20]", "bbox") == 0.5
    assert score("It is at [1,2,3] or so, [0.0,0,1.e0,1]", "[0, 0, 1, 1]", "bbox") == 1
    assert score("<think>[0,0,1,1]", "[0, 0, 1, 1]", "bbox") == 0 and score("", "[0, 0, 1, 1]", "bbox") == 0
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([x, y, x + rng.random(), y + rng.random()] for x, y in ((rng.random(), rng.random()) for _ in "ab"))
        assert rewards.iou(a, b) == pytest.approx(rewards.iou(b, a)) and 0 <= rewards.iou(a, b) <= 1
        assert rewards.iou(a, a) == pytest.approx(1)


@pytest.mark.parametrize("response,gold,value", [
    ("Total  $5\n", "total $5", 1), ("total", "totel", 0.8), ("abcd", "abxy", 0.5), ("abcd", "axyz", 0),
    ("", "a", 0), ("x" * 250, "a", 0), ("München", "münchen", 1)])
def test_ocr(response, gold, value):
    assert score(f"<answer>{response}</answer>", gold, "ocrtext") == pytest.approx(value)


def test_molecule(science):
    assert score("<answer>OCC</answer>", "CCO", "molecule") and score("SMILES: C1=CC=CC=C1", "c1ccccc1", "molecule")
    assert score("[C][C][O]", "OCC", "molecule") and score("CCO", "[C][C][O]", "molecule")
    assert score("[Cl-].[Na+]", "[Na+].[Cl-]", "molecule")
    assert not score("C[C@H](N)O", "C[C@@H](N)O", "molecule") and not score("CCO or CCC", "CCO", "molecule")
    for broken in ("C1CC", "not a molecule", "", "[nonsense]", "C" * 9000, "((("):
        assert not score(f"<answer>{broken}</answer>", "CCO", "molecule") and not rewards.molecule_valid(broken)
        assert rewards.tanimoto(broken, "CCO") == 0
    assert rewards.tanimoto("CCO", "OCC") == 1 and 0 < rewards.tanimoto("CCO", "CCN") < 1
    with pytest.raises(AssertionError, match="no molecule"):
        score("CCO", "C1CC", "molecule")


@needs_shared
def test_real_molecules_in_any_spelling(science):
    import selfies
    from rdkit import Chem
    with open(DATA / "moleculenet/delaney-processed.csv") as f:
        smiles = [row["smiles"].strip() for row in csv.DictReader(f)][:150]
    for s in smiles:
        other = Chem.MolToSmiles(Chem.MolFromSmiles(s), doRandom=True)
        assert score(f"<answer>{other}</answer>", s, "molecule"), (s, other)
        with contextlib.suppress(selfies.EncoderError):  # SELFIES has no N(=O)=O
            assert score(f"<answer>{selfies.encoder(s)}</answer>", s, "molecule"), s
    assert sum(score(a, b, "molecule") for a, b in zip(smiles, smiles[1:])) == 0


@needs_shared
def test_real_captions(science):
    with open(DATA / "chebi20/validation.txt") as f:
        texts = [row["description"] for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)][:100]
    own = [score(f"<answer>{t}</answer>", t, "caption") for t in texts]
    others = [score(f"<answer>{a}</answer>", b, "caption") for a, b in zip(texts, texts[1:])]
    assert min(own) == 1 and 0 <= min(others) and sum(others) / len(others) < 0.5
    assert score("", texts[0], "caption") == 0 and score("<think>" + texts[0], texts[0], "caption") == 0


def test_markup_similarity():
    gold = "<html><body><p>one two</p><p>three</p></body></html>"
    near = gold.replace("three", "four")
    assert score(f"Here:\n```html\n{gold}\n```", gold, "html-code") == 1
    assert 0 < score(near, gold, "html-code") < 1 == score(gold.replace("><", ">\n<"), gold, "html-code")
    assert score(gold * 50, gold, "html-code") < 0.1  # said fifty times
    for junk in ("", "<![if", "<!--", "<" * 5000, "&#xfffffff;", "</" * 99):
        assert 0 <= score(f"<answer>{junk}</answer>", gold, "html-code") < 0.2


# ---- programs -------------------------------------------------------------------------------------------------------
def suite(*pairs):
    return json.dumps({"tests": [{"input": i, "output": o} for i, o in pairs]})


def test_code_function_and_script():
    double = "```python\ndef solution(x):\n    print('noise')\n    return 2 * x\n```"
    assert score(double, suite((1, 2), (4, 8)), "general-code") is True
    assert score(double, suite((1, 2), (4, 9)), "general-code") is False
    script = "<answer>import sys\nn, *x = map(int, sys.stdin.read().split())\nprint(sum(x[:n]))</answer>"
    assert score(script, suite(("2\n3 4\n", "7\n"), ("1\n5", "5")), "general-code")
    thread = "import threading\nt = threading.Thread(target=lambda: print(input()))\nt.start()\nt.join()"
    assert score(f"<answer>{thread}</answer>", suite(("hi", "hi")), "general-code")
    for broken in ("def solution(x:", "raise SystemExit(0)", "1/0", "", "import nothing", "\x00", "print('\udc80')"):
        assert not score(f"<answer>{broken}</answer>", suite(("1", "1")), "general-code")
    for bad in ("", "{}", '{"tests": []}', '{"tests": [1]}', "[]"):
        with pytest.raises(AssertionError, match="tests"):
            score(double, bad, "general-code")


def test_code_never_sees_the_right_answers():
    spy = ("import gc, os, sys\ntext = repr([x for x in gc.get_objects() if type(x) in (dict, list)][:5000])\n"
           "print(''.join(['zeb', 'ra']) in text + repr(os.environ) + repr(sys.argv) + repr(sys.orig_argv))")
    gold = {"tests": [{"input": "", "output": "False"}], "zebra": "zebra"}
    assert score(f"<answer>{spy}</answer>", json.dumps(gold), "general-code")
    assert not score("<answer>import os; os._exit(0)</answer>", suite(("", "secret-42")), "general-code")


each_defence = pytest.mark.parametrize("defence", ["all", "kernel", "hook"])


@functools.cache
def namespaces() -> bool:
    return subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode == 0


def runs(code, defence="all", seconds=1.0):
    """Exit code and output of a hostile program, which must be over soon and leave no process behind. With the kernel's
    namespaces alone, with the audit hook alone (where no namespaces are lent), or with both."""
    if defence == "kernel" and not namespaces():
        pytest.skip("the kernel lends no namespaces here")
    start, before = time.monotonic(), children()
    with pytest.MonkeyPatch.context() as m:
        if defence == "hook":
            m.setattr(sandbox, "SANDBOX", sandbox.SANDBOX.replace("0x68020000", "0x1"))  # no valid flag
        rc, out = run_program(code, "", seconds=seconds, hook=defence != "kernel")
    assert time.monotonic() - start < seconds + 5
    while not children() <= before:  # the kernel ends the last ones a moment later
        assert time.monotonic() - start < seconds + 8, "processes are left"
        time.sleep(0.05)
    return rc, out


def children() -> set[int]:
    """Processes that run in a sandbox of ours."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command = f.read()
            with open(f"/proc/{pid}/stat") as f:
                state = f.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"PR_SET_PDEATHSIG" in command and str(os.getpid()).encode() in command and state != "Z":
            found.add(int(pid))
    return found


@each_defence
def test_code_fork_bomb(defence):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    rc, _ = runs(bomb, defence)
    assert rc != 0


@each_defence
def test_code_ten_gigabytes(defence):
    assert runs("x = bytearray(10 * 2**30)\nprint('got it')", defence) == (1, b"")


@each_defence
def test_code_reads_outside(defence, tmp_path):
    (tmp_path / "gold.txt").write_text("right answer")
    tmp_path.chmod(0o755)
    for path in (str(tmp_path / "gold.txt"), "../../etc/passwd", "/etc/passwd", "/proc/1/environ", f"{ROOT}/README.md"):
        assert runs(f"print(open({path!r}).read())", defence) == (1, b""), path
    assert runs("import os\nprint(os.listdir('/work' if os.path.exists('/work') else '/home'))", defence) == (1, b"")


@each_defence
def test_code_writes_outside(defence, tmp_path):
    tmp_path.chmod(0o777)
    for path in (str(tmp_path / "x"), "../x", f"/tmp/rewards_{os.getpid()}", "/usr/lib/x", os.__file__):
        before = os.path.getsize(path) if os.path.exists(path) else None
        rc, out = runs(f"open({path!r}, 'a').write('x')\nprint('wrote')", defence)
        assert (rc, out) == (1, b"") and (os.path.getsize(path) if os.path.exists(path) else None) == before, path
    assert runs("open('x', 'w').write('x')\nprint(open('x').read())", defence) == (0, b"x\n")  # its own folder


@each_defence
def test_code_opens_a_socket(defence):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('connected')"
        rc, out = runs(code, defence)
    assert (rc, out) == (1, b"")


@each_defence
def test_code_infinite_print(defence):
    rc, out = runs("while True:\n    print('x' * 10000)", defence)
    assert rc != 0 and len(out) <= 2 ** 20


@each_defence
def test_code_infinite_loop_and_sleep(defence):
    for code in ("while True: pass", "import time\ntime.sleep(1000)"):
        assert runs(code, defence)[0] != 0


@each_defence
def test_code_fills_the_disk(defence):
    if not namespaces() or defence == "hook":
        pytest.skip("without namespaces only each file is limited")
    rc, _ = runs("for i in range(1000):\n    open(str(i), 'wb').write(b'0' * (15 << 20))", defence, seconds=4)
    assert rc != 0


def test_code_sandbox_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "SANDBOX", "raise OSError")
    sandbox.check.cache_clear()
    with pytest.raises(AssertionError, match="does not start"):
        score("print(1)", suite(("", "1")), "general-code")


def test_code_starts_programs():
    for code in ("import subprocess\nsubprocess.run(['true'])", "import os\nos.system('true')",
                 "import ctypes\nctypes.CDLL(None)", "import os\nos.execv('/bin/true', ['true'])\n"):
        assert runs(code + "\nprint('done')") == (1, b"")


# ---- all types: properties ------------------------------------------------------------------------------------------
GOLDS = [("multiple-choice", "B"), ("number", "-1,250.5"), ("boolean", "No"), ("any", "carbon dioxide"),
         ("math-expressions", "\\frac{x+1}{2}"), ("bbox", "[1, 2, 3.5, 4]"), ("ocrtext", "Exit 14 B"),
         ("molecule", "CC(=O)Oc1ccccc1C(=O)O"), ("caption", "The molecule is an amine"),
         ("html-code", "<html><p>one</p></html>"), ("svg-code", '<svg><rect x="1"/></svg>'),
         ("critic", "first"), ("judge", "42 km")]
PHRASES = ["{}", "<answer>{}</answer>", "<answer> {}\n</answer>", "So.\n<answer>{}</answer>", "<answer>x</answer> no, "
           "<answer>{}</answer>"]


def test_every_type_is_here():
    assert {k for k, _ in GOLDS} | {"general-code"} == set(rewards.ANSWER_TYPES)


@pytest.mark.parametrize("kind,gold", GOLDS)
def test_right_in_every_phrasing_and_thinking_changes_nothing(science, kind, gold):
    for phrase in PHRASES:
        text = phrase.format(gold)
        assert score(text, gold, kind) == 1 == score(text, [gold], kind), text
        for thought in ("", "It may be 7, or <answer>A</answer>", "\\boxed{9} [0,0,1,1] yes ```\nx\n```"):
            assert score(f"<think>{thought}</think>{text}", gold, kind) == 1, (thought, text)
        assert score(f"<think>{text}", gold, kind) == 0 == reward(f"<think>{text}", gold, kind).reward
    if kind not in ("html-code", "svg-code"):
        assert score(f"\\boxed{{{gold}}}", gold, kind) == 1


@pytest.mark.parametrize("kind,gold", GOLDS)
def test_noise_neither_raises_nor_scores(science, kind, gold):
    rng = random.Random(0)
    letters = "<>[]{}()\\/=+-.,:;$^_%#@|\"' \n\t01579azBQé漢\0\ud800"
    for n in (0, 1, 3, 10, 40, 150, 1000):
        for _ in range(5):
            noise = "".join(rng.choice(letters) for _ in range(n))
            assert 0 <= reward(noise, gold, kind).reward <= 0.6
            assert reward(f"<answer>{noise}</answer>", gold, kind).accuracy <= 0.6


@pytest.mark.parametrize("response,value", [
    ("<think>a</think><answer>7</answer>", 1), (" <think>\na\n</think>\n\n<answer>\n7\n</answer>\n", 1),
    ("<think>a</think>It is \\boxed{7}.", 1), ("<think>a</think><answer>\\boxed{7}</answer>", 1), ("7", 0), ("", 0),
    ("<answer>7</answer>", 0), ("<think>a</think>7", 0), ("<think>a<answer>7</answer>", 0),
    ("<think>a</think><answer>7", 0), ("<think>a</think><answer></answer>", 0), ("<think>a</think>\\boxed{7", 0),
    ("<think>a</think><answer>7</answer><answer>7</answer>", 0), ("<think>a</think>\\boxed{7}\\boxed{7}", 0),
    ("<think>a</think><think>b</think><answer>7</answer>", 0), ("<answer>7</answer><think>a</think>", 0),
    ("<think>a</think><answer>7</answer><think>", 0), ("x<think>a</think><answer>7</answer>", 0)])
def test_format(response, value):
    assert rewards.format_reward(response) == value


@needs_shared
def test_real_rows_score_their_own_answers(science):
    import pyarrow.parquet as pq
    rows = pq.read_table(DATA / "formats/rl_172k/train-00000-of-00001.parquet",
                         columns=["id", "answer", "answer_type"]).to_pylist()
    for row in rows:
        r = reward(f"<think>a</think><answer>{row['answer'][0]}</answer>", row["answer"], row["answer_type"])
        assert r.reward == 1 and r.predicted, row
    assert len(rows) == 155


@needs_shared
def test_algebra_takes_nothing_away_and_gives_little_away(science, monkeypatch):
    """On real answers: what the rule accepts stays, and of pairs of different questions few become equal."""
    with open(DATA / "mathvision/testmini.jsonl") as f:
        golds = list(dict.fromkeys(json.loads(line)["answer"] for line in f))
    golds += ["\\frac{1}{2}", "2\\sqrt{3}", "x^2-1", "(1,2)", "5\\pi", "\\{1,2\\}", "12", "-7", "0.25"]
    pairs = [(a, b) for a in golds[-40:] for b in golds[-40:]]
    with_algebra = [score(f"<answer>{a}</answer>", b, "math-expressions") for a, b in pairs]
    monkeypatch.setattr(rewards, "_math_verify", lambda: None)
    without = [score(f"<answer>{a}</answer>", b, "math-expressions") for a, b in pairs]
    assert all(x >= y for x, y in zip(with_algebra, without))
    assert sum(x > y for x, y in zip(with_algebra, without)) <= 4


# ---- the judge ------------------------------------------------------------------------------------------------------
@pytest.fixture
def server():
    """An OpenAI-compatible server that says what `says` holds and keeps what it was asked."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": says[0]}}]}).encode()
            self.send_response(200 if says[0] != "fail" else 500)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    says, asked = ["CORRECT"], []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", says, asked
    httpd.shutdown()
    httpd.server_close()


def test_judge_cache_and_reported_fallback(server, tmp_path):
    url, says, asked = server
    judge = Judge(url, "m", str(tmp_path / "cache"), seconds=5)
    def ask(text, gold="a red fox", kind="judge", j=judge):
        return reward(f"<think>t</think><answer>{text}</answer>", gold, kind, question="What?", judge=j)
    assert ask("a red fox").by == "rule" and not asked  # the rule's yes needs no judge
    for _ in range(2):
        r = ask("a vixen")
        assert (r.reward, r.by, len(asked)) == (1, "judge", 1)
    assert "a vixen" in asked[0]["messages"][0]["content"] and asked[0]["temperature"] == 0
    says[0] = "<think>CORRECT?</think>WRONG"
    assert (ask("a dog").accuracy, ask("a dog").by, len(asked)) == (0, "judge", 2)
    for says[0] in ("INCORRECT", "CORRECT or WRONG", "", "fail"):
        r = ask("a cat")
        assert r.accuracy == 0 and r.by.startswith("rule, no judge: ") and r.error is None
    assert len(asked) == 6  # what was not understood is not kept
    says[0] = "CORRECT"
    assert ask("probably so", "yes", "boolean").by == "judge"
    assert ask("no", "yes", "boolean").by == "rule"  # read, and wrong
    assert ask("the former", "first", "critic").by == "judge"
    assert ask("8", "7", "number").by == "rule" and ask("a vixen", j=None).by == "rule"
    assert reward("<think>a vixen", "a red fox", "judge", judge=judge).reward == 0
    closed = Judge("http://127.0.0.1:9/v1", "m", str(tmp_path / "cache"), seconds=1)
    assert ask("a vixen", j=closed).by.startswith("rule, no judge: ")
    with Verifiers(1, judge=judge) as pool:
        r, = pool.score_many([dict(response="a vixen", gold="a red fox", answer_type="judge", question="What?")])
    assert (r.by, r.accuracy) == ("judge", 1)


# ---- the pool -------------------------------------------------------------------------------------------------------
def test_pool_is_the_function_in_order(science):
    items = [dict(response=f"<answer>{i % 7}</answer>", gold=str(i % 5), answer_type="number") for i in range(300)]
    items += [dict(response="OCC", gold="CCO", answer_type="molecule"),
              dict(response="<answer>B</answer>", gold="two", answer_type="multiple-choice", options=["one", "two"]),
              dict(response="def solution(x): return x", gold=suite((1, 1)), answer_type="general-code")]
    with Verifiers(2) as pool:
        for _ in range(2):
            assert pool.score_many(items) == [reward(**item) for item in items]
        assert pool.score_many([]) == [] and (pool.scored, pool.errors, pool.replaced) == (606, 0, 0)


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A copy of rewards.py whose 'any' does what the response says."""
    text = (ROOT / "rewards.py").read_text()
    text = text.replace("def exact_text(", '''def exact_text(response, gold):
    if response.startswith("RUN "):
        exec(response[4:])
    return _exact_text(response, gold)


def _exact_text(''')
    (tmp_path / "rewards.py").write_text(text)
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "rewards.py"))
    return lambda code: dict(response="RUN " + code, gold="x", answer_type="any")


def test_pool_marks_what_raises_hangs_or_dies(faulty):
    good = dict(response="<think>a</think><answer>x</answer>", gold="x", answer_type="any")
    with Verifiers(2, memory_mb=2048) as pool:
        start = time.monotonic()
        items = [good, faulty("raise ValueError('broken')"), good, faulty("time.sleep(1000)"), good,
                 faulty("os._exit(3)"), good, faulty("bytearray(10 ** 11)"), faulty("os.kill(os.getpid(), 9)"), good,
                 faulty("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"),
                 dict(response="x", gold="x", answer_type="anything"), good]
        alive = []
        results = pool.score_many(items, timeout=1.5, between=lambda: alive.append(time.monotonic()))
        assert time.monotonic() - start < 15 and len(alive) > 4  # a watchdog hears of it meanwhile
        bad = {1: "ValueError: broken", 3: "no result within 1.5 s", 5: "the verifier died \\(exit code 3\\)",
               7: "MemoryError", 8: "the verifier died \\(exit code -9\\)", 10: "no result within 1.5 s",
               11: "choose one of"}
        for k, r in enumerate(results):
            if k in bad:
                assert re.search(bad[k], r.error) and r.reward is None and r.accuracy is None, (k, r)
            else:
                assert r == Result(1.0, 1.0, 1.0, "x")
        assert (pool.scored, pool.errors, pool.replaced) == (13, 7, 4)
        assert [r.error for r in pool.score_many([good] * 4)] == [None] * 4


def test_pool_kills_a_verifiers_children():
    """A worker that is killed takes the program with it that it was running."""
    code = "```python\nimport time\ntime.sleep(1000)\n```"
    with Verifiers(1) as pool:
        worker, folder = pool.workers[0][0].pid, pool.folder.name
        r, = pool.score_many([dict(response=code, gold=suite(("", "")), answer_type="general-code")], timeout=1)
    assert r.error == "no result within 1 s" and not os.path.exists(folder)
    time.sleep(0.5)
    left = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True).stdout
    assert not [s for s in left.splitlines() if "PR_SET_PDEATHSIG" in s and f" {worker}" in s and " Z" not in s]


def test_pool_ends_with_its_parent(tmp_path):
    script = ("import sys; sys.path.insert(0, '.'); import os, rewards; p = rewards.Verifiers(2); "
              "print(*[w.pid for w, _ in p.workers], flush=True); os._exit(0)")
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
                         capture_output=True, text=True, timeout=60).stdout
    time.sleep(1)
    for pid in map(int, out.split()):
        assert not os.path.exists(f"/proc/{pid}") or " Z" in open(f"/proc/{pid}/stat").read()
    assert len(out.split()) == 2
