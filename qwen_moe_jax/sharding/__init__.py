"""Meshes, and the one table that says which axis of an array lies along which axis of the mesh."""
