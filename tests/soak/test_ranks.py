"""Faults of a training of two ranks: one is killed, stopped, cut off, or has numbers that are not finite."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_runs import ROOT, Run, namespaces, root, steps_saved, weights
from tiny_runs import TINIEST, assert_equal_states, free_port

LOST = 75
TIMEOUT = ("--distributed.timeout", "15", "--run.checkpoint_every", "2", "--model.drop_path_rate", "0")
STEPS = ("--optim.steps", "80")
SAME = "the same command goes on"


def two_ranks(start, *options: str, fault: str = "slow steps") -> list[Run]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [start(*TIMEOUT, *options, fault=fault, environment=environment) for environment in ranks]


def assert_goes_on_as_without(start, folder: Path) -> None:
    """To the end, where the state is that of an uninterrupted run."""
    for options in (), ("--run.output_dir", str(folder / "whole")):
        ranks = two_ranks(start, *STEPS, *options)
        assert [rank.status() for rank in ranks] == [0, 0], ranks[0].said()
    assert_equal_states(weights(folder / "run"), weights(folder / "whole"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost(end, tmp_path, start, row) -> None:
    ranks = two_ranks(start, *STEPS)
    ranks[0].wait_for_steps(5)
    ranks[1].send(end)
    began = time.monotonic()
    assert ranks[0].status(120) == LOST, ranks[0].said()
    seconds, last = time.monotonic() - began, ranks[0].said().splitlines()[-1]
    assert "rank 1" in ranks[0].said()
    ranks[1].end()
    saved = steps_saved(tmp_path / "run")
    assert saved >= 4
    assert_goes_on_as_without(start, tmp_path)
    name = {signal.SIGKILL: "killed", signal.SIGSTOP: "paused"}[end]
    assert "Traceback" not in last
    came = f"after {seconds:.0f} s with distributed.timeout 15, step {saved} saved; then bit for bit"
    row(f"a rank is {name}", f"{end.name} to rank 1", "the others name it and end", str(LOST), came, SAME)


def test_torchrun_starts_a_killed_rank_again(tmp_path, row) -> None:
    (tmp_path / "tiniest.yaml").write_text(TINIEST)
    states = []
    for name in ("whole", "run"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "2", str(Path(__file__).with_name("injected.py"))]
        command += ["--config", f"{tmp_path}/tiniest.yaml", "--run.output_dir", f"{tmp_path}/{name}", *TIMEOUT]
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CAPI_FAULT": "slow steps"}
        with (tmp_path / f"log-{name}").open("w") as log:
            launcher = subprocess.Popen(
                [*command, "--optim.steps", "40"], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            if name == "run":
                deadline = time.monotonic() + 120
                while (steps_saved(tmp_path / name) or 0) < 4 and time.monotonic() < deadline:
                    time.sleep(0.05)
                os.kill(worker_of(launcher.pid, rank=1), signal.SIGKILL)
            assert launcher.wait(240) == 0, (tmp_path / f"log-{name}").read_text()[-3000:]
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
        states.append(weights(tmp_path / name))
    assert_equal_states(*states)
    came = "weights and optimisers bit for bit"
    row("a rank is killed under torchrun", "SIGKILL to rank 1", "all ranks start again", "0", came, "nothing")


def worker_of(launcher: int, rank: int) -> int:
    """The process of a rank below torchrun."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (process / "environ").read_text():
                return int(process.name)
        except OSError:  # It has just ended.
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


def test_nan_in_the_gradient_of_one_rank(tmp_path, start, row) -> None:
    ranks = two_ranks(start, "--optim.steps", "9", fault="nan in a gradient")
    assert [rank.status() for rank in ranks] == [0, 0], ranks[0].said()
    state = weights(tmp_path / "run")
    assert all(x.isfinite().all() for x in state["model"].values())
    row(
        "NaN in a gradient of one rank",
        "one number of rank 1",
        "no rank updates",
        "0",
        "goes on, all finite",
        "nothing",
    )


LOOPBACK = """
import fcntl, socket, struct, sys
flags = {"up": 0x1 | 0x8 | 0x40, "down": 0x8}[sys.argv[1]]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags))
"""


@pytest.mark.skipif(not namespaces(), reason="this machine allows no namespaces")
def test_a_network_that_is_cut(tmp_path, start, row) -> None:
    """Both ranks in a network of their own, whose one interface goes down: no packet arrives, no connection breaks."""
    switch = tmp_path / "switch.py"
    switch.write_text(LOOPBACK)
    holder = subprocess.Popen(["unshare", *root(), "--net", "sleep", "600"], start_new_session=True)
    inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
    time.sleep(0.5)
    ranks = []
    try:
        subprocess.run([*inside, sys.executable, str(switch), "up"], check=True)
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        shared["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(2):
            place = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(start(*TIMEOUT, *STEPS, fault="slow steps", environment=place, within=inside))
        ranks[0].wait_for_steps(5)
        subprocess.run([*inside, sys.executable, str(switch), "down"], check=True)
        began = time.monotonic()
        statuses = [rank.status(150) for rank in ranks]
        seconds = time.monotonic() - began
    finally:
        holder.kill()
        holder.wait()
    assert statuses == [LOST, LOST], ranks[0].said()
    saved = steps_saved(tmp_path / "run")
    assert_goes_on_as_without(start, tmp_path)
    came = f"both after {seconds:.0f} s with distributed.timeout 15, step {saved} saved; then bit for bit"
    row("network cut", "the interface goes down", "each rank names what it lost", str(LOST), came, f"mend it; {SAME}")
