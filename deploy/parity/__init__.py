"""Proof that a bundle computes what its source model computes: metrics, budgets, levels of comparison, one verdict."""
