"""The only package that knows model names of the Hub: configs, tensor names, reading and writing checkpoint folders."""
