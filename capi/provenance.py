"""Where a run comes from: `run.json` in its folder, an entry a start."""

import json
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import capi
from capi.checkpoint import write_atomically
from capi.distributed import World, gather

logger = logging.getLogger(__name__)

_ROOT = Path(capi.__file__).parent.parent
_PACKAGES = (
    *("torch", "triton", "numpy", "einops", "jaxtyping", "jsonargparse", "pillow", "safetensors", "tensorboard"),
    *("datasets", "fsspec", "wandb", "mlflow", "mlflow-skinny"),
)
_JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_COMMAND_SECONDS = 10.0


def record_start(run_dir: Path, world: World, step: int) -> dict | None:
    """Adds to `run.json` what starts here after `step` steps, and returns it; None on all ranks but 0, which writes it.

    All ranks must call it: each says what machine it is on. Nothing of the environment is written but the identity of
    the job, and no password or query of an address. A file that cannot be written costs a line in the log.
    """
    machines = gather(_machine(world.device))
    if not world.is_main:
        return None
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": without_secrets(shlex.join(sys.orig_argv)),
        "directory": str(Path.cwd()),
        **_code(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _installed(name))},
        "processes": world.size,
        "machines": _counted(machines),
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
    }
    path = run_dir / "run.json"
    try:
        text = json.dumps([*_earlier(path), entry], indent=1) + "\n"
        write_atomically(path, lambda file: file.write_text(text))
    except OSError as error:
        logger.error("%s", error)
    return entry


def without_secrets(text: str) -> str:
    """The text without the user and the query in the addresses of it, either of which may be a credential."""
    text = re.sub(r"(\w://)[^\s/@\"']+@", r"\1", text)
    return re.sub(r"(\w://[^\s?\"']*)\?[^\s\"']*", r"\1?...", text)


def _earlier(path: Path) -> list:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        if isinstance(entries, list):
            return entries
        reason = f"expected a list, got {type(entries).__name__}"
    except ValueError as error:
        reason = str(error)
    aside = path.with_name(f"{path.name}.damaged")
    logger.warning("renamed %s to %s, which cannot be read: %s", path, aside.name, reason)
    path.rename(aside)
    return []


def _code() -> dict[str, str | bool | None]:
    """Version and, of a checkout, the commit and whether files differ from it; of an install None."""
    commit = changes = None
    # An installed package may lie in the checkout of something else.
    if (_ROOT / ".git").exists():
        commit = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return {
        "capi": capi.__version__,
        "commit": commit,
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def _machine(device: torch.device) -> dict[str, str | int | None]:
    """Of this process."""
    machine = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device.type == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return machine


def _counted(machines: list[dict]) -> list[dict]:
    """Equal ones once, with the number of their processes: on GPUs one each."""
    counts = Counter(map(json.dumps, machines))
    return [{**json.loads(machine), "processes": count} for machine, count in counts.items()]


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    if package == "torch":  # Its own word has the build as well, such as +cu130.
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing, fails or does not end."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
