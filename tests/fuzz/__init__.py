"""Whatever reads foreign bytes, fuzzed: `targets.py` is the table, `corpus/` what was worth keeping."""
