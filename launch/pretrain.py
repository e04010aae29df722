"""Pretrain a small backbone on text files, or go on with one.

    python launch/pretrain.py books.txt.gz news.jsonl --objective causal --output_dir runs/backbone
    deepspeed --num_gpus 4 launch/pretrain.py *.txt --objective spans --from_model FOLDER --output_dir runs/t5 \\
        --ds_config ds_configs/zero2.json

`OUTPUT_DIR/model` is a Hugging Face folder, ready for `launch/train.py --model`. Every hundredth text is held out, and
its loss is printed. The same seed makes the same bytes; --resume auto goes on to them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.checkpoint_files import is_taken
from more_ds.engine import Ranks, in_touch
from more_ds.errors import UserError
from more_ds.pretrain.run import Settings, prepare, train
from more_ds.rendezvous import from_slurm
from more_ds.stopping import Signals, Stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    from_slurm()
    with Signals() as signals:
        return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv, signals))


def _main(argv: Sequence[str], signals: Signals) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    settings = _settings(arguments)
    ranks = Ranks()
    _check_folder(settings, resume=arguments.resume == "auto")
    with in_touch():
        ranks.connect()
        run = prepare(settings, ranks, arguments.ds_config)
        stop = Stop(signals, ranks, arguments.max_hours)
        signals.is_training = True
        train(run, stop, resume=arguments.resume == "auto")
        signals.is_over = True


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="+", help=".txt (texts between blank lines) or .jsonl files, .gz too")
    add("--output_dir", required=True, help="folder of checkpoints, metrics and the model")
    add("--column", default="text", help="of .jsonl files; default: text")
    add("--objective", choices=("causal", "spans"), default="causal", help="next token (LLaMA type), or gaps (T5 type)")
    add("--from_model", help="a model to go on with; its tokeniser is used")
    add("--config", help="folder with a Hugging Face config.json; default: by the sizes below")
    add("--hidden_size", type=cli.positive, default=256, help="width; default: 256")
    add("--intermediate_size", type=cli.positive, help="of the feed-forward layers; default: 4 times the width")
    add("--layers", type=cli.positive, default=6, help="and as many in T5's encoder; default: 6")
    add("--heads", type=cli.positive, default=4, help="of the attention; default: 4")
    add("--tokenizer", help="a folder; default: the model's, else sentencepiece trained on the files")
    add("--vocab_size", type=cli.positive, default=4096, help="of that tokeniser; default: 4096")
    add("--length", type=cli.positive, default=256, help="tokens of a block; default: 256")
    add("--max_steps", type=cli.positive, default=1000, help="optimizer steps; default: 1000")
    add("--train_batch_size", type=cli.positive, default=32, help="blocks of a step, over all ranks; default: 32")
    add("--per_device_train_batch_size", type=cli.positive, help="blocks of a micro-batch")
    add("--learning_rate", type=float, default=2e-3, help="peak of a cosine; default: 2e-3")
    add("--warmup_steps", type=int, default=100, help="default: 100")
    add("--weight_decay", type=float, default=0.01, help="default: 0.01")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--seed", type=int, default=0, help="of the weights, the order and the gaps")
    add("--save_steps", type=cli.positive, default=200, help="steps between checkpoints and held-out losses")
    add("--ds_config", help="DeepSpeed configuration; default: ZeRO-0")
    add("--resume", choices=("none", "auto"), default="none", help="auto: go on from the newest checkpoint")
    add("--max_hours", type=float, help="save and stop before so long; go on with --resume auto")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.from_model and (arguments.config or arguments.tokenizer):
        raise UserError("--from_model brings its own --config and --tokenizer; leave those out")
    if arguments.hidden_size % arguments.heads:
        raise UserError(f"--hidden_size {arguments.hidden_size} is no multiple of --heads {arguments.heads}")
    if arguments.length < 2:
        raise UserError(f"--length is {arguments.length}; a block needs two tokens or more")
    own = ("ds_config", "resume", "max_hours", "local_rank", "texts")
    values = {name: value for name, value in vars(arguments).items() if name not in own}
    return Settings(texts=tuple(arguments.texts), **values)


def _check_folder(settings: Settings, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run with other settings."""
    folder = Path(settings.output_dir)
    saved = folder / "settings.json"
    if not saved.is_file():
        if is_taken(folder):
            raise UserError(f"output_dir {folder} exists and holds something else; name another folder")
        return
    if not resume:
        raise UserError(f"output_dir {folder} holds another run; name another folder, or add --resume auto")
    before, now = json.loads(saved.read_text(encoding="utf-8")), settings.decisive()
    changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UserError(f"the run in {folder} is another one: {'; '.join(changed)}; name another folder")


if __name__ == "__main__":
    sys.exit(main())
