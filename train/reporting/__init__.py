"""Reporting of a run: progress, metrics.jsonl, TensorBoard, profiles and the report's figures."""
