"""Models as Hugging Face folders, of the families that `lumi.formats.hf_family` names.

What reads a folder also takes a checkpoint of a run (`lumi.formats.checkpoint_folder`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumi.config import UserError, read_json, write_json
from lumi.formats.checkpoint_folder import find_tokenizer, is_checkpoint, open_folder, tokenizer_folder
from lumi.formats.gguf_file import is_gguf
from lumi.formats.hf_config import from_hf_config, save_tokenizer, to_hf_config
from lumi.host.provenance import Parent, record_files, write_provenance
from lumi.host.storage import MissingError, atomic_folder, sha256_file
from lumi.host.tensor_files import save_tensors
from lumi.kernels.bundle import Ops
from lumi.kernels.rope import rope_table
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.files import MODEL_FILE, read_ends
from lumi.tokenizer.loading import has_tokenizer, load_tokenizer
from lumi.tokenizer.tokenizer import Tokenizer

_NAMES = {  # ours -> theirs, in this order
    "token_embedding.": "model.embed_tokens.",
    "final_norm.": "model.norm.",
    "attention_norm.": "input_layernorm.",
    "mlp_norm.": "post_attention_layernorm.",
    "attention.": "self_attn.",
    "layers.": "model.layers.",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = {"F64", "F32", "F16", "BF16"}  # integers would be quantised weights


def save_model(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
    parents: Sequence[Parent] | None = None,
) -> None:
    """Write a model that is in memory; otherwise as `save_model_tensors`."""
    save_model_tensors(folder, model.config, model.state_dict(), tokenizer, dtype, max_shard_bytes, parents)


def save_model_tensors(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
    parents: Sequence[Parent] | None = None,
) -> None:
    """Write a folder that transformers and other readers of its format can load.

    Leaves `config.json`, `generation_config.json`, `model.safetensors`, the tokenizer's files and
    `provenance.json`. Replaces an older folder atomically.

    Args:
        tensors: by our names. Each is read once, so a mapping may produce them one at a time. Only the
            tensors of one file are in memory together.
        dtype: of the weights on disk, a key of `DTYPES`.
        max_shard_bytes: the most bytes of tensors in one file. Larger weights are cut into files named
            `model-00001-of-00003.safetensors` and so on, with an index; a larger tensor gets a file of its
            own. None: one file.
        parents: what the model was made from; None: that is not recorded.
    """
    with atomic_folder(folder, replace=True) as temporary:
        save_tokenizer(temporary, tokenizer)
        write_json(temporary / "config.json", to_hf_config(config, tokenizer, dtype))
        records = _save_weights(temporary, tensors, DTYPES[dtype], max_shard_bytes)
        write_provenance(temporary, "model", parents, record_files(temporary, records))


def _save_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int | None
) -> dict[str, dict[str, Any]]:
    """Write the weights file by file. The names hold the number of files, so they are given at the end.

    Returns the files' records by name.
    """
    parts: list[list[str]] = []
    records: list[dict[str, Any]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}
    for name in tensors:
        tensor = tensors[name].to(dtype)
        if shard and max_shard_bytes is not None and size + tensor.nbytes > max_shard_bytes:
            records.append(save_tensors(folder / f"part-{len(parts)}", shard))
            parts.append(list(shard))
            shard, size = {}, 0
        shard[hf_name(name)] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    records.append(save_tensors(folder / f"part-{len(parts)}", shard))
    parts.append(list(shard))
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [_WEIGHTS]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dict(zip(files, records, strict=True))


def model_folder(path: str | Path) -> Path:
    """The folder of a model: the path itself, or the `final/` of a run. Raises UserError without a model."""
    path = Path(path)
    if is_checkpoint(path):
        return path
    if is_gguf(path):
        remedy = f"`lumi export --model-path {path} --output-dir DIR` makes one"
        raise UserError(f"{path}:", "must be a model folder here", got="a GGUF file", remedy=remedy)
    if (path / "final").is_dir():
        return path / "final"
    if (path / "checkpoints").is_dir():
        remedy = "finish it with --resume-from-checkpoint auto, or pass one of its checkpoints/step-..."
        raise UserError(f"{path}: must be a finished run, but has no final/ yet", remedy=remedy)
    if not (path / "config.json").is_file():
        remedy = "pass a run folder, its final/, one of its checkpoints/step-..., or org/name on the hub"
        raise UserError(f"{path}: must be a model folder with a config.json", remedy=remedy)
    return path


def load_model(
    folder: str | Path,
    ops: Ops,
    compute_dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
) -> Transformer:
    """Read a folder of one of the families, ours or another program's, or a checkpoint of a whole model.

    Args:
        tokenizer: must be the one that the model was trained with. Our folders carry its fingerprint; in
            other folders its file is compared, if there is one.

    Raises:
        UserError: the folder holds no model, asks for something that our model does not compute (the error
            names the key), holds a tensor that the model has no place for or that contradicts another, or was
            trained with another tokenizer.
    """
    folder = model_folder(folder)
    shape = read_shape(folder)
    if tokenizer is not None:
        check_tokenizer(folder, shape.vocab_size, tokenizer)
    model = Transformer(shape, ops, compute_dtype=compute_dtype)
    if is_checkpoint(folder):
        open_folder(folder).weights().fill("model", dict(model.named_parameters()))
    else:
        _load_weights(folder, model)
    return model


def check_tokenizer(
    folder: Path, vocab_size: int, tokenizer: Tokenizer, *, may_extend: bool = False, remedy: str = ""
) -> None:
    """Raises UserError if the model was trained with another tokenizer, or has too few ids for it.

    Args:
        may_extend: the tokenizer may have more tokens than the one in the folder, as that of an adapter.
        remedy: what helps against another one; default: the folder's own.
    """
    if is_checkpoint(folder):
        expected = open_folder(folder).tokenizer_fingerprint
    else:
        expected = read_json(folder / "config.json").get("tokenizer_fingerprint")
        if expected is None and has_tokenizer(folder):
            expected = load_tokenizer(folder).fingerprint
    fits = expected in (None, tokenizer.fingerprint) or _is_file_of(expected, folder, tokenizer)
    if not fits and may_extend:
        fits = tokenizer.extends(
            load_tokenizer(tokenizer_folder(folder) if is_checkpoint(folder) else folder)
        )
    if not fits:
        raise UserError(
            f"{folder}: the tokenizer",
            f"must be the one it was trained with, of fingerprint {expected}",
            got=tokenizer.fingerprint,
            remedy=remedy or tokenizer_remedy(folder),
        )
    if tokenizer.vocab_size > vocab_size:
        files = "tokenizer.json, tokenizer_config.json and added_tokens.json"
        remedy = f"remove tokens that the model does not know from {files}"
        raise UserError(
            f"{folder}: the tokenizer",
            f"must have at most the model's {vocab_size} ids",
            got=tokenizer.vocab_size,
            remedy=f"{remedy}, or pass another --tokenizer-path",
        )


def _is_file_of(expected: str, folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether the fingerprint is the hash of the folder's `tokenizer.model`, as it was before for imports."""
    file = folder / MODEL_FILE
    is_hash = file.is_file() and sha256_file(file) == expected
    return is_hash and load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def tokenizer_remedy(folder: Path) -> str:
    """What helps where another tokenizer than a folder's was given. A checkpoint's lies in its run."""
    return "leave --tokenizer-path out" if is_checkpoint(folder) else f"pass --tokenizer-path {folder}"


