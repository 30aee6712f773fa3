"""Training where the cluster is Ray's: Ray Train finds the nodes, holds them together, and starts them again when one is lost.

In: a launch's node script, started as a Ray job (`python -m launch.ray_train`, see `ray_job.py`). Out: on each node, the supervisor that
every other launcher starts, too; the job ends with the supervisors' exit status. One Ray worker stands for one node, not for one device:
the lease, `attempts.jsonl`, the bound on attempts without progress, our own commits and the ranks stay the supervisors'. So does the
process group: `DataParallelTrainer` is `TorchTrainer` without one that nobody would use. Whichever node Ray calls the first one keeps the
rendezvous; it need not be the head, and after a loss it may be another one.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

END_WITH_WORKER = ("setpriv", "--pdeathsig", "KILL")
"""Of util-linux. Ray ends a worker without asking it; the supervisor must not live on, or it would hold the run against the next one."""
SET_BY_RAY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_node(launch: dict[str, Any]) -> int:
    """One node, in a Ray worker: its supervisor's exit status. Raises RuntimeError where that was killed, so that Ray begins anew.

    launch: `script`, the node script's path, on a file system that all nodes share; `port`, of the rendezvous on the first node.
    """
    import ray.train
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    node = ray.train.get_context().get_world_rank()
    first = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{launch['port']}" if node == 0 else None)
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_RAY}
    command = [*END_WITH_WORKER, "bash", launch["script"], str(node), str(first)]
    status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
    if status < 0:
        raise RuntimeError(f"the supervisor of node {node} was ended by signal {-status}")
    return status


def train_on_ray(launch: dict[str, Any], nodes: int, cpus: int, gpus: int, records: Path, stop_file: Path) -> int:
    """Run every node to its end, on as many different hosts as there are nodes. Returns the exit status of the first one.

    A lost worker or host ends all supervisors, and Ray starts them again as soon as it has nodes enough; how often that may happen
    without a new checkpoint is theirs to say. records: where Ray keeps its own, shared by all. stop_file: made when this process is told
    to end (`ray job stop` sends SIGTERM), which stops the run politely, on all nodes.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def stop(number: int, frame: FrameType | None) -> None:
        stop_file.touch()

    ray.init()
    signal.signal(signal.SIGTERM, stop)  # behind `init`, which sets its own
    resources = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
    scaling = ScalingConfig(
        num_workers=nodes, use_gpu=gpus > 0, resources_per_worker=resources, placement_strategy="STRICT_SPREAD" if nodes > 1 else "PACK"
    )
    run = RunConfig(name="ray", storage_path=str(records), failure_config=FailureConfig(max_failures=-1))
    result = DataParallelTrainer(run_node, train_loop_config=launch, scaling_config=scaling, run_config=run).fit()
    return cast(int, result.return_value)  # of the first node; Ray 2.60 has it, 2.54 had not


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m launch.ray_train NODE_SCRIPT --nodes 2 --gpus 8 --stop-file RUN/STOP`, as the driver of a Ray job. Its exit status."""
    parser = argparse.ArgumentParser(prog="launch.ray_train", description=main.__doc__)
    parser.add_argument("script", help="what each node runs: bash SCRIPT NODE HOST:PORT")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cpus", type=int, default=1, help="that a node's worker is given")
    parser.add_argument("--gpus", type=int, default=0, help="of a node")
    parser.add_argument("--port", type=int, default=29400, help="of the rendezvous")
    parser.add_argument("--stop-file", type=Path, required=True)
    given = parser.parse_args(arguments)
    launch = {"script": given.script, "port": given.port}
    return train_on_ray(launch, given.nodes, given.cpus, given.gpus, Path(given.script).parent, given.stop_file)


if __name__ == "__main__":
    sys.exit(main())
