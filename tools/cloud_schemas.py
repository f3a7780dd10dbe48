"""Write the schemas that the files of examples/kubernetes and examples/skypilot must keep, from published packages.

In an environment of its own:

    pip install kubeflow-trainer-api==2.3.0 skypilot==0.14.1
    python tools/cloud_schemas.py
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "cloud_schemas"
KINDS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "TrainJob": "TrainerV1alpha1TrainJob",
    "Job": "IoK8sApiBatchV1JobTemplateSpec",
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaimTemplate",
}
"""Kinds by the model that describes them. The last two are templates: all of the kind but `apiVersion` and `kind`."""


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, schema in {"kubernetes": kubernetes(), "skypilot": skypilot()}.items():
        text = json.dumps(schema, indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def kubernetes() -> dict[str, Any]:
    """Return the schemas of all kinds, with an entry of `$defs` for each model and `kinds` that leads to them."""
    models = importlib.import_module("kubeflow_trainer_api.models")
    json_schema = importlib.import_module("pydantic.json_schema")
    pairs = [(getattr(models, name), "validation") for name in KINDS.values()]
    _, schema = json_schema.models_json_schema(pairs, by_alias=True)
    definitions = {name: _strict(_without_texts(model)) for name, model in schema["$defs"].items()}
    return {"$defs": definitions, "kinds": {kind: f"#/$defs/{name}" for kind, name in KINDS.items()}}


def _without_texts(node: Any) -> Any:
    """Return a schema without its descriptions and titles, which are nine tenths of it."""
    if isinstance(node, list):
        return [_without_texts(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_texts(each)
        for key, each in node.items()
        if not (key in ("description", "title", "default") and not isinstance(each, dict))
    }


def _strict(model: dict[str, Any]) -> dict[str, Any]:
    """Return a model that refuses unknown fields: the API server would drop them in silence."""
    properties = model.get("properties", {})
    if "actual_instance" in properties:  # a value that may have several types, such as a quantity
        return {"anyOf": [each for each in properties["actual_instance"]["anyOf"] if each != {"type": "null"}]}
    return {**model, "additionalProperties": False} if properties else model


# --- SkyPilot --------------------------------------------------------------------------------------------------------


def skypilot() -> dict[str, Any]:
    """Return the schemas of a task, with those of its parts put in, and of a volume."""
    schemas: Any = importlib.import_module("sky.utils.schemas")
    schemas._allow_additional_properties = lambda: False  # as the server has it, once it has loaded its plugins
    task = schemas.get_task_schema()
    task["properties"]["resources"] = schemas.get_resources_schema()
    return {"task": _plain(task), "volume": _plain(schemas.get_volume_schema())}


def _plain(node: Any) -> Any:
    """Return a schema with SkyPilot's own keywords in those of JSON schema, and without nested dialects."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _plain(each) for key, each in node.items() if key not in ("$schema", "description")}
    if "case_sensitive_enum" in plain:
        plain["enum"] = plain.pop("case_sensitive_enum")
    if "case_insensitive_enum" in plain:
        plain["pattern"] = "^(?i:" + "|".join(plain.pop("case_insensitive_enum")) + ")$"
    return plain


if __name__ == "__main__":
    main()
