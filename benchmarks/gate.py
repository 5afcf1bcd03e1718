"""A gate at which processes that compile side by side wait, and that lets one at a time through to be timed alone.

The folder CAPI_GATE is all that they share: `<name>.ready` says that a process waits, `<name>.open` lets it through. It
also keeps the first losses of our step, which those of a peer in another process must equal.
"""

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Gate:
    """Of the step `name`, in `folder`; without one nobody waits."""

    def __init__(self, name: str, folder: str | None = None):
        folder = folder or os.environ.get("CAPI_GATE")
        self.name, self.folder = name, None if folder is None else Path(folder)
        self.passed = self.folder is None

    def wait(self) -> None:
        """Gives back unused memory, says so and waits, the first time that it is called.

        On a GPU a step that waits before its first run holds hardly more than its weights.
        """
        if self.passed:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        (self.folder / f"{self.name}.ready").touch()
        while not (self.folder / f"{self.name}.open").exists():
            time.sleep(0.1)
        self.passed = True

    def behind(self, compiler: Callable, graph: int) -> Callable:
        """A compiler of torch.compile that waits here once it has compiled so many graphs, before they run."""
        graphs = 0

        def compile_and_wait(*arguments: object, **options: object) -> Callable:
            nonlocal graphs
            compiled = compiler(*arguments, **options)
            graphs += 1
            if graphs == graph:
                self.wait()
            return compiled

        return compile_and_wait

    def is_ready(self) -> bool:
        return (self.folder / f"{self.name}.ready").exists()

    def open(self) -> None:
        (self.folder / f"{self.name}.open").touch()

    def leave_losses(self, preset: str, losses: list[float]) -> None:
        if self.folder is not None:
            (self.folder / f"{preset}.losses.json").write_text(json.dumps(losses))

    def losses(self, preset: str) -> list[float] | None:
        """What our step left, if it ran before."""
        path = None if self.folder is None else self.folder / f"{preset}.losses.json"
        return json.loads(path.read_text()) if path is not None and path.exists() else None
