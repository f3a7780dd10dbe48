"""Write the table "what do I need?" of docs/planning.md: python tools/plan_table.py"""

from __future__ import annotations

import math
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.planning.advise import Choice, Request, recommend  # noqa: E402
from rm_scale.planning.group_lengths import full_rows  # noqa: E402
from rm_scale.planning.hardware import Device, known_devices  # noqa: E402
from rm_scale.planning.scenario import Method  # noqa: E402
from rm_scale.planning.shape import shape_from_config  # noqa: E402
from rm_scale.tiers import model_tier  # noqa: E402

DEVICES = ("4090", "l40s", "a100-40g", "a100-80g", "h100-80g", "h200")
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
MAX_LENGTH = 2048
PAGE = REPOSITORY / "docs" / "planning.md"
BEGIN, END = "<!-- needs:begin -->", "<!-- needs:end -->"


def smallest(tier: str, method: Method, device: Device) -> tuple[int, Choice] | None:
    """Return the smallest power of two of devices that fits with nothing offloaded, and the choice for it."""
    shape = shape_from_config(model_tier(tier).config)
    count = 1
    while count <= 64:
        nodes = math.ceil(count / device.devices_per_node)
        request = Request(tier, shape, method, device, count, nodes, MAX_LENGTH, full_rows(MAX_LENGTH), offload="none")
        best = recommend(request)
        if best.estimate.fits:
            return count, best
        count *= 2
    return None


def cell(tier: str, method: Method, device: Device) -> str:
    """Return a cell's text: devices, peak memory and pairs per second."""
    found = smallest(tier, method, device)
    if found is None:
        return "more than 64"
    count, best = found
    low, high = best.estimate.pairs_per_second
    stage = f"ZeRO-{best.zero_stage}" if best.zero_stage else "no ZeRO"
    speed = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g}-{high:.2g}"
    return f"{count} ({stage}, {best.estimate.peak_memory_bytes / 1e9:.0f} GB, {speed}/s)"


def table() -> str:
    """Return the table in Markdown."""
    devices = [known_devices()[name] for name in DEVICES]
    lines = ["| | " + " | ".join(device.title for device in devices) + " |", "|---" * (len(devices) + 1) + "|"]
    for tier in ("7b", "13b"):
        for method in METHODS:
            cells = [cell(tier, method, device) for device in devices]
            lines.append(f"| {tier} {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
