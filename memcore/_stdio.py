"""Commands whose reader may go away first, as in `memcore doctor | head -3`."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

__all__ = ["BROKEN_PIPE", "quiet_pipe"]

BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE


def quiet_pipe(main: Callable[..., int]) -> Callable[..., int]:
    """`main`, which ends without a word and returns 141 when stdout or stderr is a pipe that nobody reads any more."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:  # now, not when the interpreter ends: there it would be told
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
        except BrokenPipeError:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except BrokenPipeError:  # what it still holds goes nowhere
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, stream.fileno())
                    os.close(null)
            return BROKEN_PIPE

    return run
