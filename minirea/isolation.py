"""The state of torch that belongs to the caller: the engine neither depends on it nor changes it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch.utils._contextlib import _DecoratorContextManager

from minirea.errors import memory_limit_of


class isolated(_DecoratorContextManager):  # noqa: N801  used as torch.inference_mode is
    """Inference mode, no autocast, and factories that make tensors on the CPU unless they are given a device.

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
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            self._stack = stack.pop_all()

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self._stack.close()
        if isinstance(error, Exception) and (limit := memory_limit_of(error)) is not None:
            raise limit from error
