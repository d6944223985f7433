"""Where processes meet; `group_processes.py` is what runs in several of them."""

import os

import pytest
from case_server import run_case


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_no_start_meets_the_words_of_an_earlier_one(tmp_path):
    """Five starts of 2 and 3 processes on one store, after a start that was killed while it waited."""
    run_case("group_processes", "starts", tmp_path, log=tmp_path / "log")
