"""Batch files in OpenAI's format, answered by the engine in process: `python -m engine.batch`."""
