"""Generate: several prompts in one batch, greedy and sampled, and a conversation that keeps its cache.

    python examples/generate.py

The model is a random one that reads and writes bytes, so its text is noise. A checkpoint folder as the first argument
gives words: python examples/generate.py path/to/Qwen3-0.6B
"""

import sys
from pathlib import Path

from flax import nnx

import qwen_moe_jax as qmj

HERE = Path(__file__).parent


def main(folder: str | None = None) -> None:
    if folder is None:
        model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json"), rngs=nnx.Rngs(0))
        prompts = [list(b"def add(a, b):"), list(b"class")]
    else:
        model, prompts = qmj.from_pretrained(folder), ["def add(a, b):", "class"]

    print("greedy; token ids for token ids, text for text:")
    for continuation in qmj.generate(model, prompts, max_new_tokens=12, tokenizer=folder):
        print("  ", continuation)

    print("sampled, a config for each prompt; a seed gives the same tokens in any batch:")
    configs = [qmj.GenerationConfig(do_sample=True, temperature=0.8, seed=seed, max_new_tokens=6) for seed in (1, 2)]
    together = qmj.complete(model, prompts, configs, tokenizer=folder)
    [alone] = qmj.complete(model, prompts[1:], configs[1:], tokenizer=folder)
    for completion in together:
        log_probs = ", ".join(f"{log_prob:.2f}" for log_prob in completion.log_probs)
        print(f"   {completion.token_ids}, ended by {completion.finished}, log-probabilities {log_probs}")
    same = alone.token_ids == together[1].token_ids
    print("   the second prompt alone:", alone.token_ids, "(the same)" if same else "(differs)")

    print("a session, which reads only what is new of a conversation:")
    config = qmj.GenerationConfig(max_new_tokens=6)
    session, turn = qmj.Session(model, max_length=64), list(b"Hello. ")
    for _ in range(2):
        answer = [token for chunk in session.generate(turn, config) for token in chunk.token_ids]
        print(f"   a conversation of {len(turn)} tokens, answered by {answer}")
        turn += [*answer, *b" And then? "]


if __name__ == "__main__":
    main(*sys.argv[1:])
