"""What every script shares: command line from a dataclass, process group, sharding, atomic folders,
checkpoints, log."""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


def run(main) -> None:
    """Runs a script's main; what the user can mend ends in one line and exit code 2."""
    try:
        main()
    except (UserError, AssertionError) as e:
        if not str(e):
            raise
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(2) if dist.is_initialized() and dist.get_world_size() > 1 else sys.exit(2)  # never wait for a peer
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or 'while writing'}", file=sys.stderr, flush=True)
        os._exit(2) if dist.is_initialized() and dist.get_world_size() > 1 else sys.exit(2)
    finally:
        if sys.exc_info()[0] in (None, SystemExit):
            code = getattr(sys.exc_info()[1], "code", 0) or 0
            if dist.is_initialized():
                dist.destroy_process_group()
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # NOTE torch's own threads sometimes abort a rank while the interpreter shuts down: leave before
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse(cls, argv: list[str] | None = None, doc: str | None = None):
    """Builds dataclass `cls` from the command line. Fields become --name value (bool: --name / --no-name, list[str]:
    --name A B, also repeated); the comment behind a field is its help. Unknown names are an error that says the
    nearest one."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.+)$", inspect.getsource(cls), re.M))
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in dataclasses.fields(cls):
        kind, required = hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        shown = "" if required or f.default in (None, dataclasses.MISSING) else f" [{f.default}]"
        options = dict(required=required, default=argparse.SUPPRESS,
                       help=comments.get(f.name, "").replace("%", "%%") + shown)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            options |= dict(nargs="+", action="extend", type=typing.get_args(kind)[0], metavar=f.name.upper())
        else:
            options |= dict(type=kind, metavar=kind.__name__)
        parser.add_argument(f"--{f.name.replace('_', '-')}", dest=f.name, **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [s for a in parser._actions for s in a.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; -h lists all"))
    return cls(**vars(known))


def command(names, doc: str) -> str:
    """The script's first word, one of `names`; -h or no word shows the script's documentation."""
    word = sys.argv[1] if len(sys.argv) > 1 else "-h"
    if word in ("-h", "--help"):
        print(f"{doc}\nA command followed by -h lists its options.")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if word not in names:
        raise UserError(f"{word}: choose one of {', '.join(names)}; -h shows how")
    return word


def commit() -> str:
    """Git commit of the code that runs, with + if the tree has changes; 'unknown' outside a repository."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=Path(__file__).parent,
                             capture_output=True, text=True, check=True).stdout.strip()
        return out
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- process group and sharding -------------------------------------------------------------------------------------
def init_distributed(patience: float = 0) -> torch.device:
    """Joins torchrun's group, or makes a group of one. NCCL for tensors on GPUs, gloo for tensors on CPUs.
    A rank waits for others at least half an hour, or `patience` seconds."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=max(patience, 1800)))
    return device


def init_apart(trainers: int, patience: float = 0) -> tuple[torch.device, dist.Store]:
    """torchrun's group in two: the first ranks train and are the group from here on; each of the others is a group of
    one, with its GPU as the only one it sees. -> device, and a store that all ranks share"""
    number, local, many = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None,
                          is_master=number == 0 and not agent, wait_for_workers=False)
    trains = number < trainers
    if not trains:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(many)))).split(",")
        own = (visible + [""] * many)[local]
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES=own)
        local = 0
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after a restart by torchrun the store is the old one
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                            store=dist.PrefixStore(f"trainers/{life}", store) if trains else dist.HashStore(),
                            rank=number if trains else 0, world_size=trainers if trains else 1,
                            timeout=timedelta(seconds=max(patience, 1800)))
    return device, dist.PrefixStore(f"apart/{life}", store)


def watchdog(seconds: float, what: str):
    """A function to call at every sign of life; without one for so long, the process ends with one line."""
    alive = [time.monotonic()]

    def watch():
        while time.monotonic() - alive[0] < seconds:
            time.sleep(min(1.0, seconds / 10))
        print(f"error: {what} gave no sign of life for {seconds:g} s (rank {rank()}); go on with --resume",
              file=sys.stderr, flush=True)
        os._exit(3)
    threading.Thread(target=watch, daemon=True).start()
    return lambda: alive.__setitem__(0, time.monotonic())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def print0(*args) -> None:
    if is_rank0():
        print(*args, flush=True)


class _Around(torch.nn.Module):
    """A sharding unit of `inner`'s parameters whose gathering begins and ends around a call that uses them."""
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, call, *args):
        return call(*args)


