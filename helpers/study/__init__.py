"""The experiment: tasks, specialists, visits of merges, what they lost, and the tables of it.

Its modules are its door: what reads tables or makes a plan imports no torch. Read in this order:
archives, models, generators, sources, tasks, specialists (what is merged); plan, groups, design,
costs (which visits); identity, bench, deltas, readings, executor, visit (the visits); scores,
frames, geometry, losses, failures (what they found); schema, tables (what is written and read).
"""
