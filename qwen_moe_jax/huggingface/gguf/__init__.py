"""Checkpoints as one GGUF file for llama.cpp: names, metadata and tokenizer by that project's conventions."""
