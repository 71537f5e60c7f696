"""`python -m evaluation --run=FOLDER`: numbers for a trained run."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from cli import entry_point
from cli.allocator import reexec_with_fast_allocator
from cli.errors import UserError
from cli.locations import in_store, local, write_whole
from cli.ranges import check_seed
from cli.text_files import read_lines
from sample.arguments import SETTINGS, add_sampling_arguments, chosen_average, open_trained, sampling_settings
from sample.sheets.axes import parse_axes

# What --sweep may be over, and what its values are.
SWEPT: dict[str, type] = {
    **{name: setting.kind for name, setting in SETTINGS.items() if not setting.besides},
    **{"seed": int, "step": int, "ema": float},
}

# Options that say how another one is used.
_OF_TOOLS = {
    "features": ("resize", "num_real", "kid_subsets", "kid_subset_size", "features_dir"),
    "clip": ("convention", "candidates"),
}

_DESCRIPTION = """\
Evaluates a run, or a CLIP that was converted (--dataset says of what), and writes evaluation.json into its folder, each
metric as it ends: one that fails is named at the end, and costs no other.

caption_accuracy   share of captions whose picture has every attribute right, and each attribute (embedded dataset)
written_captions   share of captions that are written for pictures (or captions) and say nothing wrong, each attribute
agreement          the same of pairs that are drawn of nothing, once for all splits
round_trip         share of captions that are right after they are drawn, described and drawn again, and after each leg
answers            share of questions about a picture that are answered right, of each kind, and about a wrong picture
text_perplexity    of questions with their answers, without a picture: the same of a language model before and after
answer_perplexity  of the answers of a split: with the picture that is asked about, a wrong one, none
reconstruction     error of an image tokenizer, codes it uses, and scenes still read right after it

energy_distance    of a diffusion of points: between points drawn and data, beside that of data and other data
likelihood         of one in continuous time: bits per dimension, by the probability-flow ODE

zero_shot          of a CLIP: share of pictures whose class (or, on the embedded dataset, attribute) it names
retrieval          of a CLIP: recall at 1, 5, 10 and median rank, captions to pictures and back
similarity         of a CLIP: cosines of the first pictures and captions, also drawn into the run's samples/
linear_probe       of a CLIP, when named: accuracy of a logistic regression on its features

Computed when named in --metrics:
caption_loss       of a diffusion: error of its output with a picture's own caption, with the next one's, with none

Of captions that are written, on any dataset; when named in --metrics, or where captions cannot be graded:
caption_scores     BLEU and CIDEr against all captions of a picture, and with --clip their CLIP score

Computed when named in --metrics, with --clip:
clip_score         how near drawn pictures are to their captions
rerank             caption accuracy of the picture that the CLIP chooses from 1, 2, 4, ... (embedded dataset)

Computed when named in --metrics, on any dataset, with --features; they compare the pictures drawn (or reconstructed)
with as many of the split's, and all depend on that number:
fid                Frechet distance of Inception features (Heusel et al. 2017)
kid                kernel distance of Inception features (Binkowski et al. 2018)
inception_score    of the pictures drawn alone (Salimans et al. 2016)
precision_recall   of manifolds of features (Kynkaanniemi et al. 2019)
cmmd               kernel distance of CLIP embeddings (Jayasumana et al. 2024)

