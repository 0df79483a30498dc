"""Try damaged model directories, each in a child process with limits: `python tests/fuzz/run.py --cases 20000`.

A case loads a model, tokenizes, lays out a chat and generates two tokens. It may work or be refused with one line;
anything else is printed, with what reproduces it, and ends in status 1. The limit on time is CPU time, so that a busy
machine finds nothing that a quiet one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for what tests share
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import torch
from fuzz.mutate import damage

if TYPE_CHECKING:
    from minirea.tokenizer import Tokenizer

CPU_SECONDS = 20
IDLE_SECONDS = 30  # asleep without having computed meanwhile: it waits for what never comes
MEMORY_BYTES = 4 * 2**30  # beyond what the process has when a case begins

# Aborts inside the tokenizers library that only a child process can catch, by what their output ends with.
KNOWN_ABORTS: tuple[str, ...] = ()


def case(directory: Path) -> None:
    """What a user does with a model."""
    import minirea
    from minirea.api import read_model

    files = read_model(directory)
    with contextlib.suppress(minirea.MissingFileError):
        use_tokenizer(files.tokenizer)
    llm = files.load()
    llm.generate([3, 4, 5], max_tokens=2)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    from minirea.errors import InputError

    tokenizer.decode(tokenizer.encode("The old <s> house 42\n\n" + "a" * 40 + "b"))
    with contextlib.suppress(InputError):
        tokenizer.encode_chat([{"role": "user", "content": "Where? <s>"}])


def import_all(bases: list[Path]) -> None:
    """What a case imports, once, not in every child. torch computes in children only: its pool survives no fork."""
    torch.set_num_threads(1)

    import minirea.api
    import minirea.kernels.steps.reference  # noqa: F401
    from minirea.tokenizer import load_tokenizer

    for base in bases:
        use_tokenizer(load_tokenizer(base))


def in_child(directory: Path) -> tuple[int, str]:
    """Status of a case and what it printed: 0 it works, 1 it is refused, 2 a traceback, negative: a signal."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS + 2))
            status = attempt(directory)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        output = read_output(pipe, pid).decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output


def read_output(pipe: FileIO, pid: int) -> bytes:
    """What a child prints until it ends. One that only waits is killed."""
    output, before = b"", ""
    while True:
        if select.select([pipe], [], [], IDLE_SECONDS)[0]:
            block = pipe.read(2**16)
            if not block:
                return output
            output = (output + block)[-(2**20) :]
            continue
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent = " ".join(fields[10:12])  # user and system time
        if state in "SD" and spent == before:
            os.kill(pid, signal.SIGKILL)
        before = spent


def attempt(directory: Path) -> int:
    from minirea.errors import MinireaError

    try:
        case(directory)
    except MinireaError as error:
        message = str(error)
        if len(message.splitlines()) > 1 or not message.isprintable() or len(message) > 2000:
            print("not one printable line:", repr(message)[:300])
            return 2
        print(message)
        return 1
    except BaseException:
        traceback.print_exc()
        return 2
    return 0


def run(cases: int, seed: int, verbose: bool = False) -> int:
    """Status 0 if every case works or is refused."""
    from fuzz.bases import write_bases

    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        write = multiprocessing.get_context("fork").Process(target=write_bases, args=(Path(scratch) / "bases",))
        write.start()
        write.join()
        bases = sorted((Path(scratch) / "bases").iterdir())
        import_all(bases)
        for base in bases:
            status, output = in_child(base)
            assert status == 0, f"{base.name} is to be a good one: {output}"
        for number in range(seed, seed + cases):
            if number % 1000 == 0:
                print(f"case {number}", file=sys.stderr, flush=True)
            rng = random.Random(number)
            directory = Path(scratch) / "case"
            base = rng.choice(bases)
            shutil.copytree(base, directory)
            done = damage(directory, rng)
            status, output = in_child(directory)
            shutil.rmtree(directory)
            known = status < 0 and output.rstrip().endswith(KNOWN_ABORTS)
            kind = {0: "work", 1: "refused"}.get(status, "known aborts" if known else "failures")
            counts[kind] += 1
            if kind == "failures":
                how = signal.Signals(-status).name if status < 0 else "a traceback"
                print(f"case {number} ({base.name}; {'; '.join(done)}): {how}\n{output[-1500:]}", flush=True)
            elif verbose:
                print(number, base.name, done, kind, output.strip()[-200:], flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if counts["failures"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    sys.exit(run(arguments.cases, arguments.seed, arguments.verbose))
