"""What kernels compile to for Hopper, compared with a table in the repository; no GPU is needed."""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton")

from machine_code import CUOBJDUMP, PRODUCTS, SHAPES, compiled, counts, kept  # noqa: E402  (which imports triton)

pytestmark = [
    pytest.mark.skipif(triton.__version__ not in kept(), reason=f"no counts are kept for Triton {triton.__version__}"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton comes without cuobjdump"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"),
]


@pytest.mark.parametrize("name", [*SHAPES, *PRODUCTS])
def test_counts_are_those_of_the_table(name: str) -> None:
    """If a change is meant: python tools/machine_code.py --write."""
    assert counts(compiled(name).cubin) == kept()[triton.__version__][name]


def test_every_chunk_begins_with_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over a chunk's units start where those before it ended, in what the compiler makes of them: all but the one
    of `gather_local`, which comes once. Triton 3.6 lost numbers that loops over chunks carried.
    """
    compile_it, found = triton.compile, []
    monkeypatch.setattr(
        triton, "compile", lambda *args, **kwargs: found.append(compile_it(*args, **kwargs)) or found[0]
    )
    compiled("four chunks of 512, 9/3 heads of 64")
    starts = re.findall(r"scf\.for %this\w* = (%\w+) to", found[0].asm["ttgir"])
    assert len(starts) == 6  # of the phases
    assert starts.count("%program") == 1
