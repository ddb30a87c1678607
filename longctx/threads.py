"""How threads of several processes share the cores of one machine."""

# Idle threads of one process must not take cores from the next one: a short spin, then sleep.
THREAD_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
