"""Adapters as PEFT's folders: `adapter_config.json`, `adapter_model.safetensors` and the tokenizer's files.

The metadata of the safetensors file name the adapter's base and tokenizer. PEFT ignores them. What reads a
folder also takes a checkpoint of a run that trains adapters.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lumi.config import UserError, write_json
from lumi.formats.checkpoint_folder import CheckpointFolder, is_checkpoint, open_folder
from lumi.formats.fingerprint import is_fingerprint_of
from lumi.formats.hf_config import save_tokenizer
from lumi.formats.hf_format import DTYPES, hf_name, open_tensors, tokenizer_remedy
from lumi.formats.hub import hub_model, local_folder
from lumi.formats.peft_config import (
    BASE,
    CONFIG,
    REVISION,
    PeftConfig,
    from_peft_config,
    read_config,
    to_peft_config,
)
from lumi.host.provenance import Parent, record_files, write_provenance
from lumi.host.storage import atomic_folder
from lumi.host.tensor_files import load_tensors, save_tensors
from lumi.model.lora import (
    ALL_LINEAR,
    LoraConfig,
    adapters,
    find_targets,
    replace_token_matrices,
    token_matrices,
    trained_rows,
    trained_tensors,
    wrap,
)
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {  # theirs -> ours
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
_ROWS = "token_adapter.trainable_tokens_delta"
_COPIES = (".original_module.", ".modules_to_save.")  # beside the tensor that PEFT loads
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def save_adapter(
    folder: str | Path,
    model: Transformer,
    config: LoraConfig,
    tokenizer: Tokenizer,
    base: str | Path,
    base_fingerprint: str,
    values: Mapping[str, Tensor] | None = None,
    parents: Sequence[Parent] | None = None,
) -> None:
    """Write the adapters of a model, and its tokenizer. Replaces an older folder atomically.

    Args:
        base: the folder of the model under the adapters.
        base_fingerprint: `weights_fingerprint` of that folder when the model was loaded.
        values: the values of the adapters' parameters, by the model's names; None: those in the model.
        parents: what the adapter was made from; None: that is not recorded.
    """
    tensors = _parameters(model)
    if values is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {key: values[names[id(parameter)]] for key, parameter in tensors.items()}
    tensors = {f"{_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    row_ids = {}
    for name, matrix in token_matrices(model).items():
        if (rows := trained_rows(matrix)) is not None:
            row_ids[hf_name(f"{name}.").split(".")[-2]] = rows.ids.tolist()
    metadata = {"base_fingerprint": base_fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    with atomic_folder(folder, replace=True) as temporary:
        save_tokenizer(temporary, tokenizer)
        write_json(temporary / CONFIG, to_peft_config(config, _targets(model), base, row_ids))
        records = {WEIGHTS: save_tensors(temporary / WEIGHTS, tensors, metadata)}
        write_provenance(temporary, "adapter", parents, record_files(temporary, records))


def _targets(model: Transformer) -> list[str]:
    """The adapted linears as PEFT finds them: `q_proj` if every layer's is adapted, else the whole name."""
    adapted = {name: name.rpartition(".")[2] for name, _ in adapters(model)}
    everywhere = {end for end in adapted.values() if adapted.keys() >= set(find_targets(model, [end]))}
    return sorted(everywhere | {hf_name(name) for name, end in adapted.items() if end not in everywhere})


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter. Raises UserError for a damaged checkpoint."""
    if is_checkpoint(folder):
        return open_folder(folder).lora is not None
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> Path:
    """The folder of an adapter's base model, which may come from the hub.

    Raises UserError if the adapter names none, or it has gone.
    """
    base = named_base(folder)
    if base is not None and hub_model(base) is not None:
        return local_folder(base)
    if base is None or not ((Path(base) / "config.json").is_file() or is_checkpoint(base)):
        named = f"names {base}, where there is no model now" if base else "does not name its base"
        both = "the base by --model-path, this by --adapter-path (merge: --base-path, --model-path)"
        raise UserError(f"{folder}: the adapter {named}", remedy=f"pass both: {both}")
    return Path(base)


def named_base(folder: str | Path) -> str | None:
    """What an adapter calls its base: a path, or `org/name@revision` on the hub; None: it names none."""
    if is_checkpoint(folder):
        return open_folder(folder).base
    config = read_config(Path(folder))
    base, revision = config.get(BASE), config.get(REVISION)
    if not isinstance(base, str) or not base:
        return None
    return f"{base}@{revision}" if revision and hub_model(f"{base}@{revision}") is not None else base


def adapted_vocab_size(folder: str | Path) -> int | None:
    """The number of token ids of a model with an adapter; None where the adapter leaves it as it is."""
    if is_checkpoint(folder) or not (file := Path(folder) / WEIGHTS).is_file():
        return None
    with open_tensors(file) as opened:
        found = {_plain_name(key): key for key in opened.keys()}  # noqa: SIM118 (it is no dictionary)
        if _EMBEDDING not in found:
            return None
        return int(opened.get_slice(found[_EMBEDDING]).get_shape()[0])


def load_adapter(
    folder: str | Path, model: Transformer, base: str | Path, tokenizer: Tokenizer
) -> LoraConfig:
    """Put an adapter, ours or PEFT's, on a model, in place.

    Matrices that the adapter brings whole take the place of the model's. There may be more or fewer token ids
    afterwards, and matrices of tokens that were tied are no longer, if the adapter brings different ones.

    Args:
        base: the folder that `model` was loaded from. Refused where the adapter was trained on other weights.
        tokenizer: refused where the adapter was trained with another one.

    Returns:
        The adapter's config.

    Raises:
        UserError: the folder holds no adapter, one that computes what ours do not, or one that does not fit
            the model.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return _load_checkpoint(open_folder(folder), model, base, tokenizer)
    config, file = from_peft_config(folder), folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: is missing; only safetensors weights are read (no pickle)")
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
    fingerprints = (metadata.get(f"{what}_fingerprint") for what in ("base", "tokenizer"))
    _check_fingerprints(folder, base, tokenizer, *fingerprints)
    tensors = _read_tensors(file)
    _take_whole(tensors, model, config, file)
    linears = {
        f"{hf_name(f'{name}.')}{part}": name for name in find_targets(model, ALL_LINEAR) for part in _PARTS
    }
    adapted = sorted({linears[key] for key in tensors if key in linears})
    if not adapted:
        raise UserError(f"{file}:", "must hold adapters of the model's linears", got="none")
    wrap(model, adapted, config.lora, config.token_ids(model), config.of_linears(adapted))
    _fill(_parameters(model), tensors, file)
    return config.lora


