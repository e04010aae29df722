"""Plan a run before it is submitted: does it fit, how long does it take, and which configuration is best.

    python launch/plan.py llama2_7b_glue --gpus 4 --gpu a100-80gb
    python launch/plan.py llama2_70b_glue --gpus 16 --nodes 2 --gpu a100-80gb --slurm job.sbatch
    python launch/plan.py llama2_70b_glue --gpus 8,64,512 --gpu h100-80gb       # how far it scales
    python launch/plan.py llama2_7b_glue --gpus 4 --brief                       # a row of a Markdown table

No weights and no GPU are needed; the shapes of the recipes' models come with the package. Without --ds_config all of
ds_configs/ are compared. Flags of launch/train.py override the recipe.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.config import RunConfig, read_recipe
from more_ds.errors import UserError
from more_ds.planner import report, scaling
from more_ds.planner.hardware import ASSUMPTIONS, find_gpu
from more_ds.planner.search import (
    Candidate,
    Cluster,
    Subject,
    best,
    candidates,
    nearest,
    require_divisible,
    shipped,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    parser = cli.config_parser(__doc__ or "", "launch/plan.py RECIPE [--gpus N] [--gpu NAME] [--KEY VALUE ...]")
    parser.add_argument("recipe", help="a YAML file, or a name in launch/recipes")
    parser.add_argument(
        "--gpus", type=cli.positives, default=[1],
        help="GPUs of all nodes; several, 8,64,512: how a step grows where each has as many examples; default: 1",
    )  # fmt: skip
    parser.add_argument("--nodes", type=cli.positive, default=1, help="nodes they are on; default: 1")
    parser.add_argument("--gpu", default="a100-80gb", help="name in more_ds/planner/hardware.yaml; default: a100-80gb")
    parser.add_argument("--ds_config", help="DeepSpeed configuration; default: compare those in ds_configs")
    parser.add_argument("--prompt_tokens", type=cli.positive, help="tokens of a prompt; default: max_source_length")
    parser.add_argument("--answer_tokens", type=cli.positive, help="tokens of an answer; default: max_target_length")
    parser.add_argument("--rows", type=cli.positive, help="training rows of all tasks; default: the public data's")
    parser.add_argument("--brief", action="store_true", help="one row of a Markdown table, and nothing else")
    parser.add_argument("--json", help="file for the plan as JSON")
    parser.add_argument("--slurm", help="file for a SLURM script that runs the plan")
    return cli.run(lambda: plan(*cli.parse(parser, sys.argv[1:] if argv is None else argv)))


def plan(arguments: Namespace, flags: dict[str, Any]) -> None:
    """Find the best way to run a recipe, and show it.

    Raises:
        UserError: there is no such recipe, GPU or configuration, or nothing fits.
    """
    recipe = read_recipe(arguments.recipe)
    config = cli.merged(recipe, flags, f"recipe '{arguments.recipe}'")
    if len(arguments.gpus) > 1:
        return scale(arguments, config)
    (gpus,) = arguments.gpus
    require_divisible(gpus, arguments.nodes)
    cluster = Cluster(find_gpu(arguments.gpu), gpus, arguments.nodes)
    ds_paths = [arguments.ds_config] if arguments.ds_config else shipped(config, arguments.nodes)
    subject = Subject(config, arguments.prompt_tokens, arguments.answer_tokens)
    found = candidates(subject, cluster, ds_paths)
    chosen = best(found)
    if chosen is None:
        raise UserError(report.refusal(arguments.recipe, config, cluster, found, nearest(subject, cluster, ds_paths)))
    whole = report.job(subject, cluster, chosen, arguments.rows)
    if arguments.brief:
        return log.say(report.brief(arguments.recipe, cluster, chosen, whole))
    log.say(report.text(arguments.recipe, subject, cluster, found, chosen, whole))
    if arguments.json:
        content = report.as_json(arguments.recipe, subject, cluster, found, chosen, whole)
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.slurm:
        write_slurm(arguments.recipe, cluster, chosen, flags, arguments.slurm)
    else:
        log.say("\n" + report.command(arguments.recipe, cluster, chosen, flags))


def scale(arguments: Namespace, config: RunConfig) -> None:
    """Show how a recipe's step grows with the number of GPUs.

    Raises:
        UserError: the counts do not ascend, a flag is of one plan alone, or as `more_ds.planner.scaling.scaling`.
    """
    counts, gpu = arguments.gpus, find_gpu(arguments.gpu)
    if counts != sorted(set(counts)):
        raise UserError(f"--gpus {','.join(map(str, counts))}: several numbers have to ascend")
    alone = [f"--{name}" for name in ("slurm", "brief", "rows") if getattr(arguments, name)]
    alone += ["--nodes"] * (arguments.nodes != 1)
    if alone:
        raise UserError(f"{', '.join(alone)}: of a plan for one number of GPUs; give --gpus one, or leave it out")
    paths = [arguments.ds_config] if arguments.ds_config else shipped(config, -(-counts[-1] // gpu.per_node))
    subject = Subject(config, arguments.prompt_tokens, arguments.answer_tokens)
    found = scaling.scaling(subject, gpu, counts, paths)
    log.say(f"{scaling.text(subject, gpu, found)}\n\nassumed: {ASSUMPTIONS}")
    if arguments.json:
        content = {path: [asdict(one) for one in own] for path, own in found.items()}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_slurm(recipe: str, cluster: Cluster, chosen: Candidate, flags: Mapping[str, Any], path: str) -> None:
    """Write the SLURM script of a plan.

    Raises:
        UserError: this installation has no writer of SLURM scripts.
    """
    try:
        slurm = importlib.import_module("launch.slurm")
    except ImportError as error:
        raise UserError("--slurm needs launch/slurm.py, which is not there; leave it out for the command") from error
    words = [recipe, "--nodes", str(cluster.nodes), "--gpus_per_node", str(cluster.per_node)]
    words += ["--ds_config", chosen.ds_path, "--to", path, "--", *report.arguments(recipe, chosen, flags)]
    if slurm.main(words):
        raise UserError(f"no SLURM script was written to {path}")


if __name__ == "__main__":
    sys.exit(main())
