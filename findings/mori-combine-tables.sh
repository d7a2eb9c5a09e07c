#!/usr/bin/env bash
# amd-mori 1.2.4's tables for MI300X list combine both with zero_copy true (peers fetch) and false (ranks send), and
# so look as if both had been measured. For MI300X every row of the second kind repeats the first, measured time
# included; for MI308X and MI350X none does, and there sending wants other launch sizes. MORI's automatic choice
# believes the copies: a combine that sends gets what was measured for one that fetches.
# Seen: mi300x 21 of 21 rows with both kinds equal; mi308x 0 of 21; mi350x 0 of 21; mi355x 0 of 21.
# Needs pip and network; exits 1 if the tables say something else.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -qq --no-deps --only-binary :all: --python-version 3.10 --implementation cp --abi cp310 \
  --platform manylinux_2_34_x86_64 --platform manylinux_2_35_x86_64 --platform linux_x86_64 -d "$folder" amd-mori==1.2.4
python3 - "$folder"/*.whl <<'PYTHON'
import collections
import json
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
equal, pairs = collections.Counter(), collections.Counter()
for name in wheel.namelist():
    if "/tuning_configs/" not in name or not name.endswith("_combine.json") or "_IntraNode_" not in name:
        continue
    model = name.rsplit("/", 1)[1].split("_")[1]
    by_kind = collections.defaultdict(dict)
    for row in json.loads(wheel.read(name))["rules"]:
        if row["quant_type"] == "none":
            key = row["dtype"], row["hidden_dim"], row.get("topk"), row["num_tokens"]
            fetched = row.pop("zero_copy")
            by_kind[key][fetched] = row
    for kinds in by_kind.values():
        if len(kinds) == 2:
            pairs[model] += 1
            equal[model] += kinds[True] == kinds[False]
found = {model: (equal[model], pairs[model]) for model in sorted(pairs)}
for model, (same, both) in found.items():
    print(f"amd-mori 1.2.4, {model}: {same} of {both} rows with both kinds of combine are equal, times too")
sys.exit(found != {"mi300x": (21, 21), "mi308x": (0, 21), "mi350x": (0, 21), "mi355x": (0, 21)})
PYTHON
