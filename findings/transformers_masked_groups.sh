#!/bin/sh
# transformers: the group-limited routers of DeepSeek-V3, GLM-4 MoE and dots1 choose other experts from 5.6.0 on.
#
# Up to 5.5.4 experts outside the kept groups are filled with 0.0, since 5.6.0 with -inf. The release is a minor
# one, the weights and the config are the same. Where the selection bias makes scores of the kept groups
# negative, 0.0 wins, and a token is sent to a group that it was not to go to. DeepSeek-V2 keeps 0.0 in all of
# them, which does no harm there, because its scores are a softmax without a bias.
#
# 8 experts in 4 groups, of which 1 is kept, top_k 2, bias -0.5, 64 tokens. Seen with torch 2.13.0:
#   transformers  5.5.4: tokens outside their best group: deepseek_v3 30, glm4_moe 30, dots1 30
#   transformers  5.6.0: tokens outside their best group: deepseek_v3 0, glm4_moe 0, dots1 0
#   transformers 5.24.0: tokens outside their best group: deepseek_v3 0, glm4_moe 0, dots1 0
# Exits with another status than 0 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
for version in 5.5.4 5.6.0 5.24.0; do
  "$folder/venv/bin/pip" install -q --target "$folder/$version" "transformers==$version"
done

cat > "$folder/count.py" <<'PYTHON'
import importlib
import sys

import torch
import transformers

KINDS = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe", "dots1": "Dots1"}
EXPERTS, GROUPS, HIDDEN, TOKENS = 8, 4, 16, 64


def outside(module, name):
    """Tokens with a route outside the group with the largest sum of its two experts."""
    package = f"transformers.models.{module}"
    config = getattr(importlib.import_module(f"{package}.configuration_{module}"), f"{name}Config")(
        hidden_size=HIDDEN,
        moe_intermediate_size=8,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=GROUPS,
        topk_group=1,
    )
    config._experts_implementation = "eager"
    block = getattr(importlib.import_module(f"{package}.modeling_{module}"), f"{name}MoE")(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.gate.e_score_correction_bias.fill_(-0.5)
    ids = []
    block.experts.register_forward_pre_hook(lambda module, args: ids.append(args[1]))
    x = torch.randn(1, TOKENS, HIDDEN)
    with torch.no_grad():
        block(x)
        choice = (x[0] @ block.gate.weight.T).sigmoid() - 0.5
    best = choice.view(TOKENS, GROUPS, -1).sum(-1).argmax(-1, keepdim=True)
    return int((ids[0] // (EXPERTS // GROUPS) != best).any(-1).sum())


version, expected = sys.argv[1], sys.argv[2]
assert transformers.__version__ == version, transformers.__version__
found = ", ".join(f"{module} {outside(module, name)}" for module, name in KINDS.items())
print(f"transformers {version:>6}: tokens outside their best group: {found}")
sys.exit(found != expected)
PYTHON

count() {
  PYTHONPATH="$folder/$1" "$folder/venv/bin/python" "$folder/count.py" "$1" "$2"
}
count 5.5.4 "deepseek_v3 30, glm4_moe 30, dots1 30"
count 5.6.0 "deepseek_v3 0, glm4_moe 0, dots1 0"
count 5.24.0 "deepseek_v3 0, glm4_moe 0, dots1 0"
