"""Exact and near-exact solvers of the sharding problem: reductions, tables, a core, one bucket at a time."""
