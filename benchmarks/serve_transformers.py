"""transformers' continuous batching behind the least HTTP that `serve.py` needs: `python … FOLDER PORT DTYPE`.

`transformers serve` runs the same manager behind FastAPI; this has less between the manager and the socket.
"""

import asyncio
import json
import sys

import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import ContinuousBatchingConfig, GenerationConfig


def make_app(folder: str, dtype: str) -> Starlette:
    """/health, and /v1/completions for token ids, streamed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    words = transformers.AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
    )
    manager.start()

    async def completions(request: Request) -> Response:
        body = await request.json()
        results: asyncio.Queue = asyncio.Queue()
        name = f"request-{id(results)}"
        manager.register_result_handler(name, results.put_nowait)
        manager.add_request(body["prompt"], name, max_new_tokens=body["max_tokens"], streaming=True)

        async def events():
            sent, ended = 0, False
            while not ended:
                result = await results.get()
                ended = result.is_finished()
                tokens = list(result.generated_tokens)
                if len(tokens) > sent:
                    text = "".join(f" {word}" for word in words.convert_ids_to_tokens(tokens[sent:]))
                    yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
                    sent = len(tokens)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    return Starlette(
        routes=[Route("/v1/completions", completions, methods=["POST"]), Route("/health", health, methods=["GET"])]
    )


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1], sys.argv[3]), port=int(sys.argv[2]), log_level="warning")
