"""What an adapter method says about itself: its adapter_config.json, its tensors, how it is attached. No torch here."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from longctx.adapters.config import PeftConfig
from longctx.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings = dict[str, Any]  # the content of adapter_config.json
Shapes = Mapping[str, tuple[int, ...]]  # of a base model's tensors by name

ANY = -1  # in an expected shape: the adapter's own inner size
ALL_LINEAR = "all-linear"


class AdapterMethod(ABC):
    """One kind of adapter; stateless. ``name`` is its name in the registry and in ``peft.method``."""

    name: str
    peft_type: str
    kinds: tuple[str, ...]  # last words of the names of an adapted layer's tensors, without .weight
    is_merged: bool  # for serving: into the base's weights; else it runs beside them

    def owns(self, settings: Settings) -> bool:
        """Whether an adapter_config.json is one of this method."""
        return settings.get("peft_type") == self.peft_type

    @abstractmethod
    def describe(self, config: PeftConfig, shapes: Shapes) -> Settings:
        """The adapter_config.json of a new adapter, without what all methods share. ``ConfigError`` for bad targets."""

    @abstractmethod
    def refuse(self, settings: Settings) -> str | None:
        """What in an adapter_config.json longctx does not support, or None."""

    @abstractmethod
    def expected_shape(self, name: str, shapes: Shapes) -> tuple[int, ...] | None:
        """Shape of the adapter's tensor ``name`` beside that base, ``ANY`` where it is free; None: no such tensor."""

    @abstractmethod
    def attach(self, model: "PreTrainedModel", settings: Settings) -> None:
        """Add the adapter's modules to ``model``, in place; a new adapter does not change what the model computes."""

    @abstractmethod
    def file_name(self, parameter_name: str) -> str:
        """The name in a PEFT folder, without its prefix, of a parameter of a model with this adapter."""


def linear_layers(shapes: Shapes) -> list[str]:
    """Names of the linear layers inside a model's decoder layers, as ``peft.target_modules`` takes them."""
    return list(dict.fromkeys(name.split(".")[-2] for name, shape in shapes.items() if _is_linear(name, shape)))


def norm_layers(shapes: Shapes) -> list[str]:
    """Names of a model's norms."""
    modules = (name.split(".")[-2] for name in shapes if name.endswith(".weight"))
    return list(dict.fromkeys(name for name in modules if name.endswith("norm")))


def choose_targets(targets: Iterable[str], shapes: Shapes) -> list[str]:
    """The linear layers to adapt; ``ConfigError`` if one of ``targets`` is none."""
    allowed, wanted = linear_layers(shapes), list(dict.fromkeys(targets))
    if wanted == [ALL_LINEAR]:
        return allowed
    unknown = [name for name in wanted if name not in allowed]
    if unknown or not wanted:
        raise ConfigError(
            f"peft.target_modules={wanted} is not allowed: {', '.join(unknown) or 'an empty list'} matches no linear "
            f"layer of this model; allowed: {', '.join(allowed)}, or {ALL_LINEAR} alone"
        )
    return wanted


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return ".layers." in name and name.endswith(".weight") and len(shape) == 2
