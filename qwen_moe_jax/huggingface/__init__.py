"""Everything that knows a Hub name: configurations, tensor names, reading and writing checkpoint folders."""
