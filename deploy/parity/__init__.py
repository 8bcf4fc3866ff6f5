"""Proof that a bundle computes what its source model computes: metrics, budgets, three levels, one gate. No torch."""
