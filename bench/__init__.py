"""Benchmarks against real peers, measured in the same run: `python -m bench [spawn|datapath]`.

One line per figure, `name ratio ours theirs unit`, and a JSON file each in bench/results. Absolute numbers
belong to the machine; the ratios are the claim. What each figure means: docs/performance.md.

`spawn.py` and `datapath.py` say what is measured; `scene.py` builds the lab, `bare.py` the same wires
without a guard; `inside/` holds the programs that run where the measuring happens.
"""
