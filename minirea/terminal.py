"""The streams of the `minirea` command, and what Ctrl-C does to it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

from minirea.errors import InputError

EXIT_INTERRUPTED: Final = 130


class Interrupts:
    """Ctrl-C for a process of its own, which ends with status 130 wherever it is.

    Python's KeyboardInterrupt appears between any two instructions: in an import it turns into an ImportError, while
    threads compute into an abort, and a second one leaves half of what the first one wanted to finish. So the signal
    ends the process here, after `finish`. While tokens are sampled it is only noted, and the loop looks at `pending`
    after every token; a second one does not wait for that.

    Once everything is imported, a program that has something to clear up sets `raises` and gets KeyboardInterrupt.

    An object that has not taken over leaves the process its handler, and never has anything pending.
    """

    def __init__(self) -> None:
        self.finish: Callable[[], None] = lambda: None
        self.pending = False
        self.raises = False
        self._deferred = False
        self._took_over = False

    def take_over(self) -> None:
        """Handle the signal from now on, unless the process was started to ignore it."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
            self._took_over = True

    def defer(self) -> None:
        """From now on the program looks at `pending` by itself."""
        self._deferred = True

    def resume(self) -> None:
        """The end of that, and of what was pending."""
        self._deferred = self.pending = False

    def ignore(self) -> None:
        """From now on all that is left is to print what there is."""
        if self._took_over:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, *_: Any) -> None:
        if self._deferred and not self.pending:
            self.pending = True
            return
        if self.raises:
            raise KeyboardInterrupt
        self.ignore()
        self.finish()
        os._exit(EXIT_INTERRUPTED)


def open_streams() -> None:
    """Make the process's standard streams ones that can be written to, or whose absence is seen.

    A closed descriptor would be the next file's, whose writer or reader would then be a stream's. What cannot be
    written to standard error is dropped: it must not end a run whose output goes elsewhere.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    encoding = sys.stderr.encoding if sys.stderr is not None else "utf-8"
    raw = io.FileIO(2, "w", closefd=False)
    sys.stderr = _Forgiving(raw, encoding, "backslashreplace", line_buffering=True, write_through=True)  # type: ignore[arg-type]


class _Forgiving(io.TextIOWrapper):
    """A text stream that drops what cannot be written."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def put(text: str) -> None:
    """Write to standard output, at once. What its encoding lacks appears as Python escapes it.

    Raises:
        BrokenPipeError: its reader has closed it.
        InputError: it is closed, or cannot be written to.
    """
    stream = sys.stdout
    if stream is None:
        raise InputError("standard output is closed")
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise InputError(f"standard output: cannot be written: {error.strerror}") from None


def say(text: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def put_now(text: str) -> None:
    """Write to standard output from a signal's handler, where the stream itself may be in the middle of a write."""
    data = text.encode()
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


def discard_output() -> None:
    """Send what standard output still holds nowhere, so that closing it fails no second time."""
    with contextlib.suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
