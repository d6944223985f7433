"""The live line of every long stage."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, unit: str, **options: Any) -> tqdm:
    """A live line on stderr, updated twice a second on a terminal, four times a minute in a log file.

    Args:
        options: tqdm's own.
    """
    interval = 0.5 if sys.stderr.isatty() else 15.0
    options |= {"mininterval": interval, "maxinterval": interval, "dynamic_ncols": True}
    return tqdm(desc=description, unit=unit, **options)
