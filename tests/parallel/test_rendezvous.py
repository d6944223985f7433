"""Where processes meet; `group_processes.py` is what runs in several of them."""

import sys
from pathlib import Path

from runs import launch


def test_no_start_meets_the_words_of_an_earlier_one(tmp_path):
    """Five starts of 2 and 3 processes on one store, after one whose processes were killed while they waited for the last."""
    launch(
        [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).parents[1] / "processes" / "group_processes.py"),
            "starts",
            str(tmp_path),
        ]
    )
