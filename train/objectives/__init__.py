"""What a step minimises: one file an objective."""
