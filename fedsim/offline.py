"""No telemetry, no update check, no hub: set before anything of Flower's or Ray's is imported."""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}

# Ray asks a cloud's metadata service where it is, unless a file of this name in its home says that it is local.
CLUSTER_FILE = "ray_bootstrap_config.yaml"
CLUSTER = "cluster_name: local\nprovider: {type: local}\navailable_node_types: {}\n"


def prepare() -> None:
    """Switch off what would talk to the outside, and give each process one thread (more change the sums)."""
    os.environ.update(QUIET)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
