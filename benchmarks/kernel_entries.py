"""What `inspect_kernels.py` looks at: every kernel at model sizes, with the blocks that its launcher chooses.

A new kernel is a new function here, and a line in `entries`. The dtype under inspection is written T.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# The type of every run-time argument; a tuple of strides has one type for each.
Signature = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Entry:
    """One kernel at one size, for one dtype and architecture.

    Args:
        name: what the table calls it.
        module, kernel: where it is.
        signature: the type of every run-time argument, T for the dtype.
        constexprs: the others; None is a pointer that the launcher leaves out.
        num_warps, num_stages, maxnreg: as launched; maxnreg, the most registers of a thread, is None where
            the compiler is free.
        aligned: integer arguments that are multiples of 16, as Triton finds at launch. Pointers always are.
        expects: instructions that must be there; those of tensor cores in 16 bits only.
        moved: how many elements of T and how many of 4 bytes a row (token) must move between the GPU's memory
            and its processors. Each input is read once and each output written once. Weights are not counted:
            all rows share them.
        covers: how many rows one walk through `machine_code.Code.main` deals with; 0 if other programs read
            the same rows too, so that the caches serve most of them.
        copied: how many elements of T such a walk then copies from the caches.
    """

    name: str
    module: str
    kernel: str
    signature: Signature
    constexprs: dict[str, int | None]
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None
    aligned: tuple[str, ...] = ()
    expects: tuple[str, ...] = ("LDG.128", "STG.128")
    moved: tuple[int, int] = (0, 0)
    covers: float = 0.0
    copied: int = 0


def entries(dtype: str, arch: int) -> list[Entry]:
    """The registry: the same names for every dtype and architecture, the largest size of a kernel last.

    `dtype` is "fp32", "fp16" or "bf16", `arch` 80, 89, 90 or 100.
    """
    return [
        *_decode_attention_entries(dtype),
        *_rms_norm_entries(),
        *_rope_entries(),
        *_swiglu_entries(),
        *_attention_entries(dtype, arch),
        *_linear_cross_entropy_entries(dtype),
    ]


def _rms_norm_entries() -> Iterator[Entry]:
    from lumi.kernels.rms_norm import backward_config, forward_config

    forward = {
        "x_ptr": "*T", "residual_ptr": "*T", "weight_ptr": "*fp32", "total_ptr": "*T", "y_ptr": "*T",
        "rstd_ptr": "*fp32", "stride_xn": "i32", "stride_residualn": "i32", "stride_yn": "i32",
        "N": "i32", "D": "i32", "eps": "fp32",
    }  # fmt: skip
    wide = {
        "dy_ptr": "*T", "dtotal_ptr": "*T", "x_ptr": "*T", "weight_ptr": "*fp32", "rstd_ptr": "*fp32",
        "dx_ptr": "*T", "dweight_partial_ptr": "*fp32",
        "stride_dyn": "i32", "stride_dtotaln": "i32", "stride_xn": "i32", "stride_dxn": "i32",
        "N": "i32", "D": "i32",
    }  # fmt: skip
    backward = wide | {"num_tiles": "i32"}
    absent = dict.fromkeys(("residual_ptr", "total_ptr", "dtotal_ptr"))  # what `rms_norm` passes None for
    # Rows that share a program, the most registers, the looped backward.
    for operator, left_out, more, sizes in (
        ("rms_norm", absent, 0, (64, 8192, 16_384)),
        ("add_rms_norm", {}, 1, (1024, 8192, 16_384)),
    ):
        for D in sizes:
            narrow = "BLOCK_N" in backward_config(D)
            for direction, kernel, signature, config, moved in (
                ("fwd", "_rms_norm_fwd_kernel", forward, forward_config(D), (2 + 2 * more) * D),
                ("bwd", "_rms_norm_bwd_kernel", backward, backward_config(D), (3 + more) * D)
                if narrow
                else ("bwd_wide", "_rms_norm_bwd_wide_kernel", wide, backward_config(D), (3 + more) * D),
            ):
                config |= {argument: None for argument in left_out if argument in signature}
                name, counts = f"{operator}_{direction} D={D}", (moved, 1)
                covers = config.get("BLOCK_N", config["BLOCK_D"] / D)
                module = "lumi.kernels.rms_norm"
                yield _entry(name, module, kernel, signature, config, "D", moved=counts, covers=covers)


def _rope_entries() -> Iterator[Entry]:
    from lumi.kernels.rope import tile_config

    tensors = ("q", "k", "q_out", "k_out")
    signature = {f"{tensor}_ptr": "*T" for tensor in tensors} | {
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "stride_tn": "i32",
    }
    signature |= {f"stride_{tensor}{axis}": "i32" for tensor in tensors for axis in "nh"} | {
        "N": "i32",
        "H": "i32",
        "G": "i32",
    }
    for K in (64, 96, 128):
        heads = 2  # one of q, one of k
        config = {"SIGN": -1, **tile_config(K)}
        yield _entry(
            f"rope K={K}",
            "lumi.kernels.rope",
            "_rope_kernel",
            signature,
            config,
            moved=(2 * heads * K, 2 * K),
            covers=config["BLOCK_N"] * config["HEADS"] / heads,
        )


def _swiglu_entries() -> Iterator[Entry]:
    from lumi.kernels.swiglu import tile_config

    for name, tensors in (("fwd", ("gate", "up", "y")), ("bwd", ("dy", "gate", "up", "dgate", "dup"))):
        pointers, strides = (
            {f"{tensor}_ptr": "*T" for tensor in tensors},
            {f"stride_{tensor}n": "i32" for tensor in tensors},
        )
        for F in (64, 1536):  # rows that share a program, rows that are cut
            signature = pointers | strides | {"N": "i32", "F": "i32"}
            config, moved = tile_config(F), (len(tensors) * F, 0)
            yield _entry(
                f"swiglu_{name} F={F}",
                "lumi.kernels.swiglu",
                f"_swiglu_{name}_kernel",
                signature,
                config,
                "F",
                moved=moved,
                covers=config["BLOCK_N"] / -(-F // config["BLOCK_F"]),
            )


def _decode_attention_entries(dtype: str) -> Iterator[Entry]:
    import torch

    from lumi.kernels.decode_attention import combine_config, tile_config

    module, kernel = "lumi.kernels.decode_attention", "_decode_attention_kernel"
    signature: Signature = {f"{tensor}_ptr": "*T" for tensor in ("q", "k", "v")}
    signature |= {"positions_ptr": "*i64", "page_table_ptr": "*i32"}
    signature |= {f"{tensor}_strides": ("i32", "i32", "i32") for tensor in ("q", "k", "v")}
    signature |= dict.fromkeys(("stride_pb", "stride_pt", "stride_tb", "T", "S", "G", "num_tiles"), "i32")
    signature |= {"scale": "fp32"}
    split: Signature = {"out_ptr": "*fp32", "max_ptr": "*fp32", "sum_ptr": "*fp32", "shares_ptr": "*i32"}
    whole: Signature = {"out_ptr": "*T"}  # y itself
    element = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    group, mma = 4, ("LDG.128", "STG.128", "MMA")
    alone, not_split = ("page_table_ptr",), ("page_table_ptr", "max_ptr", "sum_ptr", "shares_ptr")
    for name, rows, out, absent, window, sizes in (
        ("decode_attention", group, split, alone, 0, (64, 96, 128)),
        ("decode_attention_paged", group, split, (), 0, (64, 96, 128)),
        ("decode_attention_prompt", 512 * group, whole, not_split, 0, (64, 128)),
        ("decode_window", group, split, alone, 4096, (128,)),
        ("decode_window_prompt", 512 * group, whole, not_split, 4096, (128,)),
    ):
        for K in sizes:
            config = {
                "K": K,
                "GROUP": group,
                "PAGE_SIZE": 0 if absent else 16,
                "WINDOW": window,
                "SPLIT": out is split,
                **tile_config(K, rows, element),
            }
            config |= dict.fromkeys(absent)  # what the launcher passes None for
            more = {"moved": (2 * K, 0)}  # of a key slot and kv head
            more |= (
                {"copied": 2 * config["BLOCK_S"] * config["BLOCK_K"]}
                if name.endswith("prompt")
                else {"covers": config["BLOCK_S"]}
            )
            yield _entry(f"{name} K={K}", module, kernel, signature | out, config, expects=mma, **more)
    signature = {
        "partial_ptr": "*fp32",
        "max_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "shares_ptr": "*i32",
        "y_ptr": "*T",
        "num_splits": "i32",
    }
    config, loads = (
        {"K": 128, **combine_config(128)},
        ("LDG.128",),
    )  # a row of y is too short for 16 bytes from every thread
    moved = (0, 130)  # of a share of the keys
    yield _entry(
        "decode_attention_combine K=128",
        module,
        "_combine_kernel",
        signature,
        config,
        expects=loads,
        moved=moved,
        covers=config["BLOCK_I"],
    )


def _linear_cross_entropy_entries(dtype: str) -> Iterator[Entry]:
    from lumi.kernels.linear_cross_entropy import IGNORE_INDEX, rescale_config, tile_config

    module = "lumi.kernels.linear_cross_entropy"
    signature = {
        "logits_ptr": "*T", "targets_ptr": "*i64", "losses_ptr": "*fp32",
        "stride_c": "i32", "V": "i32", "z_loss": "fp32", "dloss": "fp32",
    }  # fmt: skip
    for V in (32_768, 50_257, 128_256):
        flags = {"weights_ptr": None, "IGNORE_INDEX": IGNORE_INDEX, "GRADIENT": True}
        config = flags | tile_config(V, 4 if dtype == "fp32" else 2)
        name, width = f"linear_cross_entropy V={V}", "V" if V % 16 == 0 else ""
        more = {
            "moved": (2 * V, 3),
            "covers": config["LANES"] * config["VECTOR"] / V,
        }  # the target is 8 bytes
        yield _entry(name, module, "_cross_entropy_kernel", signature, config, width, **more)
    weighted = signature | {"weights_ptr": "*fp32"}
    config = {key: value for key, value in config.items() if key != "weights_ptr"}
    more |= {"moved": (2 * V, 4)}
    yield _entry(f"token_losses V={V}", module, "_cross_entropy_kernel", weighted, config, width, **more)
    rescale = {"gradient_ptr": "*T", "dloss_ptr": "*fp32", "expected_dloss": "fp32", "num_elements": "i32"}
    yield _entry(
        "linear_cross_entropy_rescale",
        module,
        "_rescale_kernel",
        rescale,
        rescale_config(),
        "num_elements",
        moved=(2, 0),
        covers=rescale_config()["BLOCK"],
    )


def _entry(
    name: str,
    module: str,
    kernel: str,
    signature: Signature,
    config: dict[str, int],
    width: str = "",
    **more: Any,
) -> Entry:
    """`config` is what the launcher chose. At model sizes, strides and `width` are multiples of 16."""
    aligned = tuple(
        name for name in signature if name == width or name.startswith("stride_") or name.endswith("_strides")
    )
    options = {key: config[key] for key in ("num_warps", "num_stages", "maxnreg") if key in config}
    blocks = {key: value for key, value in config.items() if key not in options}
    return Entry(name, module, kernel, signature, blocks, aligned=aligned, **options, **more)


def _attention_entries(dtype: str, arch: int) -> Iterator[Entry]:
    import torch

    from lumi.kernels.attention import ORDER_BLOCK
    from lumi.kernels.attention_tiles import tile

    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    plan = {"first_key": "*i32", "last_query": "*i32", "order": "*i32"}
    # What a program reads tile by tile.
    walks = {"fwd": ("k", "v"), "delta": (), "dkdv": ("q", "dy"), "dq": ("k", "v")}
    for kernel, tensors, rows in (
        ("fwd", ("q", "k", "v", "y"), ("lse", "first_key", "order")),
        ("delta", ("dy", "y"), ("delta",)),
        ("dkdv", ("q", "k", "v", "dy", "dk", "dv"), ("lse", "delta", "last_query", "order")),
        ("dq", ("q", "k", "v", "dy", "dq"), ("lse", "delta", "first_key", "order")),
    ):
        for K in (64, 96, 128):
            config = tile(kernel, K, torch_dtype, arch)
            walked = config.get("BLOCK_M" if kernel == "dkdv" else "BLOCK_N")
            source = f"tensordesc<T[{walked}, 1, {config['BLOCK_K']}]>" if config.get("DESCRIPTORS") else "*T"
            signature: Signature = {f"{name}_source": source for name in walks[kernel]}
            signature |= {f"{name}_ptr": "*T" for name in tensors if name not in walks[kernel]}
            signature |= {f"{name}_ptr": plan.get(name, "*fp32") for name in rows}
            signature |= {f"{name}_strides": ("i32", "i32") for name in tensors} | {"N": "i32"}
            config |= {"ORDER": ORDER_BLOCK}
            if kernel != "delta":
                signature |= {"G" if kernel == "dkdv" else "H": "i32", "group": "i32", "scale": "fp32"}
            if kernel in ("dkdv", "dq"):
                signature |= {"dscore": "fp32"}
            products = {90: "HGMMA", 100: "UTCMMA"}.get(arch, "MMA")
            reads = (
                {"covers": config["BLOCK_M"]}
                if kernel == "delta"
                else {"copied": 2 * walked * config["BLOCK_K"]}
            )
            yield _entry(
                f"attention_{kernel} K={K}",
                "lumi.kernels.attention",
                f"_attention_{kernel}_kernel",
                signature,
                {"HEAD_DIM": K, **config},
                moved=(len(tensors) * K, len(set(rows) - set(plan))),
                expects=("LDG.128",) if kernel == "delta" else ("LDG.128", "STG.128", products),
                **reads,
            )
