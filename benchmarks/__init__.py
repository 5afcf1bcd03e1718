"""Benchmarks. What judges errors lies with the tests, which a module of these may be run without pytest to find."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
