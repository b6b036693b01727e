"""A process with one real router in it, told what to do as chaos/child.py is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from chaos.child import serve_orders
from cluster.identity.folder import config_of
from router.config import RouterConfig
from router.server import RouterServer
from workers.status import WorkerAddress
from workers.trust import parties
from workers.trust.credentials import Credentials


class RouterChild:
    """`spec` has router, port, tokenizer and certificates."""

    def __init__(self, spec: dict[str, Any]) -> None:
        patient: dict[str, Any] = {"max_attempts": 100, "max_lost_workers": 100, "recovery_timeout_s": 120.0}
        config = RouterConfig(
            model=spec["tokenizer"],
            port=spec["port"],
            tick_s=0.05,
            worker_stale_s=3.0,
            shutdown_timeout_s=0.0,
            **patient,
        )
        credentials = Credentials(config_of(Path(spec["certificates"])), parties.router(spec["router"]))
        self._server = RouterServer(config, spec["router"], credentials)

    async def start(self) -> dict[str, Any]:
        return {"url": await self._server.start()}

    async def handle(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["do"]:
            case "workers":
                self._server.set_workers(tuple(WorkerAddress(*one) for one in order["workers"]))
                return {}
            case "census":
                status = await asyncio.to_thread(self._server.status)
                num_up = sum(worker.connected for worker in status.workers)
                return {"running": status.num_running, "waiting": status.num_waiting, "workers": num_up}
            case "stop":
                await self._server.stop()
                return {"left": {}}
        raise ValueError(order)


if __name__ == "__main__":
    logging.basicConfig(
        level=os.environ.get("CHAOS_LOG", "CRITICAL"), format="%(process)d %(asctime)s %(name)s %(message)s"
    )
    asyncio.run(serve_orders(lambda say: RouterChild(json.loads(sys.argv[1]))))
