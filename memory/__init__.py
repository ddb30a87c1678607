"""KV memory: pages, prefix cache, leases and the transports that ship KV between workers.

Knows nothing of HTTP, Ray or schedulers.
"""
