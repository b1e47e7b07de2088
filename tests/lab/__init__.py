"""A small internet in network namespaces, for tests, for the demo and for trying things by hand.

Start at `topology.py`, which has the map; `machine.py` starts it, `internet.py` fills it with servers,
`capture.py` watches the uplink, `daemon.py` runs egressd in it.
"""