def _load_weights(folder: Path, model: Transformer) -> None:
    """Compare every name, shape and dtype, then copy the weights into the model, one tensor at a time."""
    expected = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    places, shapes = _places(folder)
    for name, tensor in expected.items():
        if shapes.get(name) != tuple(tensor.shape):
            got = shapes.get(name, "nothing")
            raise UserError(f"{folder}: {name}", f"must have shape {tuple(tensor.shape)}", got=got)
    others = sorted(places.keys() - expected.keys())
    if unknown := [name for name in others if not _is_redundant(name, model.config.tied_embeddings)]:
        fault = "holds a weight that this model has no place for"
        raise UserError(f"{folder}: {fault}: {unknown[0]} ({len(unknown)} in all)")
    for file in sorted(set(places.values())):
        with open_tensors(file) as tensors, torch.no_grad():
            for name in (name for name, place in places.items() if place == file and name in expected):
                expected[name].copy_(tensors.get_tensor(name))
    for name in others:
        with open_tensors(places[name]) as tensors:
            _check_redundant(f"{places[name]}: {name}", tensors.get_tensor(name), model)


def _is_redundant(name: str, tied: bool) -> bool:
    """Whether a tensor says what others say: some writers repeat the tied embedding, old ones store the
    rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied)


def _check_redundant(what: str, tensor: Tensor, model: Transformer) -> None:
    """Raises UserError if a redundant tensor contradicts the weights or the config."""
    config = model.config
    if what.endswith("lm_head.weight"):
        weight = model.token_embedding.weight
        if not torch.equal(tensor.to(weight.dtype), weight):
            remedy = "set tie_word_embeddings to false in config.json, or take it out"
            raise UserError(what, "must be the embedding, to which it is tied", got="another", remedy=remedy)
        return
    turned = torch.ones(1, 1, dtype=torch.int64)
    for scaling in {None, config.rope_scaling}:  # old writers stored them without the scaling
        cos, sin = rope_table(turned, config.head_dim, config.rope_theta, scaling)
        frequencies = torch.atan2(sin, cos)[0, 0, : config.head_dim // 2]
        if tensor.shape == frequencies.shape and torch.allclose(tensor.float(), frequencies, 0.01, 1e-7):
            return
    raise UserError(what, "must be the frequencies of config.json", got="others", remedy="mend rope_theta")


def _places(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """The file and the shape of each weight of a folder, by transformers' names."""
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        for name, shape in _shapes(file).items():
            if name in places:
                files = f"{places[name].name} and {file.name}"
                raise UserError(f"{folder}: {name}", "must be in one file", got=files)
            places[name], shapes[name] = file, shape
    return places, shapes


