"""One engine over several processes: the first one plans every step, the others compute their part of it.

Each process runs the same program. After `jax.distributed` has joined their devices, process 0 (the leader) listens at
an address that the user names, and every other process (a follower) connects to it once. What is sent is msgpack; a
follower executes nothing but steps that it has compiled itself.
"""
