"""Rotary parameters in transformers' `config.json`, written from our config and read into it."""

import dataclasses
from typing import Any

from lumi.config import UserError
from lumi.kernels.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
ROPE_TYPES = ("default", *_SCALINGS)
_POSITIONS = "original_max_position_embeddings"


def to_hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The older key `rope_scaling`. `rope_parameters` holds it and `rope_theta`."""
    if scaling is None:
        return None
    values = {theirs: getattr(scaling, ours) for ours, theirs in _names(type(scaling)).items()}
    return {"rope_type": scaling.kind} | values


def read_rope(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary parameters of a config. `rope_scaling`, the older key, may repeat them but not differ."""
    older = data.get("rope_scaling")
    rope = data.get("rope_parameters") or older or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters", "must be an object", got=repr(rope))
    if older is None:
        return rope
    if not isinstance(older, dict) or rope_type(older) != rope_type(rope) or _contradict(rope, older):
        keys = f"{where}: rope_parameters and rope_scaling"
        raise UserError(keys, "must say the same", got=f"{rope} and {older}", remedy="take one out")
    return rope


def rope_type(rope: dict[str, Any]) -> Any:
    """The name of what is done to the frequencies."""
    return rope.get("rope_type", rope.get("type", "default"))


def _contradict(rope: dict[str, Any], older: dict[str, Any]) -> bool:
    return any(rope.get(key) != value for key, value in older.items() if key not in ("type", "rope_type"))


def from_hf_scaling(rope: dict[str, Any], data: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Our `rope_scaling` from the rotary parameters `rope` of a config, as plain values.

    Raises:
        UserError: a key of the type is missing, or there is one that the type does not have.
    """
    kind = rope_type(rope)
    cls = _SCALINGS.get(kind)
    names = {} if cls is None else _names(cls)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names.values()}
    for key, value in rope.items():
        if key not in known and value is not None:
            raise UserError(f"{where}: {key}", f"must not be set with the rope type {kind}", got=repr(value))
    if cls is None:
        return None
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    for ours, theirs in names.items():
        if ours in required and theirs not in rope:
            raise UserError(f"{where}: {theirs} of the rope type {kind} is missing; copy the file again")
    outside = data.get(_POSITIONS)  # which transformers prefers
    if _POSITIONS in names.values() and outside not in (None, rope[_POSITIONS]):
        got = f"{outside} and {rope[_POSITIONS]}"
        raise UserError(f"{where}: {_POSITIONS}", "must say the same in both places", got=got)
    given = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    return {"kind": kind} | given


def _names(cls: type[RopeScaling]) -> dict[str, str]:
    """Ours -> theirs."""
    fields = [field.name for field in dataclasses.fields(cls) if field.name != "kind"]
    return {name: _POSITIONS if name == "original_max_positions" else name for name in fields}
