"""The data pipeline: files → records → documents of token ids → packed rows → the batch of a step."""
