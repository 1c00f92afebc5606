"""Read bandwidth of each NUMA node from its own cores: a process a node, bound before it touches any memory.

A pool takes its cores from the process's affinity and its memory from wherever it is touched; binding the
process settles both, and it measures as on a machine of one node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from k2hybrid.errors import NativeError
from k2hybrid.hardware.attempts import bind_memory
from k2hybrid.hardware.topology import Node

PROBE_BYTES = 512 << 20
ROUNDS = 3
_TIMEOUT_S = 120


def node_gb_s(nodes: Sequence[Node], probe_bytes: int = PROBE_BYTES) -> dict[int, float]:
    """GB/s (10⁹ bytes) of each node by its id, one after another.

    Raises:
        NativeError: a measurement failed; says why.
    """
    return {node.id: _measured(node, probe_bytes) for node in nodes}


def _measured(node: Node, probe_bytes: int) -> float:
    task = json.dumps({"node": node.id, "cpus": node.threads, "probe_bytes": probe_bytes})
    command = [sys.executable, "-m", "k2hybrid.hardware.node_bandwidth", task]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NativeError(f"node {node.id}: no result within {_TIMEOUT_S} s; is the machine busy?") from None
    try:
        return float(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NativeError(f"the bandwidth of node {node.id} could not be measured: {last}") from None


def main(task: str) -> None:
    """Bind this process as `task` says, measure, and print GB/s."""
    wanted = json.loads(task)
    os.sched_setaffinity(0, wanted["cpus"])
    bind_memory(wanted["node"])  # where it is refused, pages still come from the node that touches them

    # Only now: the extension notes the affinity when it is imported.
    from k2hybrid.hardware.bandwidth import measure
    from k2hybrid.native.machine import Machine

    print(measure(Machine(), wanted["probe_bytes"], ROUNDS).gb_s)


if __name__ == "__main__":
    main(sys.argv[1])