def _load_checkpoint(
    opened: CheckpointFolder, model: Transformer, base: str | Path, tokenizer: Tokenizer
) -> LoraConfig:
    lora, folder = opened.lora, opened.checkpoint.path
    assert lora is not None
    _check_fingerprints(folder, base, tokenizer, opened.base_fingerprint, opened.tokenizer_fingerprint)
    wrap(model, find_targets(model, lora.targets), lora, lora.token_ids(tokenizer.control_ids))
    opened.weights().fill("model", trained_tensors(model))
    return lora


def _take_whole(tensors: dict[str, Tensor], model: Transformer, config: PeftConfig, file: Path) -> None:
    """Move the matrices that an adapter brings whole from its tensors into the model.

    Raises:
        UserError: one is missing or has another shape, or there are rows for some matrices of tokens alone.
    """
    weights = {hf_name(name): parameter for name, parameter in model.named_parameters()}
    for key in config.saved_weights([*weights, *({_OUTPUT} - weights.keys())]):
        if key not in tensors:
            raise UserError(f"{file}: {key}", "must be in the file, by modules_to_save", got="nothing")
    embedding, output = tensors.pop(_EMBEDDING, None), tensors.pop(_OUTPUT, None)
    if embedding is not None or output is not None:
        _take_token_matrices(embedding, output, model, file)
    rows, repeated = tensors.get(f"model.embed_tokens.{_ROWS}"), tensors.get(f"lm_head.{_ROWS}")
    if model.lm_head is None and rows is not None and repeated is not None and torch.equal(rows, repeated):
        del tensors[f"lm_head.{_ROWS}"]
    whole = {key: parameter for key, parameter in weights.items() if key in tensors}
    _fill(whole, {key: tensors.pop(key) for key in whole}, file)


