"""What a run says of itself: while it goes, in metrics.jsonl, and on its page."""
