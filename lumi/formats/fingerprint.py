"""What identifies the weights under an adapter, whatever files they are saved in."""

import hashlib
import json
from pathlib import Path

import torch

from lumi.formats.hf_format import weights_in_order
from lumi.host.storage import sha256_file


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the name, the shape and the values of each weight, in the order of their names.

    Files, their order and what else is in them make no difference. Values count as float32: bfloat16 weights
    that are saved again in float32 stay the same base, float32 weights that are rounded become another one.
    One weight at a time is in memory.

    Raises:
        UserError: the folder holds no model.
    """
    digest = hashlib.sha256()
    for name, tensor in weights_in_order(folder):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.float().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_fingerprint_of(fingerprint: str, folder: str | Path) -> bool:
    """Whether a folder holds the weights of a fingerprint, as Lumi computes it now or did at first."""
    return fingerprint == weights_fingerprint(folder) or fingerprint == _fingerprint_of_files(folder)


def _fingerprint_of_files(folder: str | Path) -> str:
    """As the first version computed it: over the hashes of the files, in the order of their names."""
    digests = "".join(sha256_file(path) for path in sorted(Path(folder).glob("*.safetensors")))
    return hashlib.sha256(digests.encode()).hexdigest()
