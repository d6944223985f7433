"""Was a model trained on corpora that were decontaminated against what is measured?"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lumi.corpus.evaluation_sets import content_of, is_against
from lumi.corpus.folder import Manifest
from lumi.corpus.sources import Location

# What a model was trained on: the manifest of each corpus, by its folder. None: what was read there, or what
# was made there from it, is not known.
TrainedOn = Mapping[Path, Manifest | None]


class Decontamination(NamedTuple):
    """What is known of a task or a text.

    Attributes:
        value: whether all corpora were decontaminated against it; None: that is not known.
        without: the corpora that were not.
    """

    value: bool | None = None
    without: Sequence[Path] = ()


def find_decontamination(location: Location, trained_on: TrainedOn) -> Decontamination:
    """Compare what is measured with the evaluation sets of all corpora, by content and not by name.

    Raises:
        UserError: a path of the location matches no file.
    """
    content = content_of(location) if any(trained_on.values()) else []
    without = [
        folder
        for folder, manifest in trained_on.items()
        if manifest is not None and not is_against(manifest, content)
    ]
    if without:
        return Decontamination(False, without)
    return Decontamination(None if not trained_on or None in trained_on.values() else True)


def warn(found: Sequence[tuple[str, Decontamination]]) -> None:
    """Name in one line on stderr all tasks and texts that a corpus was not decontaminated against."""
    names = dict.fromkeys(name for name, each in found if each.without)
    folders = dict.fromkeys(str(folder) for _, each in found for folder in each.without)
    if names:
        print(
            f"lumi: warning: the model was trained on {', '.join(folders)}, not decontaminated against"
            f" {', '.join(names)}: if their text is in there, the figures are too good"
            " (key `decontamination` of lumi prepare)",
            file=sys.stderr,
        )
