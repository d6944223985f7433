"""The door of a training run: arguments and a call.

torchrun --nproc-per-node 8 lumi/train.py --config C --data-dirs S... --tokenizer-dir T --output-dir R
"""

import os
import sys

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # a script's own folder comes first: lumi/data would be everybody's `import data`

from lumi.command_line import (
    add_cache_dir,
    add_config,
    add_device,
    given_path,
    parse,
    parse_size,
    parser,
    run,
)
from lumi.config import UserError, load_config
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig


def main(argv: list[str]) -> int:
    """The command line."""
    arguments = parser(
        "train.py", "Train a language model; start with torchrun, or plain python for one process."
    )
    add_config(arguments)
    data = "token stores, also behind a URL such as s3://bucket/tokens, or corpus folders"
    arguments.add_argument("--data-dirs", nargs="+", required=True, metavar="DIR", help=data)
    arguments.add_argument(
        "--data-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="share of the rows that each data folder gets; by its tokens where not given",
    )
    arguments.add_argument(
        "--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or model file"
    )
    arguments.add_argument(
        "--model-path",
        type=given_path,
        metavar="M",
        help="begin with this model: a run, a checkpoint, a Hugging Face folder, or org/name on the hub",
    )
    arguments.add_argument("--output-dir", required=True, type=given_path, help="the run folder")
    arguments.add_argument("--resume-from-checkpoint", metavar="auto|PATH", help="go on with a run")
    add_cache_dir(arguments)
    size = "for the tokens of stores behind a URL; default: 64GB"
    arguments.add_argument("--cache-size", metavar="SIZE", help=size)
    add_device(arguments)
    options = parse(arguments, argv)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2  # the machine's first process says it
        raise
    paths = Paths(
        data_dirs=options.data_dirs,
        tokenizer_dir=options.tokenizer_dir,
        output_dir=options.output_dir,
        data_weights=options.data_weights,
        resume=options.resume_from_checkpoint,
        model_path=options.model_path,
        cache_dir=options.cache_dir,
        cache_bytes=parse_size("--cache-size", options.cache_size)
        if options.cache_size is not None
        else None,
    )
    return train(config, paths, options.device)


if __name__ == "__main__":
    sys.exit(run(main))
