"""The next-token head is transformers' `MtpModel`, whatever layout its experts are stored in."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwen_moe_jax as qmj
from tests.distance import assert_near
from tests.referee import implementations, torch, transformers

#: float32, one layer more than the decoder, whose logits are held to 3e-5 (tests/model/test_logits.py).
TOLERANCE = 3e-5


def head_tensors(config, fused: bool) -> dict[str, np.ndarray]:
    """Random tensors of a next-token head, named and shaped as the families' files have them."""
    width, heads, kv_heads, size = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    layer = "mtp.layers.0"
    shapes = {
        "mtp.fc.weight": (width, 2 * width),
        **{f"mtp.{name}.weight": (width,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")},
        **{f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")},
        f"{layer}.self_attn.q_proj.weight": (2 * heads * size, width),
        f"{layer}.self_attn.k_proj.weight": (kv_heads * size, width),
        f"{layer}.self_attn.v_proj.weight": (kv_heads * size, width),
        f"{layer}.self_attn.o_proj.weight": (width, heads * size),
        f"{layer}.self_attn.q_norm.weight": (size,),
        f"{layer}.self_attn.k_norm.weight": (size,),
    }
    experts = getattr(config, "num_experts", 0)
    if not experts:
        shapes |= mlp_shapes(f"{layer}.mlp", width, config.intermediate_size)
    else:
        inner = config.moe_intermediate_size
        shapes |= {f"{layer}.mlp.gate.weight": (experts, width), f"{layer}.mlp.shared_expert_gate.weight": (1, width)}
        shapes |= mlp_shapes(f"{layer}.mlp.shared_expert", width, config.shared_expert_intermediate_size)
        if fused:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, width)
            shapes[f"{layer}.mlp.experts.down_proj"] = (experts, width, inner)
        else:
            for expert in range(experts):
                shapes |= mlp_shapes(f"{layer}.mlp.experts.{expert}", width, inner)
    numbers = np.random.default_rng(5)
    return {name: (0.1 * numbers.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def mlp_shapes(name: str, width: int, inner: int) -> dict[str, tuple[int, int]]:
    sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"{name}.{matrix}.weight": shape for matrix, shape in sizes.items()}


def with_head(reference, folder, *, fused: bool):
    """The reference's checkpoint and a next-token head."""
    shutil.copytree(reference.folder, folder)
    [file] = folder.glob("*.safetensors")
    save_file({**load_file(file), **head_tensors(reference.config.get_text_config(), fused)}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_losses(folder, case, tokens) -> np.ndarray:
    """-log p of the token after the next, [B, T - 2]."""
    from transformers.modeling_layers import MtpModel

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **implementations(case))
    model.config.num_mtp_layers, model.config.mtp_layer_types = 1, ["full_attention"]
    head = MtpModel.from_pretrained(model.eval()).eval()
    ids = torch.tensor(tokens)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][:, :-1]
        positions = torch.arange(1, ids.shape[1])[None].expand(len(ids), -1)
        states = head.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        log_probs = torch.log_softmax(model.lm_head(states)[:, :-1].float(), dim=-1)
        return -log_probs.gather(-1, ids[:, 2:, None].long())[..., 0].numpy()


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("qwen3_next-norm_topk_prob_off", False),
        ("qwen3_5_text-one_kv_head", False),
        ("qwen3_5_moe-top_1", False),
        ("qwen3_5_moe-top_1", True),
    ],
)
def test_losses_are_those_of_transformers_head(references, tmp_path, name, fused):
    reference = references[name]
    folder = with_head(reference, tmp_path / "model", fused=fused)
    tokens = np.random.default_rng(1).integers(0, reference.case.text_config["vocab_size"], (3, 17))
    expected = transformers_losses(folder, reference.case, tokens)
    model = qmj.from_pretrained(folder)
    assert model.config.num_mtp_layers == 1
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    found = model.token_losses(tokens, targets, mtp=True).mtp_losses[:, :-2]
    assert expected.std() > 0.03
    assert_near(found - expected.mean(), expected - expected.mean(), 10 * TOLERANCE, "losses")
    assert_near(found, expected, TOLERANCE, "losses")
    qmj.save_pretrained(model, tmp_path / "again")
    again = qmj.from_pretrained(tmp_path / "again")
    for one, other in zip(jax.tree.leaves(model.mtp), jax.tree.leaves(again.mtp), strict=True):
        assert (np.asarray(one) == np.asarray(other)).all()
    assert qmj.from_pretrained(folder, drop_mtp=True).mtp is None
