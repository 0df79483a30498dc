"""Try damaged model directories, each in a child process with limits: `python tests/fuzz/run.py --cases 20000`.

A case loads a model, tokenizes, lays out a chat and generates two tokens. It may work or be refused with one line;
anything else is printed, with what reproduces it, and ends in status 1. The limit on time is CPU time, so that a busy
machine finds nothing that a quiet one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for what tests share

import torch
from fuzz.mutate import damage

CPU_SECONDS = 20
MEMORY_BYTES = 4 * 2**30  # beyond what the process has when a case begins

# Aborts inside the tokenizers library that only a child process can catch, by what their output ends with.
KNOWN_ABORTS: tuple[str, ...] = ()


def write_bases(directory: Path) -> None:
    """One directory for each format: tokenizer.json, tokenizer.model, Mistral's own."""
    from testing import tiny_model, write_checkpoint, write_mistral
    from tokenizer_kinds import JSON_KINDS, train_sentencepiece

    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, "add_bos_token": True}
    for name in ("byte_level", "llama_metaspace", "sentencepiece"):
        base = write_checkpoint(directory / name, tiny_model(vocab_size=610))
        if name == "sentencepiece":
            train_sentencepiece(base / "tokenizer.model", model_type="bpe")
        else:
            JSON_KINDS[name]().save(str(base / "tokenizer.json"))

        (base / "tokenizer_config.json").write_text(json.dumps(config))
        (base / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    mistral = tiny_model(mistral=True, vocab_size=610)
    base = write_mistral(directory / "mistral", mistral)
    from fuzz.tekken import tekken

    (base / "tekken.json").write_text(json.dumps(tekken()))


def case(directory: Path) -> None:
    """What a user does with a model."""
    import minirea
    from minirea.api import read_model

    files = read_model(directory)
    with contextlib.suppress(minirea.MissingFileError):
        tokenizer = files.tokenizer
        tokenizer.decode(tokenizer.encode("The old <s> house 42\n\n" + "a" * 40 + "b"))
        with contextlib.suppress(minirea.InputError):
            tokenizer.encode_chat([{"role": "user", "content": "Where? <s>"}])
    llm = files.load()
    llm.generate([3, 4, 5], max_tokens=2)


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
    with os.fdopen(read, "rb") as pipe:
        output = pipe.read(2**20).decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output


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
    torch.set_num_threads(1)  # a child of fork has no other threads
    import minirea.api  # noqa: F401  once, not in every child

    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        write = multiprocessing.get_context("fork").Process(target=write_bases, args=(Path(scratch) / "bases",))
        write.start()  # torch computes in children only: what it starts does not survive a fork
        write.join()
        bases = sorted((Path(scratch) / "bases").iterdir())
        for base in bases:
            status, output = in_child(base)
            assert status == 0, f"{base.name} is to be a good one: {output}"
        for number in range(seed, seed + cases):
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
