"""Shared by the tests: where real data may lie, a small tokenizer, a small toy world, and running scripts
as users do."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE = Path(__file__).parent / "reference_innovator_vl_tiny"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

needs_shared = pytest.mark.skipif(not SHARED.exists(),
                                  reason="the folder ../shared (real data and tokenizer) is not here")


def launch(*args, nproc: int = 1, check: bool = True, background: bool = False):
    """Runs a script of the repository in a process of its own (nproc > 1: under torchrun)."""
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    # glibc keeps freed memory: with a real vocabulary half the time of a CPU step goes into fresh pages
    env = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 36), "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command += [str(ROOT / args[0]) if str(args[0]).endswith(".py") else str(args[0]), *map(str, args[1:])]
    if background:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A hundredth of the toy world in the published formats."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    launch("toy.py", "make", "--out", folder, "--scale", "0.02")
    return folder


@pytest.fixture(scope="session")
def tokenizer(toy):
    from data import Tokenizer
    return Tokenizer(toy / "tokenizer")
