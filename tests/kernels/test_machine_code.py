"""What the fused kernels compile to for Hopper, compared with a table in the repository; no GPU is needed."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")

from machine_code import CUOBJDUMP, SHAPES, compiled, counts, kept  # noqa: E402  (which imports triton)

pytestmark = [
    pytest.mark.skipif(triton.__version__ not in kept(), reason=f"no counts are kept for Triton {triton.__version__}"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton comes without cuobjdump"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"),
]


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_table(name: str) -> None:
    """If a change is meant: python tools/machine_code.py --write."""
    assert counts(compiled(SHAPES[name]).cubin) == kept()[triton.__version__][name]
