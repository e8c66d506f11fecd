"""Makes what lies here: a tiny checkpoint as the released discriminator's are, and what it gives.

    pip install transformers==4.57.1; python tests/released/make.py

It needs that version of transformers, whose own code writes the weights: experts transposed, as
(E, h, 2i) and (E, i, h), names and config as it has them. The score head lies beside, as
`v_head.1.weight`. `expected.safetensors` holds a prompt with an image and two branches, the last
hidden state of that version's own forward of prompt + branch, and the scores.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

assert transformers.__version__ == "4.57.1"
here = Path(__file__).resolve().parent
ids = dict(image_token_id=40, video_token_id=41, vision_start_token_id=42, vision_end_token_id=43)
text = dict(
    vocab_size=44,
    hidden_size=8,
    intermediate_size=16,
    moe_intermediate_size=6,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rope_theta=10000.0,
    rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
)
vision = dict(
    depth=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=2,
    patch_size=4,
    out_hidden_size=8,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)
torch.manual_seed(0)
config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
model = Qwen3VLMoeForConditionalGeneration(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
model.bfloat16()
head = torch.randn(1, 8).bfloat16()
model.save_pretrained(here, state_dict={**model.state_dict(), "v_head.1.weight": head})
(here / "generation_config.json").unlink()

model = Qwen3VLMoeForConditionalGeneration.from_pretrained(here, dtype=torch.float32).eval()
grid = torch.tensor([[1, 4, 6]])
pixels = torch.randn(24, 3 * 2 * 4 * 4)
prompt = torch.tensor([1, 2, 42, *[40] * 6, 43, 3, 4])
branches = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
hidden = []
for branch in branches:
    row = torch.cat([prompt, branch])[None]
    with torch.no_grad():
        out = model.model(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            pixel_values=pixels,
            image_grid_thw=grid,
        )
    hidden.append(out.last_hidden_state[0, -1])
hidden = torch.stack(hidden)
named = {f"branch_{i}": branch for i, branch in enumerate(branches)}
named |= dict(prompt=prompt, pixel_values=pixels, image_grid_thw=grid)
named |= dict(hidden=hidden, scores=(hidden @ head.float().T)[:, 0])
save_file(named, here / "expected.safetensors")
