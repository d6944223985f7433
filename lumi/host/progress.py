"""The live line of every long step."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(description: str, unit: str, **options: Any) -> tqdm:
    """A live line on stderr: twice a second on a terminal, four times a minute in a log file. `options` are tqdm's."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        desc=description, unit=unit, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options
    )