def shard(model, compute_dtype: torch.dtype, ep: int = 1) -> None:
    """FSDP2 on a model without memory (meta device): one unit per block and one for the merger, the rest in the root.
    Parameters are gathered in compute_dtype and gradients are summed in fp32, without an average: the loss's own
    denominator is the step's. What trains keeps fp32 masters, what is frozen lives in compute_dtype.

    ep > 1: groups of ep neighbouring ranks divide the experts among them and exchange tokens (moe.Experts.dispatch);
    each expert is sharded over the ranks that hold it, along its rows, in a unit of its own. An expert's gradient sums
    over the tokens of its group inside the group, and over groups by FSDP: the same sum as every other parameter's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    device, E = "cuda" if torch.cuda.is_available() else "cpu", model.config.num_experts
    assert ep == 1 or E, f"--ep {ep}: the model has no experts"
    assert world() % ep == 0, f"--ep {ep} does not divide {world()} ranks"
    assert E % ep == 0, f"{E} experts do not divide over --ep {ep} ranks"
    mesh = init_device_mesh(device, (world(),), mesh_dim_names=("shard",))
    options = dict(mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32,
                                                  cast_forward_inputs=False))
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else compute_dtype)
    if ep > 1:
        both = init_device_mesh(device, (world() // ep, ep), mesh_dim_names=("shard", "expert"))
        for block in model.model.layers:
            experts = block.mlp.experts
            for name, p in list(experts.named_parameters()):
                assert p.shape[1] % both["shard"].size() == 0, \
                    f"an expert's {p.shape[1]} rows do not divide over {both['shard'].size()} ranks: a larger --ep does"
                setattr(experts, name, torch.nn.Parameter(distribute_tensor(p.data, both["expert"], [Shard(0)]),
                                                          requires_grad=p.requires_grad))
            experts.group = both["expert"].get_group()
            # around the whole block: inside, recomputation would run the unit's hooks a second time
            block.around = fully_shard(_Around(experts), mesh=both["shard"], shard_placement_fn=lambda p: Shard(1),
                                       **options)
    for unit in [*([*model.visual.blocks, model.visual.merger] if model.visual is not None else []),
                 *model.model.layers]:
        around = getattr(unit, "around", None)
        fully_shard(unit, mesh=mesh, ignored_params=set(around.parameters()) if around is not None else None, **options)
    fully_shard(model, mesh=mesh, **options)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    model.mixed_dtype = compute_dtype


def by_mesh(params) -> list[list]:
    """Parameters that live on the same ranks, together: with expert parallelism the experts and the others, which one
    fused operation cannot mix."""
    groups = {}
    for p in params:
        groups.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return list(groups.values())


@torch.no_grad()
def clip_gradients(params, limit: float) -> torch.Tensor:
    """Scales the gradients to a norm of at most `limit`; returns the norm before, over all ranks."""
    groups = [g for g in by_mesh(params) if any(p.grad is not None for p in g)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in g if p.grad is not None]) for g in groups]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    for g in groups:
        torch.nn.utils.clip_grads_with_norm_(g, limit, total)
    return total


def on_sigterm() -> list:
    """A list that stays empty until a SIGTERM: a training loop looks at it once a step, then saves and ends."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


