"""The doctor's report for people."""

from __future__ import annotations

import os
import platform
from typing import Any

from jax_moriep.doctor import mori
from jax_moriep.doctor.facts import PACKAGES
from jax_moriep.runtime import settings


def as_text(facts: dict[str, Any]) -> str:
    """What ``facts.examine`` found, for people."""
    versions = facts["versions"]
    installed = [f"{name} {versions[name]}" for name in PACKAGES if versions[name]]
    missing = [name for name in PACKAGES if not versions[name]]
    lines = [
        f"jax_moriep {versions['jax_moriep']}, Python {versions['python']}, {platform.platform()}, "
        f"{os.cpu_count()} CPUs",
        f"  {', '.join(installed)} (XLA FFI API {facts['ffi_api']})",
    ]
    if missing:
        lines.append(f"  not installed: {', '.join(missing)}")

    lines.append("devices")
    if facts["platforms_error"]:
        lines.append(f"  none: {facts['platforms_error']}")
    for name, devices in facts["platforms"].items():
        lines.append(f"  {name}: {len(devices)} ({', '.join(dict.fromkeys(devices))})")

    lines.append("native libraries")
    for backend, state in facts["libraries"].items():
        built = f"{state['path']}, built for XLA FFI API {state['ffi_api']}"
        lines.append(_line(backend, state["reason"], built))

    for kind, title in (("transport", "transports"), ("experts", "experts")):
        for name in facts["platforms"]:
            lines.append(f"{title} on {name} (auto takes {facts['chosen'][name][kind] or 'nothing'})")
            for choice, why in facts[title][name].items():
                lines.append(_line(choice, why))
                if kind == "experts" and choice in facts["experts_details"][name]:
                    lines.append(f"      {facts['experts_details'][name][choice]}")
            if kind == "transport" and name in facts["native_dispatch"]:
                lines.append(f"      native {facts['native_dispatch'][name]}")

    lines.append("what the native transport needs of this machine")
    lines += [_line(name, why) for name, why in facts["machine"].items()]
    lines += mori.lines(facts["mori"])
    lines += settings.lines(facts["settings"])
    if facts["environment"]:
        lines.append("environment")
        lines += [f"  {name}={value}" for name, value in facts["environment"].items()]
    lines.append("the default path can run" if facts["ok"] else "the default path can NOT run")
    return "\n".join(lines)


def _line(name: str, reason: str | None, detail: str = "can run") -> str:
    return f"  ok  {name}: {detail}" if reason is None else f"  no  {name}: {reason}"
