"""Runs a Python program that nobody has read: what a model wrote as its answer.

    run_program("print(int(input()) + 1)", "41")                                            # (0, b"42\\n")
    run_program("def solution(x):\\n    return x + 1", 41)                                    # (0, b"42")

"""
import contextlib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile

# What the sandbox's process runs: python -c SANDBOX folder script|function hook|bare seconds MB parent. Kernel first: a
# network, process tree and file tree of its own (the interpreter, read only, and 64 MB), no privileges, limits; then an
# audit hook. Where the kernel lends no namespaces, the limits and the hook remain and no process may be started: that
# holds off what a model tries by accident, not an attack (NOTE audit hooks can be got round).
SANDBOX = r'''
import ctypes, json, os, resource, sys
(folder, mode, hooked), (seconds, memory, parent) = sys.argv[1:4], map(int, sys.argv[4:7])
os.umask(0o022)
code, given = (open(os.path.join(folder, n), encoding="utf-8").read() for n in ("program", "input"))
for name in ("program", "input"): os.remove(os.path.join(folder, name))
libc, root, me = ctypes.CDLL(None, use_errno=True), os.getuid() == 0, (os.getuid(), os.getgid())
prefixes = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)}
def need(result):
    if result: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def mount(what, where, kind, flags, data=None):
    need(libc.mount(what and what.encode(), where.encode(), kind, ctypes.c_ulong(flags), data))
libc.prctl(1, 9)                                                        # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != parent: os._exit(1)
home = folder
try:
    need(libc.unshare(0x68020000 | (0 if root else 0x10000000)))        # NEWNS, NEWIPC, NEWPID, NEWNET; NEWUSER
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {me[0]} 1"), ("gid_map", f"0 {me[1]} 1")):
            open(f"/proc/self/{name}", "w").write(text)
    mount(None, "/", None, 0x44000)                                     # MS_REC, MS_PRIVATE
    mount("tmpfs", folder, b"tmpfs", 6, b"size=64m,mode=755")           # MS_NOSUID, MS_NODEV
    for path in sorted({"/usr", "/lib", "/lib64", "/dev/null", sys.prefix, *prefixes}):
        target = folder + path
        if path == "/dev/null":
            os.makedirs(os.path.dirname(target), exist_ok=True); open(target, "w").close()
            mount(path, target, None, 4096)                             # MS_BIND
        elif os.path.isdir(path) and not any(path.startswith(p + "/") for p in prefixes | {"/usr"}):
            os.makedirs(target, exist_ok=True)
            mount(path, target, None, 0x5000)                           # MS_BIND, MS_REC
            flags = os.statvfs(target).f_flag
            mount(None, target, None, 0x1021 | flags & 0xC0E | (flags & 4096) << 9)  # MS_REMOUNT, MS_BIND, MS_RDONLY
    os.mkdir(folder + "/box"); home = "/box"
    os.chroot(folder)
    isolated = True
except OSError:
    isolated = False
if root:
    for user in (2 ** 30 + os.getpid(), 65534):                         # its own: RLIMIT_NPROC counts by user
        try:
            os.chown(home, user, user)
            os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
            break
        except OSError:                                                 # no such user in a rootless container
            if user == 65534 and not isolated: raise
    libc.prctl(4, 1)
libc.prctl(38, 1, 0, 0, 0)                                              # PR_SET_NO_NEW_PRIVS
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
libc.prctl(1, 9)
if isolated:                                                            # the child is process 1: with it die its own
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    libc.prctl(1, 9)
os.chdir(home)
os.environ["HOME"] = home
for what, limit in (("NPROC", 16 if isolated else 0), ("FSIZE", 16 << 20), ("AS", memory << 20), ("CPU", seconds),
                    ("NOFILE", 64), ("CORE", 0), ("STACK", 64 << 20)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
stdin, out = os.open("input", os.O_RDWR | os.O_CREAT | os.O_TRUNC), os.dup(1)
os.write(stdin, given.encode() if mode == "script" else b""); os.lseek(stdin, 0, 0); os.dup2(stdin, 0)
readable = [os.path.realpath(p) + "/" for p in (home, *prefixes, "/usr/lib", "/usr/share/zoneinfo")]
private, denied = os.path.realpath(home) + "/", ("socket.", "subprocess.", "ctypes.", "os.fork", "os.exec", "os.posix",
                                                 "os.system", "os.spawn", "os.kill", "os.pty", "pty.", "os.chroot")
def hook(event, args, paths=("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
                             "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.chdir")):
    if event == "import" and args[0] in ("ctypes", "_ctypes"):
        raise ImportError("not in the sandbox")
    if event.startswith(denied):
        raise PermissionError(f"{event}: not in the sandbox")
    if event in paths:
        writes = event != "open" or args[2] is not None and args[2] & 0o3103 or set(str(args[1])) & set("wax+")
        reads = event in ("os.listdir", "os.scandir", "os.chdir")
        for path in args[:2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(path, (str, bytes)):
                real = os.path.realpath(os.fsdecode(path)) + "/"
                if real != "/dev/null/" and not real.startswith(private) and (writes and not reads or not
                                                                              real.startswith(tuple(readable))):
                    raise PermissionError(f"{event} {path}: not in the sandbox")
for name in [n for n in sys.modules if "ctypes" in n]:
    del sys.modules[name]
del ctypes, libc
sys.argv[:] = ["program"]
if hooked == "hook":
    sys.addaudithook(hook)
scope = {"__name__": "__main__"}
if mode == "function":
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
exec(compile(code, "program", "exec"), scope)
if mode == "function":
    os.write(out, json.dumps(scope["solution"](json.loads(given)), default=str).encode())
sys.stdout.flush()
'''


def defines_solution(code: str) -> bool:
    return re.search(r"^(?:def solution\b|solution\s*=)", code, re.M) is not None


def run_program(code: str, given, seconds: float = 4, memory_mb: int = 1024, hook: bool = True) -> tuple[int, bytes]:
    """Exit code and output (at most 1 MB) of a Python program in a sandbox. given: what stdin holds; or, for a program
    that defines solution, its argument, and then the output is the JSON of the result. Exit code -9: out of time."""
    function = defines_solution(code)
    with tempfile.TemporaryDirectory(prefix="verify_", ignore_cleanup_errors=True) as folder, \
            tempfile.TemporaryFile() as out:
        text = json.dumps(given) if function else given if isinstance(given, str) else json.dumps(given)
        for name, content in (("program", code), ("input", text)):
            with open(os.path.join(folder, name), "w", encoding="utf-8", errors="replace") as f:
                f.write(content)
        python = [sys.executable, "-I", "-B", "-X", "utf8", "-c", SANDBOX]
        process = subprocess.Popen([*python, folder, "function" if function else "script", "hook" if hook else "bare",
                                    str(math.ceil(seconds)), str(memory_mb), str(os.getpid())],
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, cwd="/",
                                   start_new_session=True, env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        try:
            rc = process.wait(seconds + 1)
        except subprocess.TimeoutExpired:
            rc = -9
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return rc, os.pread(out.fileno(), 1 << 20, 0)


@functools.cache
def check() -> None:
    rc, out = run_program("import decimal, heapq\nprint(input())", "works", seconds=30)
    assert out == b"works\n", f"the sandbox for programs does not start (exit code {rc}): {sys.executable} must be " \
                              "readable for every user, or run as another user than root"