--sweep KEY=V1,V2 evaluates each combination of values, of sampling settings, seed, step (the checkpoint's) and ema:
  --metrics=fid --features=inception:FILE --num=50000 --sweep guidance=1,1.5,4 --sweep ema=0.05,0.1,1
Each record says with what it was computed: number of pictures, weights, guidance, sampler.
"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line and evaluates."""
    parser = entry_point.parser("evaluation", _DESCRIPTION)
    add_sampling_arguments(parser, besides=False)
    parser.set_defaults(seed=None)  # tells a seed that is given from 0
    parser.add_argument("--metrics", default="", help="comma-separated (default: all that apply)")
    parser.add_argument("--dataset", default="", help="a prepared one, name[/config] (default: the run's)")
    parser.add_argument("--data_dir", default="", help="where datasets are kept (default: the run's)")
    parser.add_argument("--image_field", default="", help="the dataset's field of pictures (default: the run's)")
    parser.add_argument("--text_field", default="", help="the dataset's field of captions (default: the run's)")
    parser.add_argument("--splits", default="", help="comma-separated (default: validation, and held_out of scenes)")
    parser.add_argument("--num", type=int, default=1000, help="pictures of each split (default 1000)")
    features = parser.add_argument_group("metrics that compare features")
    features.add_argument(
        "--features",
        metavar="NAME:FILE",
        help="extractor and its weights: inception:FILE.pth, or clip:RUN, which cmmd needs",
    )
    features.add_argument("--resize", default="", help="to the extractor's size; inception: clean (default) or tf1")
    features.add_argument("--num_real", type=int, default=0, help="pictures of the split (default: --num)")
    features.add_argument("--kid_subsets", type=int, default=100, help="subsets that kid averages (default 100)")
    features.add_argument(
        "--kid_subset_size", type=int, default=1000, help="pictures in each (default 1000), 0 for all"
    )
    features.add_argument(
        "--features_dir", help="where the dataset's features are kept (default ~/.cache/tessera/features)"
    )
    scored = parser.add_argument_group("judging by a CLIP")
    scored.add_argument("--clip", metavar="RUN", help="a trained or a converted CLIP")
    scored.add_argument("--convention", default="cosine", help="of clip_score: cosine, hessel, torchmetrics")
    scored.add_argument("--candidates", type=int, default=16, help="most that rerank chooses from (default 16)")
    classes = parser.add_argument_group("classes of a CLIP")
    classes.add_argument("--label", default="label", help="the dataset's field of class numbers (default label)")
    classes.add_argument("--classes", metavar="FILE", help="names of the classes, one a line (default: the dataset's)")
    classes.add_argument("--templates", metavar="FILE", help="prompts, one a line, with {} for the name of a class")
    classes.add_argument("--num_train", type=int, default=5000, help="pictures that a linear probe is fitted on")
    parser.add_argument(
        "--sweep", metavar="KEY=V1,V2,...", action="append", default=[], help="evaluates combinations; repeatable"
    )
    options = parser.parse_args(arguments)
    given = [name for name, value in vars(options).items() if value not in (None, [])]
    axes = parse_axes(options.sweep, given, SWEPT)
    if options.no_ema and "ema" in (axis.name for axis in axes):
        raise UserError("--sweep ema and --no_ema are both given; leave one of them out")
    seed = options.seed or 0
    check_seed("--seed", seed)
    if options.num < 1:
        raise UserError(f"--num must be at least 1, not {options.num}")
    if options.num_train < 2:
        raise UserError(f"--num_train must be at least 2, not {options.num_train}")
    if options.num_real < 0 or options.kid_subset_size < 0 or options.kid_subsets < 1:
        raise UserError("--num_real and --kid_subset_size must be 0 or more, --kid_subsets 1 or more")

    for tool, own in _OF_TOOLS.items():
        for name in own:
            if not getattr(options, tool) and getattr(options, name) != parser.get_default(name):
                raise UserError(f"--{name} is of --{tool}; give that, or leave it out")

    from evaluation.evaluate import default_splits  # imports jax
    from evaluation.records import format_table, read_records
    from evaluation.sweep import evaluate_cells
    from evaluation.tools import Tools

    def open_run(ema: bool | float, step: int | None) -> Any:
        from evaluation.evaluate import on_dataset

        trained = open_trained(options, ema, step)
        return on_dataset(trained, options.dataset, options.data_dir, options.image_field, options.text_field)

    trained = open_run(chosen_average(options), options.step)
    if not in_store(trained.run.folder) and not os.access(trained.run.folder, os.W_OK):
        raise UserError(f"{trained.run.folder} cannot be written, where results go; copy it and evaluate the copy")
    settings = sampling_settings(options)
    metrics = [name for name in options.metrics.split(",") if name]
    splits = [name for name in options.splits.split(",") if name] or default_splits(trained.config)
    tools = Tools(_feature_settings(options), _scorer(options), _clip_settings(options))
    read_records(trained.run.folder)  # to which the results are added: a mistake there is found before the work
    if in_store(trained.run.folder):
        probe = trained.run.folder / "evaluation.probe"  # and so is a right that is missing
        write_whole(probe, "")
        probe.unlink()
    done: list[dict[str, Any]] = []
    try:
        evaluate_cells(trained, open_run, axes, metrics, splits, options.num, seed, settings, tools, done)
    finally:
        if done:
            print(format_table(done))


def _feature_settings(options: argparse.Namespace) -> Any:
    """The `FeatureSettings` that were asked for, or None."""
    if not options.features:
        return None
    from evaluation.features.extractors import create_extractor
    from evaluation.features.metrics import FeatureSettings
    from evaluation.features.reference import FeatureStore, default_folder

    return FeatureSettings(
        extractor=create_extractor(options.features, options.resize),
        store=FeatureStore(local(options.features_dir, "--features_dir") if options.features_dir else default_folder()),
        num_real=options.num_real,
        kid_subsets=options.kid_subsets,
        kid_subset_size=options.kid_subset_size,
    )


def _scorer(options: argparse.Namespace) -> Any:
    """The `ClipScorer` that was asked for, or None."""
    if not options.clip:
        return None
    from evaluation.clip.reranking import ClipScorer
    from sample.embedding import ClipEmbedder

    return ClipScorer(ClipEmbedder.open(options.clip), options.convention, options.candidates)


def _clip_settings(options: argparse.Namespace) -> Any:
    """The `ClipSettings` that were asked for."""
    from evaluation.clip.metrics import ClipSettings

    lists = {name: getattr(options, name) for name in ("classes", "templates")}
    given = {name: read_lines(path, f"file of {name}") for name, path in lists.items() if path}
    return ClipSettings(label=options.label, num_train=options.num_train, **given)


if __name__ == "__main__":
    reexec_with_fast_allocator()
    entry_point.run(main)
