"""No telemetry, no update check, no hub: set before anything of Flower's or Ray's is imported, or corrected after."""

import os
import sys

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
    # A script may have imported them already, and they look at the environment at that moment only.
    late: list[tuple[str, str, object]] = [("flwr.supercore.telemetry", "FLWR_TELEMETRY_ENABLED", "0")]
    if os.environ["HF_HUB_OFFLINE"] == "1":
        late += [(module, "HF_HUB_OFFLINE", True) for module in ("huggingface_hub.constants", "datasets.config")]
    for module, name, value in late:
        if module in sys.modules:
            setattr(sys.modules[module], name, value)
