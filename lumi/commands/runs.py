"""Runs are chosen, planned, made whole and shown: `lumi new`, `plan`, `finetune`, `report` and `demo`.

`lumi doctor` says what they will run on.
"""

import sys
from pathlib import Path

from lumi.command_line import (
    add_config,
    add_device,
    add_numbers,
    from_options,
    given_path,
    parse,
    parser,
    split_overrides,
    summary,
)
from lumi.config import load_config


def new(argv: list[str]) -> int:
    """a size and a number of tokens -> the configs of all stages, with reasons"""
    import torch

    from lumi.host.devices import choose_device
    from lumi.planning.new_project import new_project
    from lumi.planning.recipe import NAMED

    texts = {
        "size": f"{', '.join(NAMED)}, or parameters, 0.7M to 20B; default: what --minutes allow",
        "tokens": "to train on, such as 0.5B; default: what --minutes allow, else 20 for each parameter",
        "minutes": "of pre-training on this machine, instead of --tokens",
        "data": "files of text (.jsonl, .json, .parquet, .txt), or one dataset on the hub; default: a mix",
    }
    arguments = parser("lumi new", summary(new))
    arguments.add_argument("--size", help=texts["size"])
    arguments.add_argument("--tokens", help=texts["tokens"])
    arguments.add_argument("--minutes", type=float, help=texts["minutes"])
    arguments.add_argument("--data", nargs="+", default=(), metavar="DATA", help=texts["data"])
    arguments.add_argument("--output-dir", required=True, type=given_path)
    add_device(arguments)
    options = arguments.parse_args(argv)
    device = torch.device(choose_device(options.device))
    dial = {name: getattr(options, name) for name in ("size", "tokens", "minutes", "data")}
    print(new_project(options.output_dir, device, **dial))
    return 0


def plan(argv: list[str]) -> int:
    """memory, communication, time and checkpoints of a config on many GPUs, on paper"""
    from lumi.host.devices import GPUS
    from lumi.planning.cluster import Cluster
    from lumi.planning.scale_report import describe_scale
    from lumi.training.run_config import TrainConfig

    texts = {
        "mfu": "what one GPU reaches by itself, as share of its peak; measured: mfu in metrics.jsonl",
        "link_share": "what collectives reach of the bandwidths",
        "network_gbps": "gigabits/s from each GPU to other nodes",
        "nvlink_gbps": "gigabits/s from each GPU to those of its node; default: the data sheet's",
        "disk_gb_per_second": "gigabytes/s to the shared disk, from all nodes together",
        "host_gb_per_second": "gigabytes/s from each GPU to its host's memory",
    }
    arguments = parser("lumi plan", summary(plan))
    add_config(arguments)
    arguments.add_argument("--nodes", type=int, required=True)
    arguments.add_argument("--gpus-per-node", type=int, required=True)
    arguments.add_argument("--gpu", choices=tuple(GPUS), default=Cluster.gpu)
    add_numbers(arguments, Cluster, texts)
    options = parse(arguments, argv)
    cluster = from_options(Cluster, options)
    config = load_config(TrainConfig, options.config, options.overrides)
    print(describe_scale(config, cluster, Path(options.config).stem))
    return 0


def finetune(argv: list[str]) -> int:
    """a model and chat data -> a fine-tuned model, all settings chosen"""
    import lumi.finetune

    texts = {
        "model": "a model folder, a finished run, or org/name on the hub",
        "data": ".jsonl, .json or .parquet files of conversations or of pairs, or one dataset on the hub",
        "split": "of a dataset on the hub; default: train",
        "epochs": "passes over the data; default: 3 for few conversations down to 1 for many",
        "merge": "also write OUTPUT_DIR/model, with the adapter merged",
        "chatml": "add the tokens of ChatML to a copy of a model that has no chat template",
    }
    changes = "Settings are changed by key.subkey=value, such as optimizer.peak_lr=3e-4."
    arguments = parser("lumi finetune", f"{summary(finetune)}. {changes}")
    arguments.add_argument("model", type=given_path, metavar="MODEL", help=texts["model"])
    arguments.add_argument("data", nargs="+", metavar="DATA", help=texts["data"])
    arguments.add_argument("--output-dir", required=True, type=given_path)
    arguments.add_argument("--split", help=texts["split"])
    arguments.add_argument("--epochs", type=float, help=texts["epochs"])
    arguments.add_argument("--merge", action="store_true", help=texts["merge"])
    arguments.add_argument("--add-chatml", action="store_true", help=texts["chatml"])
    add_device(arguments)
    overrides, others = split_overrides(argv)
    options = arguments.parse_args(others)
    return lumi.finetune.finetune(
        options.model,
        options.data,
        options.output_dir,
        split=options.split,
        epochs=options.epochs,
        merge=options.merge,
        add_chatml=options.add_chatml,
        device=options.device,
        overrides=overrides,
    )


def report(argv: list[str]) -> int:
    """curves, figures and evaluations of runs on one HTML page"""
    from lumi.reporting.page import write_report

    texts = {
        "run": "a run folder; several are drawn over each other",
        "output": "default: report.html in the first run's folder",
        "evaluations": "folders of evaluations, beside those found in and next to the runs",
    }
    arguments = parser("lumi report", summary(report))
    arguments.add_argument("runs", nargs="+", type=given_path, metavar="RUN", help=texts["run"])
    arguments.add_argument("--output", type=given_path, metavar="FILE", help=texts["output"])
    arguments.add_argument(
        "--evaluations", nargs="+", type=given_path, default=(), metavar="DIR", help=texts["evaluations"]
    )
    options = arguments.parse_args(argv)
    output = options.output or options.runs[0] / "report.html"
    for note in write_report(options.runs, output, options.evaluations):
        print(note, file=sys.stderr)
    print(f"wrote {output}")
    return 0


def demo(argv: list[str]) -> int:
    """all stages on Python's own documentation, without a download, in a few minutes"""
    import lumi.demo

    arguments = parser("lumi demo", summary(demo))
    minutes = "what the whole demo may take on a CPU; training is cut to fit; 0: all steps of the config"
    arguments.add_argument("--output-dir", type=given_path, default=Path("runs/demo"))
    arguments.add_argument("--minutes", type=float, default=4.0, help=minutes)
    add_device(arguments)
    options = arguments.parse_args(argv)
    return lumi.demo.demo(options.output_dir, options.minutes, options.device)


def doctor(argv: list[str]) -> int:
    """this machine, what is installed, which kernels will run, what is missing"""
    import lumi.doctor

    parser("lumi doctor", summary(doctor)).parse_args(argv)
    return lumi.doctor.doctor()
