"""egressctl, one file per verb. `main` knows the table of verbs; the rest is loaded when asked for."""
