"""The command line: `python -m capi.evaluate`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from capi import pretrained
from capi.evaluate.synthetic import evaluate_synthetic, format_table
from capi.model import CAPI


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m capi.evaluate", description="k-NN evaluation of trained encoders.")
    parser.add_argument(
        "encoders",
        metavar="ENCODER",
        nargs="+",
        help="a run folder, finished or not, a checkpoint, an encoder file, or an official name",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="side of the scenes in pixels; by default that of the run, or 16 patches where the run is not known",
    )
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for name in arguments.encoders:
            weights = pretrained.read(name)
            config = pretrained.configuration_of(weights, arguments.image_size)
            torch.manual_seed(config.run.seed)
            untrained = CAPI(config.model, config.clustering).init_weights().student.backbone.eval()
            backbones = {"trained": pretrained.build(weights), "untrained": untrained}
            results = evaluate_synthetic(config, {key: backbone.to(device) for key, backbone in backbones.items()})
            print(f"{name}\n\n{format_table(results)}\n")  # noqa: T201
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
