"""Meshes, and the table of which mesh axes each logical axis is sharded over."""