def weights_in_order(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, one at a time, by transformers' names and in the order of these.

    Raises UserError as `load_model`.
    """
    folder = model_folder(folder)
    if is_checkpoint(folder):
        tensors = open_folder(folder).weights().tensors("model")
        for name in sorted(tensors, key=hf_name):
            yield hf_name(name), tensors[name]
        return
    (places, _), tied = _places(folder), read_shape(folder).tied_embeddings
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(open_tensors(file)) for file in set(places.values())}
        for name in sorted(name for name in places if not _is_redundant(name, tied)):
            yield name, opened[places[name]].get_tensor(name)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name. Raises UserError if one is not of a floating-point dtype."""
    shapes = {}
    with open_tensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
            view = tensors.get_slice(name)
            if view.get_dtype() not in _READABLE:
                got = f"{view.get_dtype()}: quantised weights?"
                raise UserError(f"{file}: {name}", f"must be of {', '.join(sorted(_READABLE))}", got=got)
            shapes[name] = tuple(view.get_shape())
    return shapes


def weight_files(folder: Path) -> Sequence[Path]:
    """The files of the weights in a model folder. Raises UserError if one is missing, or named out of it."""
    if (folder / _WEIGHTS).is_file() or not (folder / INDEX).is_file():
        names = [_WEIGHTS]
    else:
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            expectation = "must hold a weight_map of weights and their files"
            raise UserError(f"{folder / INDEX}:", expectation, got="none", remedy="copy it again")
        names = sorted(map(str, set(weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):  # a path could lead anywhere
            expectation = "must name safetensors files beside it"
            raise UserError(
                f"{folder / INDEX}:", expectation, got=repr(name), remedy="do not use this folder"
            )
        if not (folder / name).is_file():
            why = f"{INDEX} names it; copy the whole folder"
            if names == [_WEIGHTS]:
                why = "only safetensors weights are read (no pickle)"
            raise MissingError(f"{folder / name}: is missing; {why}")
    return [folder / name for name in names]


def open_tensors(file: Path) -> Any:
    """Open a safetensors file, as a context manager. Raises UserError for any other file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: must be a safetensors file: {error}") from error


def hf_name(name: str) -> str:
    """Our parameter name in transformers' spelling."""
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def ends_of(folder: Path) -> tuple[int, ...]:
    """The ids that end a text by a model's `generation_config.json`; that of a checkpoint is in its run."""
    place = find_tokenizer(folder) if is_checkpoint(folder) else folder
    return () if place is None else read_ends(place)


def read_shape(folder: str | Path) -> ModelConfig:
    """The shape of the model in a folder. Raises UserError as `load_model`."""
    folder = model_folder(folder)
    if is_checkpoint(folder):
        return open_folder(folder).shape
    path = folder / "config.json"
    return from_hf_config(read_json(path), str(path))
