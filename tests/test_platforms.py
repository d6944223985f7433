"""macOS and Windows, as far as this machine can play them: all imports, and a training on plain torch."""

import sys
from pathlib import Path

import pytest
from runs import launch, losses

SCRIPT = Path(__file__).parent / "processes" / "platform_processes.py"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_all_of_lumi_imports_and_it_trains(system, command, tmp_path):
    arguments = command("run", num_steps=6, validate_every=6, save_every=6)[2:]
    printed = launch([sys.executable, SCRIPT, system, *arguments]).stdout
    assert int(printed.split()[0]) > 200
    assert "reference kernels; Lumi is installed without compiled ones" in printed
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
