"""Planner: compiles any step without its hardware, and reports its memory, collectives and bounds."""
