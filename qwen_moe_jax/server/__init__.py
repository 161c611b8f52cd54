"""The OpenAI-compatible HTTP server: requests in, the engine's tokens out. It needs the extra `serve`."""
