"""Learning from drawings: small recipes on pictures that Debian ships, under k-NN and a linear probe.

`python -m experiments.drawings [--sets emoji clipart] [--arms NAME ...]` writes the pictures (see pictures.py) below
runs/drawings, trains the arms of drawings.yaml on three quarters of them, and has `capi.evaluate` tell the class of the
others from frozen features: results/drawings.jsonl, and the table results/drawings.md.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from capi import pretrained
from capi.evaluate.labelled import open_labelled
from capi.evaluate.probes import Grid
from capi.evaluate.protocol import evaluate_labelled
from experiments.pictures import SETS, write_pictures
from experiments.runs import (
    Options,
    Record,
    Run,
    append,
    chosen,
    command,
    exit_status,
    last_excess,
    made,
    of_arms,
    perform,
    read_records,
    read_sweep,
    seeds_of,
    spread,
    write_table,
)

SWEEP = Path(__file__).parent / "drawings.yaml"
PIXELS = "raw pixels"
# On the middle of the pictures, as k-NN. Of a thousand images these are a hundred epochs, and small features want more
# than the authors' largest rate: with crops and their rates the probe of raw pixels falls from .6 to .4.
_GRID = Grid(iterations=1000, learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
_COLUMNS = {
    f"{probe} of {features}": f"{key}, {features}"
    for probe, key in (("k-NN", "knn"), ("linear probe", "linear"))
    for features in ("global", "patch mean", "global + patch mean")
}


class Pixels(nn.Module):
    """An encoder that encodes nothing: an image's pixels are its global vector, and those of its only patch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("none", nn.Parameter(torch.zeros(1)))  # It says which device does the work.

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return images.flatten(1), None, images.flatten(1)[:, None, None]


def evaluate(encoder: nn.Module, image_size: int, pictures: Path) -> dict[str, float]:
    """Accuracy on the test pictures by probe and kind of features."""
    train, test = (open_labelled(f"folder:{pictures / part}", part) for part in ("train", "test"))
    results = evaluate_labelled(encoder.eval(), train, test, image_size=image_size, grid=_GRID, crops=0)["results"]
    return {f"{result['probe']}, {result['features']}": result["accuracy"] for result in results}


def score(run_dir: Path, pictures: Path) -> dict[str, float]:
    """What `evaluate` gives of a run's encoder."""
    weights = pretrained.read(run_dir)
    return evaluate(pretrained.build(weights), pretrained.configuration_of(weights).data.image_size, pictures)


def runs(sweep: Mapping[str, Options], seeds: Sequence[int], pictures: Path) -> list[Run]:
    """Of every arm on the pictures of one set, whose name leads those of the arms."""
    places = {"data.source": f"folder:{pictures / 'train'}"}
    return [Run(f"{pictures.name}/{arm}", seed, options, places) for seed in seeds for arm, options in sweep.items()]


def table(records: Sequence[Record]) -> str:
    """A row for each set and arm."""
    columns = (*_COLUMNS, "position's information over chance (nats)")
    lines = [f"| set | arm | seeds | {' | '.join(columns)} |", f"| --- | --- | --- |{' ---: |' * len(columns)}"]
    for name, of_arm in of_arms(records).items():
        set_, _, arm = name.partition("/")
        scores = [[r["scores"][key] for r in of_arm if key in r["scores"]] for key in _COLUMNS.values()]
        scores.append([last_excess(r) for r in of_arm if "series" in r and arm != "untrained"])
        lines.append(f"| {set_} | {arm} | {seeds_of(of_arm)} | {' | '.join(spread(s) if s else '-' for s in scores)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command(__doc__, "drawings")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["emoji"], help="(emoji)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of drawings.yaml (all)")
    parser.add_argument("--share", type=Path, default=Path("/usr/share"), help="of the packages (%(default)s)")
    arguments = parser.parse_args(argv)
    sweep = read_sweep(SWEEP)
    for name in () if arguments.report else arguments.sets:
        pictures = arguments.folder / "pictures" / name
        write_pictures(name, arguments.share, pictures)
        wanted = runs(chosen(sweep, arguments.arms), arguments.seeds, pictures)
        perform(wanted, arguments.results, arguments.folder, arguments.jobs, partial(score, pictures=pictures))
        if f"{name}/{PIXELS}" not in of_arms(read_records(arguments.results)):
            scores = evaluate(Pixels(), 48, pictures)
            append(arguments.results, {"arm": f"{name}/{PIXELS}", "seed": 0, "options": {}, "scores": scores, **made()})
    records = read_records(arguments.results)
    write_table(arguments.results, "drawings", records, table(records))


if __name__ == "__main__":
    sys.exit(exit_status(main))
