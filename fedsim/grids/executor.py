"""Flower's SuperExec, with task processes that are forked from one in which torch and flwr are imported already.

Flower starts an interpreter for each message, which takes seconds to import them. A fork server has no thread and holds
no connection; a task is a process of its own, as before. The SuperExec itself imports neither.
"""

import os
import sys
from multiprocessing import forkserver, get_context
from typing import Any

GRACE = 1.0  # seconds for a task to end after SIGTERM; what it needs again is on disk by then
# What a task's process has imported when it begins; nothing of an app's own, since that may come with the task.
PRELOADED = ["torch", "safetensors.torch", "pydantic", "flwr.supernode.cli", "flwr.superlink.cli"]


def superexec() -> None:
    """Take the work of a SuperLink or a SuperNode, as ``flower-superexec`` does and with its arguments."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.superlink.cli import flwr_serverapp
    from flwr.supernode.cli import flwr_clientapp

    commands = {TaskType.SERVER_APP: flwr_serverapp, TaskType.CLIENT_APP: flwr_clientapp}
    forks = get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()  # now, and not when the first message comes
    tasks: list[Any] = []

    class Forks(SubprocessExecutor):
        def launch(self, spec: ExecutionSpec) -> LaunchResult:
            if spec.task_type not in commands:
                return LaunchResult.failed(f"{spec.task_type} is not run here")
            tasks[:] = [task for task in tasks if task.is_alive()]
            tls = ["--insecure"] if spec.insecure else ["--root-certificates", str(spec.root_certificates_path)]
            address, parent = ["--runtime-api-address", spec.runtime_api_address], ["--parent-pid", str(os.getpid())]
            sys.argv = [spec.task_type, *address, *parent, *tls, "--token", spec.token]  # a fork has our arguments
            tasks.append(forks.Process(target=commands[spec.task_type]))
            tasks[-1].start()
            return LaunchResult.accepted()

        def close(self) -> None:
            """The end: let every task stop as it does for SIGTERM, a run with its checkpoint."""
            for task in tasks:
                task.terminate()
            for task in tasks:
                task.join(GRACE)
                task.kill()
            if sys.exc_info()[0] is None:  # SIGTERM; to take an interpreter apart takes longer than all the rest
                os._exit(0)

    run_superexec.get_executor = lambda *args, **kwargs: Forks()  # type: ignore[attr-defined]
    flower_superexec()
