"""/v1/embeddings: texts as vectors."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_moe_jax.server.errors import ApiError, invalid
from qwen_moe_jax.server.http import CLIENT_GONE, unless_gone
from qwen_moe_jax.server.protocol import MOST_SEQUENCES, EmbeddingRequest, parse
from qwen_moe_jax.server.runner import EngineFailed
from qwen_moe_jax.server.service import Service


async def embeddings(service: Service, http: HttpRequest) -> Response:
    """Answers one request.

    Raises:
        ApiError: it cannot be served.
    """
    body = parse(EmbeddingRequest, await service.limits.body_of(http))
    if service.adapter_of(body.model) is not None:
        raise invalid(f"model: embeddings are those of {service.name}, without an adapter.", "model")
    if service.embedder is None:
        raise ApiError(404, "this server was started without embeddings (--embeddings off).", code="no_embeddings")
    prompts = await service.encoded(body.input, "input")
    longest = max(map(len, prompts))
    if longest > service.embedder.max_length:
        most = service.embedder.max_length
        raise invalid(f"input has {longest} tokens, expected at most {most}.", "input", code="context_length_exceeded")
    if len(prompts) > MOST_SEQUENCES:
        raise invalid(f"input has {len(prompts)} texts, expected at most {MOST_SEQUENCES}.", "input")
    try:
        vectors = await unless_gone(http.receive, service.runner.call(lambda: service.embedder.embed(prompts)))
    except EngineFailed as error:
        raise ApiError(500, f"the engine has failed ({error}).", code="engine_failed") from None
    if vectors is None:
        return Response(status_code=CLIENT_GONE)
    read = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": number, "embedding": _encoded(vector, body.encoding_format)}
        for number, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "data": data, "model": body.model or service.name, "usage": usage})


def _encoded(vector: np.ndarray, form: str) -> Any:
    """Numbers, or little-endian float32 in base64."""
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
