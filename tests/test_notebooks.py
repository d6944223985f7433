"""The notebooks run from their first cell to their last, and lie in git without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@each
def test_it_is_clean(path):
    code = cells(path, "code")
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"


@each
def test_it_runs(path, tmp_path):
    """Its cells in plain Python: there are none of Jupyter's own commands in them."""
    program = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    check = """
losses = [record["loss"] for record in records if record["kind"] == "train"]
assert len(losses) == config.num_steps
print("loss", losses[0], losses[-1])
plt.savefig("loss.png")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program + check]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = map(float, re.search(r"^loss (\S+) (\S+)$", done.stdout, re.MULTILINE).groups())
    assert last < first - 1
    assert "\nThe for statement" in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 5_000
