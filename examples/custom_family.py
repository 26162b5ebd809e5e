"""A model family that Tsugiki does not know, described in a few lines:  python examples/custom_family.py

A Family says where the parts are. Then every method works on the model, and so do merging, saving and generating.
"""
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import tsugiki as tg


def main() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)).eval()
    try:
        tg.attach(model)
    except tg.UserError as e:
        print(f"without a description: {e}")

    family = tg.Family(
        layers="model.layers", embed="model.embed_tokens", rotary="model.rotary_emb",
        linears={"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
                 "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"})
    adapters = tg.attach(model, family=family)
    adapter = adapters.add("mine", tg.LoRA(rank=4, targets=("q", "v", "down")))
    print(f"{len(adapter.edits)} sites, the first {next(iter(adapter.edits))}")
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.normal_(0, 0.1)                 # as if trained
        ids = torch.arange(8)[None]
        unmerged = model(input_ids=ids).logits
        report = adapters.merge("mine")
        print(f"merged into {report.modules} modules; logits differ by {(model(input_ids=ids).logits - unmerged).abs().max():.1e}")


if __name__ == "__main__":
    main()
