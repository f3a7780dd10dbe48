"""Write the JSON schema of benchmark records to `results/record.schema.json`.

python benchmarks/schema.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from rm_scale.reporting.benchmarks.sealed_records import Record  # noqa: E402

OUTPUT = REPOSITORY / "benchmarks" / "results" / "record.schema.json"

if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(Record.model_json_schema(by_alias=True), indent=1) + "\n", encoding="utf-8")
    print(OUTPUT)
