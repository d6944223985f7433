"""What `inspect_kernels.py` looks at: every kernel at sizes that models have, with the blocks that its launcher would choose.

A further kernel is a further function here. The dtype under inspection is written T.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One kernel at one size, for one dtype and architecture. `signature` types every run-time argument; T stands for the dtype.

    `moved`: how many elements of T and how many of 4 bytes a row (token) has to move between the GPU's memory and its processors, each
    input read once and each output written once; weights, which all rows share, are not counted.
    """

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16, as Triton finds at launch; pointers always are
    expects: tuple[str, ...] = field(default=("LDG.128", "STG.128"))  # instructions that must be there; MMA: in 16 bits, on tensor cores
    moved: tuple[int, int] = (0, 0)


def entries(dtype: str, arch: int) -> list[Entry]:
    """The registry. `dtype`: "fp32", "fp16" or "bf16"; `arch`: 80, 89, 90 or 100. The names are the same for all of them."""
    return [*_rms_norm_entries(), *_rope_entries(), *_swiglu_entries()]


def _rms_norm_entries() -> Iterator[Entry]:
    from lumi.kernels.rms_norm import backward_config, forward_config

    forward = {
        "x_ptr": "*T", "weight_ptr": "*fp32", "y_ptr": "*T", "rstd_ptr": "*fp32",
        "stride_xn": "i32", "stride_yn": "i32", "N": "i32", "D": "i32", "eps": "fp32",
    }  # fmt: skip
    wide = {
        "dy_ptr": "*T", "x_ptr": "*T", "weight_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": "*T", "dweight_partial_ptr": "*fp32",
        "stride_dyn": "i32", "stride_xn": "i32", "stride_dxn": "i32", "N": "i32", "D": "i32",
    }  # fmt: skip
    backward = wide | {"num_tiles": "i32"}
    for D in (64, 8192, 16_384):  # rows that share a program, the most registers, the looped backward
        narrow = "BLOCK_N" in backward_config(D)
        for name, kernel, signature, config, moved in (
            ("rms_norm_fwd", "_rms_norm_fwd_kernel", forward, forward_config(D), 2 * D),
            ("rms_norm_bwd", "_rms_norm_bwd_kernel", backward, backward_config(D), 3 * D)
            if narrow
            else ("rms_norm_bwd_wide", "_rms_norm_bwd_wide_kernel", wide, backward_config(D), 3 * D),
        ):
            yield _entry(f"{name} D={D}", "lumi.kernels.rms_norm", kernel, signature, config, "D", moved=(moved, 1))


def _rope_entries() -> Iterator[Entry]:
    from lumi.kernels.rope import tile_config

    tensors = ("q", "k", "q_out", "k_out")
    signature = {f"{tensor}_ptr": "*T" for tensor in tensors} | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "stride_tn": "i32"}
    signature |= {f"stride_{tensor}{axis}": "i32" for tensor in tensors for axis in "nh"} | {"N": "i32", "H": "i32", "G": "i32"}
    for K in (64, 96, 128):
        heads = 2  # one of q, one of k
        config = {"SIGN": -1, **tile_config(K)}
        yield _entry(f"rope K={K}", "lumi.kernels.rope", "_rope_kernel", signature, config, moved=(2 * heads * K, 2 * K))


def _swiglu_entries() -> Iterator[Entry]:
    from lumi.kernels.swiglu import tile_config

    for name, tensors in (("fwd", ("gate", "up", "y")), ("bwd", ("dy", "gate", "up", "dgate", "dup"))):
        pointers, strides = {f"{tensor}_ptr": "*T" for tensor in tensors}, {f"stride_{tensor}n": "i32" for tensor in tensors}
        for F in (64, 1536):  # rows that share a program, rows that are cut
            signature = pointers | strides | {"N": "i32", "F": "i32"}
            config, moved = tile_config(F), (len(tensors) * F, 0)
            yield _entry(f"swiglu_{name} F={F}", "lumi.kernels.swiglu", f"_swiglu_{name}_kernel", signature, config, "F", moved=moved)


def _entry(name: str, module: str, kernel: str, signature: dict[str, str], config: dict[str, int], width: str = "", **more: Any) -> Entry:
    """`config` as the launcher chose it; strides and the argument `width` are multiples of 16 for the sizes that models have."""
    aligned = tuple(argument for argument in signature if argument == width or argument.startswith("stride_"))
    blocks = {key: value for key, value in config.items() if key not in ("num_warps", "num_stages")}
    stages = {"num_stages": config["num_stages"]} if "num_stages" in config else {}
    return Entry(name, module, kernel, signature, blocks, config["num_warps"], aligned=aligned, **stages, **more)
