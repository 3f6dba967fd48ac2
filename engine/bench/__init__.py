"""Benchmarks under the names of `vllm bench`: throughput, latency and start-up in process, serve over HTTP."""
