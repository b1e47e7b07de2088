"""EFFECTS: one process for each request, forked from a zygote without threads: projects, runs, destroys."""
