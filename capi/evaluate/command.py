"""The command line: `python -m capi.evaluate`."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from capi import pretrained
from capi.evaluate.labelled import open_labelled
from capi.evaluate.probes import Grid
from capi.evaluate.protocol import evaluate_labelled
from capi.evaluate.report import table, write_report
from capi.evaluate.synthetic import evaluate_synthetic, format_table
from capi.model import CAPI

_DESCRIPTION = """
Without --train and --test: k-NN of every encoder on held-out synthetic scenes, beside the untrained one and pixels.

With them: classification or segmentation of labelled images.
  folder:PATH  one sub-folder a class; or images/ and masks/ with a file of the same name in each (of a mask, the value
               of a pixel is its class); or the layouts of ADE20K (ADEChallengeData2016) and VOC (VOCdevkit/VOC2012),
               of which --train takes the training and --test the validation part
  hf:NAME[:CONFIGURATION]  a column of images, and one of classes or of masks
  wds:PATTERN  .tar shards with an image and its class (cls) in every sample
"""
_EPILOG = """
The defaults are the official evaluation: linear and attentive probes of 10 learning rates and 3 weight decays, 12500
steps of 128 images, chosen on a tenth of the training set; segmentation by k-NN (1, 3, 10 or 30 neighbours, cosine or
L2) and logistic regression (8 values of C) on standardised features of patches. They differ in this:
- features are computed once: probes see at most --crops random crops of an image in turn, not a fresh one every time,
  and features of patches are kept in half precision;
- one process trains the probes, whose learning rates are those of its batches; of probes that are right as often on
  the tenth the one of the least loss is taken, not the first;
- of a segmentation the tenth is the same every time, pixels without a label neither vote nor count as a class, and C
  is fitted by PyTorch's L-BFGS, from the smaller C on;
- the official k-NN is of patches alone; that of images is the weighted vote of 10 neighbours at temperature 0.07.
Features are found again by the weights of the encoder and by names and sizes of the files of images.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 for what cannot be evaluated, 130 after Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    given = [name for name in ("train", "test", "output") if getattr(arguments, name) is not None]
    if 0 < len(given) < 3:
        parser.error(f"--train, --test and --output go together, got {', '.join(f'--{name}' for name in given)} alone")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with logging_redirect_tqdm():
            _labelled(arguments) if given else _scenes(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m capi.evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "encoders",
        metavar="ENCODER",
        nargs="+",
        help="a run folder, finished or not, a checkpoint, an encoder file, or an official name",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="side of the images in pixels; by default that of the run, or 16 patches where the run is not known",
    )
    labelled = parser.add_argument_group("labelled images")
    labelled.add_argument("--train", metavar="SOURCE", help="what k-NN and probes learn from")
    labelled.add_argument("--test", metavar="SOURCE", help="what they predict")
    labelled.add_argument("--output", metavar="DIR", type=Path, help="for results.json, results.md and results.png")
    labelled.add_argument(
        "--probes", default="knn,linear", help="of knn, linear, attentive (classification), with commas (%(default)s)"
    )
    labelled.add_argument(
        "--crops",
        type=_count(0),
        help="random crops of every training image that probes see in turn, 0: its centre (by default as many as the "
        "steps come to, at most 4)",
    )
    labelled.add_argument("--steps", type=_count(1), default=Grid.iterations, help="of the probes (%(default)s)")
    labelled.add_argument("--batch_size", type=_count(1), default=Grid.batch_size, help="of the probes (%(default)s)")
    labelled.add_argument("--cache", metavar="DIR", type=Path, help="for the features (OUTPUT/features)")
    labelled.add_argument("--train_split", help="of an hf source (train)")
    labelled.add_argument("--test_split", help="of an hf source (validation, else test)")
    labelled.add_argument("--image_key", default="auto", help="column or extension of the images (auto: as found)")
    labelled.add_argument("--label_key", default="auto", help="column or extension of classes or masks (auto: found)")
    labelled.add_argument(
        "--ignore_labels",
        type=int,
        nargs="*",
        default=[255],
        metavar="VALUE",
        help="values of pixels without a class, where the layout does not say so (255)",
    )
    labelled.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return int(text)

    return parse


def _labelled(arguments: argparse.Namespace) -> None:
    probes = list(dict.fromkeys(arguments.probes.split(",")))
    weights = {name: pretrained.read(name) for name in arguments.encoders}
    columns = {"image_key": arguments.image_key, "label_key": arguments.label_key, "ignored": arguments.ignore_labels}
    train = open_labelled(arguments.train, "train", split=arguments.train_split, **columns)
    test = open_labelled(arguments.test, "test", split=arguments.test_split, **columns)
    grid = Grid(iterations=arguments.steps, batch_size=arguments.batch_size)
    cache = arguments.cache or arguments.output / "features"
    evaluations = {}
    for name, read in weights.items():
        image_size = pretrained.configuration_of(read, arguments.image_size).data.image_size
        encoder = pretrained.build(read).to(arguments.device)
        how = {"image_size": image_size, "probes": probes, "grid": grid, "crops": arguments.crops, "cache": cache}
        evaluations[str(name)] = evaluate_labelled(encoder, train, test, **how)
    paths = write_report(evaluations, arguments.output)
    print(f"{table(evaluations)}\n\nwrote {', '.join(map(str, paths))}")  # noqa: T201


def _scenes(arguments: argparse.Namespace) -> None:
    for name in arguments.encoders:
        weights = pretrained.read(name)
        config = pretrained.configuration_of(weights, arguments.image_size)
        torch.manual_seed(config.run.seed)
        untrained = CAPI(config.model, config.clustering).init_weights().student.backbone.eval()
        backbones = {"trained": pretrained.build(weights), "untrained": untrained}
        on_device = {key: backbone.to(arguments.device) for key, backbone in backbones.items()}
        print(f"{name}\n\n{format_table(evaluate_synthetic(config, on_device))}\n")  # noqa: T201
