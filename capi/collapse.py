"""The alarm for positional collapse, which no loss shows: clusters that come to stand for places."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping

logger = logging.getLogger("capi")

# Calibrated on experiments/results/collapse.jsonl: see docs/metrics.md.
_READINGS = 5
LEAST_NATS = 0.03
_DEVIATIONS = 5


class CollapseAlarm:
    """Rings while the information of position and cluster lies well above chance: 0.03 nats and five deviations.

    Judged is the mean of the last five readings. A deviation is that of one reading of independent positions and
    clusters: 2 N I is distributed as chi-squared of (positions - 1) (prototypes - 1) degrees of freedom, with N tokens.
    (With few tokens for each pair it varies less.) `before` are the lines of metrics that a run goes on from.
    """

    def __init__(self, n_positions: int, n_prototypes: int, before: Iterable[Mapping] = ()) -> None:
        self._deviation = math.sqrt(2 * (n_positions - 1) * (n_prototypes - 1)) / 2
        self._excesses: deque[float] = deque(maxlen=_READINGS)
        self.rings = False
        for line in before:
            if "positional_mi" in line:
                self.judge(line)

    def judge(self, reading: Mapping[str, int | float]) -> tuple[float, float]:
        """Takes a reading in; returns the mean excess of the last ones, and from where on it is too much."""
        self._excesses.append(reading["positional_mi"] - reading["positional_mi_floor"])
        excess = sum(self._excesses) / len(self._excesses)
        level = max(LEAST_NATS, _DEVIATIONS * self._deviation / reading["assigned_tokens"])
        # Once it rings, until half of that, lest it ring anew at every reading.
        self.rings = len(self._excesses) == _READINGS and excess > (level / 2 if self.rings else level)
        return excess, level

    def read(self, step: int, assignments: Mapping[str, int | float]) -> dict[str, float]:
        """What a reading of `AssignmentStatistics` adds to the metrics; {} for one of no tokens.

        `positional_excess` in nats, and `positional_alarm`, 1 while it rings, which is logged where it begins.
        """
        if not assignments:
            return {}
        rang = self.rings
        excess, level = self.judge(assignments)
        if self.rings and not rang:
            logger.warning(
                "step %d: clusters come to stand for positions: %.3f nats of information over chance (the alarm rings "
                "from %.3f on), which the loss does not show; see docs/metrics.md",
                *(step + 1, excess, level),
            )
        return {"positional_excess": excess, "positional_alarm": float(self.rings)}
