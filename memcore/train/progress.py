"""A progress bar on stderr: tqdm's on a terminal that has it, plain lines otherwise."""

import sys
import time
from typing import Any

__all__ = ["Progress"]

LINE_SECONDS = 10.0


class Progress:
    """Counts updates; shows loss, wrong bits and sequences per second at each row of the learning curve."""

    unit = "update"

    def __init__(self, total: int, done: int, batch_size: int, show: bool) -> None:
        self.total, self.done, self.batch_size, self.show = total, done, batch_size, show
        self.bar = None
        self.began, self.first, self.printed = time.perf_counter(), done, 0.0
        if show and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=done, unit=self.unit, dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)

    def row(self, row: dict[str, Any]) -> None:
        if not self.show:
            return
        now = time.perf_counter()
        text = self.text(row, (self.done - self.first) * self.batch_size / max(now - self.began, 1e-9))
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        elif now - self.printed >= LINE_SECONDS or self.done >= self.total:
            self.printed = now
            print(f"{self.unit} {self.done:,} of {self.total:,}: {text}", file=sys.stderr, flush=True)

    def text(self, row: dict[str, Any], rate: float) -> str:
        """What is shown of a row."""
        wrong = f", wrong bits {100 * row['wrong_bits']:.2f} %" if "wrong_bits" in row else ""
        return f"loss {row['loss']:.3f}{wrong}, {rate:,.0f} sequences/s"