def _take_token_matrices(
    embedding: Tensor | None, output: Tensor | None, model: Transformer, file: Path
) -> None:
    """Matrices of tokens as PEFT has them: each replaces its own, so two that were tied may differ then."""
    old_output = model.output_weight.detach()
    embedding = model.token_embedding.weight.detach() if embedding is None else embedding.float()
    output = old_output if output is None else output.float()
    expected, in_base = (len(embedding), model.config.model_dim), model.config.vocab_size
    for key, matrix in ((_EMBEDDING, embedding), (_OUTPUT, output)):
        if tuple(matrix.shape) != expected:
            expectation = f"must have shape {expected}, as the embedding has"
            got = f"{tuple(matrix.shape)}; the base has {in_base} token ids"
            remedy = "save the adapter with both matrices (PEFT: save_embedding_layers=True)"
            raise UserError(f"{file}: {key}", expectation, got=got, remedy=remedy)
    tied = model.lm_head is None and torch.equal(embedding, output)
    replace_token_matrices(model, embedding, None if tied else output)


def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Set parameters to an adapter's tensors of the same names. Raises UserError where these do not fit."""
    for key in [*parameters, *tensors]:
        shape = tuple(tensors[key].shape) if key in tensors else "nothing"
        if key not in parameters:
            hint = " (the loss is fused with lm_head)" if key.startswith("lm_head.") else ""
            expectation = f"must have a place in the model by {CONFIG}"
            got = f"one of shape {shape} that has none{hint}"
            raise UserError(f"{file}: {key}", expectation, got=got)
        if shape != (expected := tuple(parameters[key].shape)):
            expectation = f"must have shape {expected} by {CONFIG} and the model"
            raise UserError(f"{file}: {key}", expectation, got=shape)
    for key, parameter in parameters.items():
        parameter.data = tensors[key].float().to(parameter.device)


def _check_fingerprints(
    folder: Path, base: str | Path, tokenizer: Tokenizer, of_base: str | None, of_tokenizer: str | None
) -> None:
    """Raises UserError where an adapter names another base or tokenizer. PEFT's name none."""
    trained_with = "must be the one that the adapter was trained with, of fingerprint"
    if of_base is not None and not is_fingerprint_of(of_base, base):
        got = f"other weights in {base}"
        both = "that base by --model-path, this by --adapter-path (merge: --base-path, --model-path)"
        remedy = f"pass both: {both}"
        raise UserError(f"{folder}: the base", f"{trained_with} {of_base}", got=got, remedy=remedy)
    if of_tokenizer not in (None, tokenizer.fingerprint):
        got, remedy = tokenizer.fingerprint, tokenizer_remedy(folder)
        raise UserError(f"{folder}: the tokenizer", f"{trained_with} {of_tokenizer}", got=got, remedy=remedy)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """An adapter's tensors, by PEFT's names without its prefix. Raises UserError if one is not finite."""
    tensors = {_plain_name(key): tensor for key, tensor in load_tensors(file).items()}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values() or not tensor.isfinite().all():
            fault = "it is damaged, or quantised, which is not supported"
            raise UserError(f"{file}: {key}", f"must hold finite {', '.join(DTYPES)}", remedy=fault)
    tensors.pop("", None)
    return tensors


def _plain_name(key: str) -> str:
    """PEFT's name of a tensor without its prefixes and wrappers; "" for what it saves and does not use."""
    key = key.removeprefix(_PREFIX)
    if any(copy in key for copy in _COPIES):
        return ""
    return key.replace(".token_adapter.base_layer.", ".")


def _parameters(model: Transformer) -> dict[str, Tensor]:
    """The parameters of an adapter, by PEFT's names without its prefix."""
    found = {}
    for name, module in adapters(model):
        for theirs, ours in _PARTS.items():
            if (parameter := getattr(module, ours)) is not None:
                found[f"{hf_name(f'{name}.')}{theirs}"] = parameter
    for name, matrix in token_matrices(model).items():
        if (rows := trained_rows(matrix)) is not None:
            found[f"{hf_name(f'{name}.')}{_ROWS}"] = rows.rows
    return found
