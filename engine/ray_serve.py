"""A Ray Serve application: `serve run engine.ray_serve:build model=PATH replicas=2 tensor_parallel_size=4`.

Each replica is a process with an engine of its own behind the same routes that `engine.serve` has. Needs the `[ray]`
extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from absl import flags

from engine.command_line import parse
from engine.config import EngineConfig, config_from_flags, define_flags
from engine.server.app import Api, make_app
from engine.server.driver import Driver
from engine.server.metrics import Metrics
from engine.server.options import ServerOptions


class EngineApp:
    """The server's ASGI application; its engine starts with the replica's process, and ends with it."""

    def __init__(self, config: EngineConfig, options: ServerOptions):
        self.config, self.options = config, options
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        def load():
            from engine.startup import start

            return start(self.config)

        await receive()
        metrics = Metrics(self.options.served_model_name[0])
        driver = Driver(load, self.options, metrics)
        api = Api(driver, metrics, self.options)
        self._app = make_app(api)
        driver.thread.start()
        waits = [asyncio.ensure_future(event.wait()) for event in (driver.loaded, driver.ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if driver.failure is not None:
            await send({"type": "lifespan.startup.failed", "message": str(driver.failure)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        driver.closed = True
        driver.stop()
        await waits[1]
        api.close()
        await send({"type": "lifespan.shutdown.complete"})


def build(arguments: Mapping[str, str]) -> Any:
    """EngineConfig's settings, `replicas`, and `accelerators` a replica of `resource` (GPU or TPU) -> the application.

    Errors: ValueError that names the setting.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]  an extra

    given = dict(arguments)
    replicas, count = int(given.pop("replicas", 1)), float(given.pop("accelerators", 0))
    resource = given.pop("resource", "GPU")
    values = flags.FlagValues()
    define_flags(values)
    parse(values, ["ray_serve", *(f"--{name}={value}" for name, value in given.items())])
    config = config_from_flags(values)
    ingress = EngineApp(config, ServerOptions(served_model_name=(config.model,)))
    actor: dict[str, Any] = {"num_gpus": count} if resource == "GPU" else {"resources": {resource: count}}

    @serve.deployment(num_replicas=replicas, ray_actor_options=actor if count else {}, max_ongoing_requests=1024)
    @serve.ingress(ingress)
    class Quire:
        pass

    return Quire.bind()  # pyright: ignore[reportAttributeAccessIssue]  the decorator's
