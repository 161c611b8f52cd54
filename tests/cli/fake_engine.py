"""A folder without weights and an engine that writes what a test tells it to, for the commands' own behaviour."""

import json
import sys
import types
from dataclasses import dataclass, field

import numpy as np

from qwen_moe_jax.errors import RequestError
from tests.cases import CASES
from tests.inference.chat_templates import MIXTRAL, QWEN3
from tests.inference.tokenizer_kinds import KINDS

END = "<|im_end|>"
TEMPLATES = {"alternating": MIXTRAL, "thinking": QWEN3}


def write_folder(folder, template: str = "thinking", **generation):
    """A checkpoint without weights."""
    tokenizer = KINDS["byte_level"]
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **CASES["qwen3_moe-plain"].config,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512,
    }
    generation = {"eos_token_id": tokenizer.token_to_id(END), **generation}
    special = {"bos_token": "<|im_start|>", "eos_token": END}
    tokens = {**special, "chat_template": TEMPLATES[template]}
    for name, content in {"config": config, "generation_config": generation, "tokenizer_config": tokens}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@dataclass(frozen=True)
class Chunk:
    index: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: str | None = None


@dataclass
class FakeEngine:
    """Answers with `texts` in turn, `size` tokens a chunk, all rows of a batch alternating.

    Attributes:
        asked: the prompts, as texts, and the configs that came with them.
        on_chunk: called before every chunk.
    """

    texts: list[str]
    size: int = 2
    asked: list[tuple[str, object]] = field(default_factory=list)
    on_chunk: object = lambda: None
    max_length: int | None = None

    def stream(self, model, prompts, configs, enough):
        assert model == "the model"
        rows = [self._chunks(index, *request) for index, request in enumerate(zip(prompts, configs, strict=True))]
        while rows:
            for row in list(rows):
                chunk = next(row, None)
                if chunk is None:
                    rows.remove(row)
                    continue
                self.on_chunk()
                if enough(chunk):
                    rows.remove(row)
                yield chunk

    def session(self, model, max_length):
        self.max_length = max_length
        return types.SimpleNamespace(generate=lambda *request: self.generate(model, *request))

    def generate(self, model, ids, config, enough):
        if len(ids) >= self.max_length:
            raise RequestError(f"the prompt has {len(ids)} tokens: no room.")
        yield from self.stream(model, [ids], [config], enough)

    def _chunks(self, index, prompt, config):
        tokenizer = KINDS["byte_level"]
        self.asked.append((tokenizer.decode(prompt, skip_special_tokens=False), config))
        ids = tokenizer.encode(self.texts[len(self.asked) - 1]).ids
        budget = config.max_new_tokens or len(ids)
        reason = "stop" if ids[-1] in config.eos_token_id and budget >= len(ids) else "length"
        ids = ids[:budget]
        for start in range(0, len(ids), self.size):
            part = tuple(ids[start : start + self.size])
            ended = start + self.size >= len(ids)
            log_probs = tuple(np.arange(start, start + len(part)) / -8)
            yield Chunk(index, part, tuple(map(float, log_probs)), reason if ended else None)


def install(monkeypatch, *texts: str, **settings) -> FakeEngine:
    """Replaces the engine by a fake one, and the model by "the model"."""
    engine = FakeEngine(list(texts), **settings)
    module = types.SimpleNamespace(Chunk=Chunk, stream=engine.stream, Session=engine.session, compilations=lambda: 3)
    monkeypatch.setitem(sys.modules, "qwen_moe_jax.inference.session", module)
    for command in ("generate", "chat"):
        monkeypatch.setattr(f"qwen_moe_jax.cli.{command}.load_model", lambda arguments, generation: "the model")
    return engine
