"""What form has a mergekit file? Its parts and their types, as mergekit 0.1.5 reads them."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, StrictBool

from helpers.merge.recipe import Setting


class UniqueKeys(yaml.SafeLoader):
    """Plain data alone, each key once."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise ValueError(f"{name} is stated twice in one mapping")
        return super().construct_mapping(node, deep)


def _truth(value: Any) -> Any:
    """True or false, 1 and 0 too: mergekit reads a number."""
    return bool(value) if type(value) in (int, float) and value in (0, 1) else value


Truth = Annotated[StrictBool, BeforeValidator(_truth)]


class Parameters(BaseModel, extra="forbid"):
    weight: Setting = None
    density: Setting = None
    gamma: Setting = None
    t: Setting = None
    scale: Setting = Field(None, alias="lambda")
    normalize: Truth = None
    rescale: Truth = None
    int8_mask: Truth = None

    def stated(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class Entry(BaseModel, extra="forbid"):
    model: Any
    parameters: Parameters | None = None
    layer_range: Any = None


class Slice(BaseModel, extra="forbid"):
    sources: list[Entry] = Field(min_length=1)
    base_model: Any = None
    parameters: Parameters | None = None


class Configuration(BaseModel, extra="forbid"):
    merge_method: Any
    models: list[Entry] | None = Field(None, min_length=1)
    slices: list[Slice] | None = Field(None, min_length=1)
    base_model: Any = None
    parameters: Parameters | None = None
    dtype: Any = None
    out_dtype: Any = None
    tokenizer_source: Any = None
    tokenizer: Any = None


def model_name(stated: Any, base: str | None) -> str:
    """A model's name; of mergekit's base+adapter and {model, lora} the adapter's."""
    of, adapter = parts(stated)
    if adapter and (base is None or Path(of) != Path(base)):
        raise ValueError(
            f"{of}+{adapter}: only adapters of the base_model are supported"
        )
    return adapter or of


def parts(stated: Any) -> tuple[str, str]:
    """A model's name and its adapter's, empty for none."""
    lora = None
    if isinstance(stated, dict):
        lora = stated.get("lora")
        stated = stated.get("model", stated)
    stated = _at_revision(stated)
    if not isinstance(stated, str) or not stated:
        raise ValueError(f"a model is named by text, not by {stated!r}")
    if lora is not None:
        return stated, _at_revision(lora)
    of, _, adapter = stated.partition("+")
    return of, adapter


def _at_revision(stated: Any) -> Any:
    """Of mergekit's {path, revision} the name that this engine has for it."""
    if not isinstance(stated, dict):
        return stated
    path, revision = stated.get("path"), stated.get("revision")
    return f"{path}@{revision}" if path and revision else path
