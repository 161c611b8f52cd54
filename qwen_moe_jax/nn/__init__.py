"""The plain building blocks that both the decoder and its sparse block are made of."""
