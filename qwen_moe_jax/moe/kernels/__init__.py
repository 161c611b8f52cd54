"""Grouped matmuls on accelerators: one module per maker, each with the same two functions, imported only when used."""
