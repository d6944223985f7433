"""Many runs: `lumi sweep` searches settings, `lumi fit` finds the law of their losses."""

from lumi.command_line import add_device, given_path, parser, summary


def sweep(argv: list[str]) -> int:
    """a grid or random search over settings of a training, with seeds and halving"""
    import lumi.sweeps.sweep

    texts = {
        "sweep": "JSON config of the search",
        "data": "token stores, also behind a URL, or corpus folders",
        "processes": "trainings at a time; default: one for each GPU, or else for each core",
    }
    arguments = parser("lumi sweep", summary(sweep))
    arguments.add_argument("sweep", type=given_path, metavar="SWEEP.json", help=texts["sweep"])
    arguments.add_argument("--data-dirs", nargs="+", required=True, metavar="DIR", help=texts["data"])
    arguments.add_argument(
        "--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or file"
    )
    arguments.add_argument(
        "--output-dir", required=True, type=given_path, help="of all trials and the results"
    )
    arguments.add_argument("--processes", type=int, metavar="N", help=texts["processes"])
    add_device(arguments)
    options = arguments.parse_args(argv)
    return lumi.sweeps.sweep.sweep(
        options.sweep,
        options.data_dirs,
        options.tokenizer_dir,
        options.output_dir,
        processes=options.processes,
        device=options.device,
    )


def fit(argv: list[str]) -> int:
    """the law of loss by size and tokens, and the size that a budget should take"""
    import lumi.sweeps.fit

    texts = {
        "run": "a finished run folder, or the folder of a sweep",
        "flops": "budgets; default: 1, 10 and 100 times the largest run",
    }
    arguments = parser("lumi fit", summary(fit))
    arguments.add_argument("runs", nargs="+", type=given_path, metavar="RUN_OR_SWEEP", help=texts["run"])
    arguments.add_argument("--output-dir", required=True, type=given_path, help="of fit.json and fit.png")
    arguments.add_argument("--flops", nargs="+", type=float, metavar="C", help=texts["flops"])
    options = arguments.parse_args(argv)
    return lumi.sweeps.fit.fit(options.runs, options.output_dir, options.flops or ())
