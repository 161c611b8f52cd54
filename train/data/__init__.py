"""Files and folders → documents → rows of tokens → the batch of a step."""
