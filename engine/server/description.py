"""What /docs and /openapi.json say beyond what FastAPI reads off the routes and bodies by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from ...model.sampling_params import INTEGERS, Bounds

BODIES = ("CompletionRequest", "ChatRequest", "GenerateRequest", "TokenizeRequest", "DetokenizeRequest")


PART = "#/components/schemas/{model}"


def within(bounds: Bounds) -> FieldInfo:
    """Bounds that are only described: SamplingParams checks them, and its errors name the value."""
    described: dict[str, Any] = {"exclusiveMinimum" if bounds.open_below else "minimum": bounds.low}
    if bounds.high is not None:
        described["maximum"] = bounds.high
    return Field(json_schema_extra=described)


def events(what: str, *bodies: type[BaseModel]) -> dict[str, Any]:
    """A response of server-sent events, each with one of the bodies as JSON."""
    json = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": PART.format(model=body.__name__)} for body in bodies]},
    }
    data = {"anyOf": [json, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        "description": f"{what} The last one is `data: [DONE]`, or an error.",
        "content": {"text/event-stream": {"schema": event}},
    }


def describe(app: FastAPI, names: Sequence[str], more: Sequence[type[BaseModel]], *, keys: bool) -> None:
    """Makes the app's description say what is known once it runs.

    names:  what clients may call the model
    more:   bodies that are only referred to: those of errors and of server-sent events
    keys:   whether every route that is described, but /health, wants a key
    """
    generic = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generic(), names, more, keys)
        return app.openapi_schema

    app.openapi = openapi


def _complete(schema: dict[str, Any], names: Sequence[str], more: Sequence[type[BaseModel]], keys: bool) -> None:
    parts = schema["components"]["schemas"]
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400
            for parameter in operation.get("parameters", ()):
                parameter["schema"]["enum"] = list(names)  # /v1/models/{name} has the only one
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    for name in BODIES:
        fields = parts[name]["properties"]
        fields["model"]["anyOf"][0]["enum"] = list(names)
        if "seed" in fields:  # FastAPI makes floats of bounds, and 2^63 − 1 is none
            fields["seed"]["anyOf"][0] |= {"minimum": INTEGERS["seed"].low, "maximum": INTEGERS["seed"].high}
    for body in more:
        own = body.model_json_schema(ref_template=PART)
        parts.update(own.pop("$defs", {}))
        parts[body.__name__] = own
    if keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        schema["paths"]["/health"]["get"]["security"] = []
