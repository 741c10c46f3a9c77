"""bench.py rl at a tiny size: a row of ours and, where trl is installed, of TRL, whose log-probabilities are ours."""
import importlib.util
import json

from conftest import launch


def test_rl_prints_rows_and_agrees_with_trl():
    out = launch("bench.py", "rl", "--model", "preset:tiny", "--layers", 2, "--prompts", 2, "--group", 4, "--prompt", 8,
                 "--mean", 12, "--longest", 32, "--pack", 128, "--micro", 2, "--batches", 1).stdout
    assert "| ours, 1 batches | " in out and "of 128, sdpa | " in out
    result = json.loads(out.splitlines()[-1])
    assert result["ours"]["tok_s"] > 0 and result["ours"]["grad_norm"] > 0
    if importlib.util.find_spec("trl"):
        assert "| TRL, 1 batches | 2 sequences" in out and result["logp_gap_max"] < 1e-4
        assert abs(result["trl"]["grad_norm"] / result["ours"]["grad_norm"] - 1) < 1e-2
    else:
        assert "trl is not installed" in out
