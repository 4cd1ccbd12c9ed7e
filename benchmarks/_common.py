"""What the benchmark scripts share: best-of-n timing, peak memory, growth, JSON."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def best_of(
    repeat: int, function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Seconds of the fastest of `repeat` calls, and its result.

    `clock=time.process_time` counts this process's CPU seconds: for code on one core, where other
    programs share the machine.
    """
    best, result = math.inf, None
    for _ in range(repeat):
        start = clock()
        result = function()
        best = min(best, clock() - start)
    return best, result


def peak_mb(process: int | str = "self") -> float:
    """Largest resident memory of this process, or of another by its number, so far, MB.

    Raises OSError if the other one has ended.
    """
    status = Path(f"/proc/{process}/status")
    if process != "self" or status.exists():
        # Linux's `ru_maxrss` of a new program begins with what the program that started it had.
        line = next(n for n in status.read_text().splitlines() if n.startswith("VmHWM:"))
        return round(int(line.split()[1]) * 1.024e-3, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def growth(sizes: list[int], seconds: list[float]) -> float:
    """Exponent p of seconds ~ size ** p, from the smallest and the largest size."""
    return round(math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0]), 2)


def report(figures: dict[str, Any]) -> None:
    """Print the figures as JSON, with the peak memory."""
    print(json.dumps({**figures, "peak_mb": peak_mb()}, indent=2))
