"""The state of torch that belongs to the caller: the engine neither depends on it nor changes it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import torch
from torch.utils._contextlib import _DecoratorContextManager

from minirea.errors import memory_limit_of
from minirea.threads import limited_to

_computed_in = 0  # the process in which several threads have computed first


def num_threads() -> int:
    """How many of the CPU's threads compute: torch's, or one in a process that was forked after several have computed.

    Those threads have stayed behind, and GNU's OpenMP would wait for them without end.
    """
    global _computed_in
    threads, here = torch.get_num_threads(), os.getpid()
    if threads > 1 and not _computed_in:
        _computed_in = here
    return threads if _computed_in in (0, here) else 1


class isolated(_DecoratorContextManager):  # noqa: N801  used as torch.inference_mode is
    """Inference mode, no autocast, `num_threads`, and factories that make tensors on the CPU unless given a device.

    As a decorator of a generator function it is left while the generator waits, so that the caller's loop runs in the
    caller's state. The default dtype belongs to the process, and changing it would be seen by other threads: the engine
    names every dtype instead.

    Raises:
        MemoryLimitError: for whatever a library raises inside where an allocation fails.
    """

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        if sys.is_finalizing():  # a stream that was never closed ends with the process, where torch cannot import
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for device_type in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            if num_threads() < torch.get_num_threads():
                stack.enter_context(limited_to(1))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            self._stack = stack.pop_all()

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self._stack.close()
        if isinstance(error, Exception) and (limit := memory_limit_of(error)) is not None:
            raise limit from error
