"""What egressd needs of a machine, and what to conclude from what was found. PURE: facts in, findings out."""
