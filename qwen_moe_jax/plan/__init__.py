"""Any step, compiled without its hardware: does it fit, what does it send, what bounds it."""
