"""The README says what is so."""
import re

from conftest import ROOT


def test_file_list_has_the_real_line_counts():
    rows = dict(re.findall(r"^\| `([\w./-]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    files = [*ROOT.glob("*.py"), *(f for f in ROOT.glob("kernels/*.py") if f.stat().st_size)]
    assert ({str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
            == {k: int(v) for k, v in rows.items()})


def test_lines_are_at_most_120_wide():
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("tests/*.py")]
    assert [f"{f.name}:{i}" for f in files
            for i, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 120] == []
