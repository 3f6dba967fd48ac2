"""The HTTP server with OpenAI's interface: `run()` keeps a process alive around one engine core."""

from engine.server.options import ServerOptions
from engine.server.run import run

__all__ = ["ServerOptions", "run"]
