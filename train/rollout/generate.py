"""Completions of prompts, sampled by the package's engine from the parameters that are trained."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.inference.programs import padded_cache
from qwen_moe_jax.inference.request import Chunk
from qwen_moe_jax.inference.tokenizer import Tokenizer, decode
from qwen_moe_jax.model.cache import Cache
from train.config import TrainConfig
from train.data.corpus import Corpus
from train.initial import export_generation_config
from train.parameters import Params
from train.program import Program
from train.rollout.batch import Rollout
from train.rollout.prompts import Prompt


def seed_of(*parts: object) -> int:
    """A seed of 64 bits that depends on these parts alone: run, rollout, prompt and number of the completion."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a run samples completions.

    Attributes:
        graph: of the model in eval mode.
        config: of sampling, without a seed.
        tokenizer: the model's.
        rows: completions that are generated at a time.
        max_length: tokens of a row of the cache.
    """

    graph: nnx.GraphDef
    config: GenerationConfig
    tokenizer: Tokenizer
    rows: int
    max_length: int

    @classmethod
    def of(cls, config: TrainConfig, program: Program, corpus: Corpus) -> "Sampling":
        """As the config says; completions end as texts of the exported model do."""
        grpo = config.grpo
        assert grpo is not None
        return cls(
            graph=program.eval_graph,
            config=GenerationConfig(
                do_sample=True,
                max_new_tokens=grpo.max_completion_length,
                eos_token_id=export_generation_config(config, program.model.config, corpus).eos_token_id,
                temperature=grpo.temperature,
                top_k=grpo.top_k,
                top_p=grpo.top_p,
                min_p=grpo.min_p,
                repetition_penalty=grpo.repetition_penalty,
            ),
            tokenizer=corpus.tokenizer,
            rows=grpo.rollout_batch_size or config.data.batch_size,
            max_length=config.data.seq_len,
        )

    def cache(self, program: Program) -> Cache:
        """The abstract cache of keys and values."""
        assert isinstance(program.model, qmj.CausalLM)
        return padded_cache(program.model, self.rows, self.max_length, None)[2]

    def sample(self, params: Params, requests: Sequence[tuple[Prompt, int]]) -> list[Rollout]:
        """A completion of every request, in their order, by the package's engine on these very arrays.

        The shapes of its cache are those of every call, so that a run compiles the programs once.

        Args:
            params: all parameters; the engine keeps no reference to them.
            requests: prompts, each with the seed of its random numbers.
        """
        model: qmj.CausalLM = nnx.merge(self.graph, params)
        is_sparse = model.config.num_sparse_layers > 0
        session = qmj.Session(model, self.max_length, rows=self.rows, return_routing=is_sparse)
        rollouts: list[Rollout] = []
        for start in range(0, len(requests), self.rows):
            part = requests[start : start + self.rows]
            configs = [dataclasses.replace(self.config, seed=seed) for _, seed in part]
            chunks: list[list[Chunk]] = [[] for _ in part]
            for chunk in session.run([list(prompt.token_ids) for prompt, _ in part], configs, lambda chunk: False):
                chunks[chunk.index].append(chunk)
            rollouts += [
                _rollout(prompt, parts, self.tokenizer) for (prompt, _), parts in zip(part, chunks, strict=True)
            ]
        return rollouts


def _rollout(prompt: Prompt, parts: Sequence[Chunk], tokenizer: Tokenizer) -> Rollout:
    token_ids = tuple(token for part in parts for token in part.token_ids)
    ended = parts[-1].finished == "stop"
    routing = [part.routing for part in parts if part.routing is not None]
    read = len(prompt.token_ids) + len(token_ids) - 1  # the last token was chosen, and not read
    return Rollout(
        prompt=prompt,
        token_ids=token_ids,
        log_probs=np.array([log_prob for part in parts for log_prob in part.log_probs], np.float32),
        experts=np.concatenate(routing, axis=1)[:, :read] if routing else None,
        text=decode(tokenizer, token_ids[:-1] if ended else token_ids),
        truncated=not ended,
    )