def _training_state(model, optimizer) -> dict:
    """Masters and moments of the trained parameters by name: what torch.distributed.checkpoint saves and reshards."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in named.values():
        if p not in optimizer.state:  # before the first step
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    return {"model": {n: p.detach() for n, p in named.items()},
            "optimizer": {n: optimizer.state[p] for n, p in named.items()}}


def save_state(model, optimizer, folder: Path, trainer: dict) -> None:
    """Sharded masters and moments, this rank's random state, and trainer.json. All ranks call it."""
    import torch.distributed.checkpoint as dcp
    dcp.save(_training_state(model, optimizer), checkpoint_id=folder / "state")
    random = {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    torch.save(random, folder / "state" / f"random_{rank()}_of_{world()}.pt")
    if is_rank0():
        write_json(folder / "trainer.json", trainer)


def load_state(model, optimizer, folder: Path) -> dict:
    """Restores what save_state wrote, on any number of ranks, and returns trainer.json. The random state is that of the
    same rank of the same world size, if there is one."""
    import torch.distributed.checkpoint as dcp
    dcp.load(_training_state(model, optimizer), checkpoint_id=folder / "state")
    random = folder / "state" / f"random_{rank()}_of_{world()}.pt"
    if random.exists():
        saved = torch.load(random)
        torch.set_rng_state(saved["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])
    return json.loads((folder / "trainer.json").read_text())


# ---- files ----------------------------------------------------------------------------------------------------------
def write_json(path: Path, value) -> None:
    """Writes through a temporary name, so a reader never sees half a file."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(tmp, path)


@contextlib.contextmanager
def atomic_dir(path):
    """A folder that appears whole or not at all: yields a temporary folder, flushes it to disk and renames it to
    `path`. All ranks enter together. If writing fails, what stood at `path` stays."""
    path = Path(path)
    tmp, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if is_rank0():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
    barrier()
    try:
        yield tmp
    except BaseException as e:
        free = shutil.disk_usage(path.parent).free
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(e, (KeyboardInterrupt, UserError)):
            raise
        if world() > 1 and "peer" in str(e):
            raise UserError(f"{path}: not saved, another rank failed") from e
        why = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: could not be written: {why} ({free / 2**20:.0f} MiB were free). Earlier checkpoints "
                        "are untouched; make room and run again (training: with --resume)") from e
    barrier()
    if is_rank0():
        for file in tmp.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(tmp, path)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def remove_dir(path: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a half-deleted one is never taken for whole."""
    trash = path.with_name(f".{path.name}.old")
    os.rename(path, trash)
    shutil.rmtree(trash)


def latest(folder) -> Path | None:
    """The newest complete step_XXXXXXXX folder of a run, or None."""
    steps = sorted(p for p in Path(folder).glob("step_????????") if p.is_dir())
    return steps[-1] if steps else None


class Log:
    """metrics.jsonl of a run: one JSON object a line, flushed as it comes; a resumed run drops lines after its step."""
    def __init__(self, folder: Path, start_step: int, name: str = "metrics.jsonl"):
        self.path = Path(folder) / name
        if not is_rank0():
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        keep = []
        if start_step and self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                    if json.loads(line)["step"] <= start_step:
                        keep.append(line)
        tmp = self.path.with_name(f".{name}.tmp")
        tmp.write_text("".join(line + "\n" for line in keep))
        os.replace(tmp, self.path)

    def write(self, row: dict) -> None:
        if is_rank0():
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")


def plot_metrics(folder, keys=("loss", "lr", "grad_norm", "tok_s")) -> Path:
    """Curves of a run's metrics.jsonl as curves.png beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    lines, columns = -(-len(keys) // 4), min(len(keys), 4)
    fig, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), constrained_layout=True, squeeze=False)
    for ax in axes.flat[len(keys):]:
        ax.set_visible(False)
    for ax, key in zip(axes.flat, keys):
        have = [r for r in rows if key in r]  # a reinforcement step without usable groups has no update
        ax.plot([r["step"] for r in have], [r[key] for r in have], linewidth=1)
        ax.set(title=key, xlabel="step")
        ax.grid(alpha=0.3)
    out = Path(folder) / "curves.png"
    fig.savefig(out, dpi=110)
    plt.close(fig)
    return out


# ---- device ---------------------------------------------------------------------------------------------------------
PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "B200": 2250}  # dense bf16


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this GPU by its data sheet (FLOP/s); None where it is not known (CPUs): then no MFU is
    shown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((v * 1e12 for k, v in PEAK_TFLOPS.items() if k in name), None)
