from pathlib import Path

import pytest

from lumi.corpus import HubDataset, JsonlFiles
from lumi.evaluation.contamination import Decontamination, find_decontamination, warn

ARC, PIQA = HubDataset(dataset="arc"), HubDataset(dataset="piqa")
CLEAN = {"evaluation_sets": [{"name": "any name", "content": ["hub: arc / validation"]}]}
OLD = {"documents": 3}  # of an earlier version
A, B = Path("a"), Path("b")


@pytest.mark.parametrize(
    ("trained_on", "expected"),
    [
        ({}, Decontamination(None)),
        ({A: None}, Decontamination(None)),
        ({A: CLEAN}, Decontamination(True)),
        ({A: CLEAN, B: None}, Decontamination(None)),
        ({A: CLEAN, B: OLD}, Decontamination(False, [B])),
        ({A: None, B: OLD}, Decontamination(False, [B])),  # one is enough to know it
        ({A: OLD, B: OLD}, Decontamination(False, [A, B])),
    ],
)
def test_what_is_known(trained_on, expected):
    assert find_decontamination(ARC, trained_on) == expected


def test_another_task_is_another_one():
    assert find_decontamination(PIQA, {A: CLEAN}) == Decontamination(False, [A])


def test_files_are_not_read_where_nothing_is_known():
    assert find_decontamination(JsonlFiles(paths=("nowhere",)), {A: None}) == Decontamination(None)


def test_one_line_warns_of_all(capsys):
    warn([("arc", Decontamination(False, [A])), ("sciq", Decontamination(True)), ("piqa", Decontamination())])
    line = capsys.readouterr().err
    assert line.startswith("lumi: warning: the model was trained on a, not decontaminated against arc: if ")
    assert line.count("\n") == 1
    warn([("arc", Decontamination(False, [A, B])), ("piqa", Decontamination(False, [B]))])
    assert "trained on a, b, not decontaminated against arc, piqa: " in capsys.readouterr().err
    warn([("sciq", Decontamination(True)), ("piqa", Decontamination())])
    assert capsys.readouterr().err == ""
