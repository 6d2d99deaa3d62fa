"""Modules whose classes have other parents than torch's in front, rules for subclasses, slots."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn

from lora_lightning import LoraConfig, TargetError, inject_adapter, unload

Unit = TypeVar("Unit")


class Interface(ABC):
    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Callable_(Protocol):
    def forward(self, x: Tensor) -> Tensor: ...


class Light:
    __slots__ = ()


class Tagged:
    __slots__ = ("tag",)


class Registered:
    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.names.append(name)


class Sealed:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.__name__ != "OfSealed":
            raise TypeError(f"{cls.__name__} must not derive from a sealed class")


class WithTable(type):
    """A metaclass that takes a class only with an argument."""

    def __new__(cls, name: str, bases: Any, body: Any, *, table: str) -> Any:
        return super().__new__(cls, name, bases, {**body, "table": table})

    def __init__(cls, name: str, bases: Any, body: Any, *, table: str) -> None:
        super().__init__(name, bases, body)


class OfInterface(Interface, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)


class OfAbc(ABC, nn.Linear):
    pass


class BeforeAbc(nn.Linear, ABC):
    pass


class OfGeneric(Generic[Unit], nn.Linear):
    pass


class OfGenericOfInt(OfGeneric[int]):
    pass


class OfProtocol(Callable_, nn.Linear):
    def __init__(self, n: int, m: int) -> None:
        nn.Linear.__init__(self, n, m)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)


class OfLight(Light, nn.Linear):
    pass


class OfTagged(Tagged, nn.Linear):
    pass


class OfAll(Light, ABC, Generic[Unit], nn.Linear):
    pass


class WithSlot(nn.Linear):
    __slots__ = ("extra",)


class OfLightAndSlot(Light, WithSlot):
    pass


class OfRegistered(Registered, ABC, nn.Linear, name="of registered"):
    pass


class OfSealed(Sealed, nn.Linear):
    pass


@dataclass(eq=False)
class AsDataclass(nn.Linear):
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        nn.Linear.__init__(self, self.in_features, self.out_features)


class WithMetaclass(nn.Linear, metaclass=WithTable, table="layers"):
    pass


CLASSES = [
    *(OfInterface, OfAbc, BeforeAbc, OfGeneric, OfGenericOfInt, OfProtocol, OfLight, OfTagged),
    *(OfAll, WithSlot, OfLightAndSlot, OfRegistered, OfSealed, AsDataclass),
]


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("cls", CLASSES)
def test_layer_of_any_class(cls: Any, option: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), cls(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    options = {"target_modules": ["0"]} | {option: ["1"]}
    inject_adapter(model, LoraConfig(r=2, **options))
    assert torch.equal(model(x), before)
    assert isinstance(model[1], cls)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    trained = model(x)
    assert not torch.allclose(trained, before)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), trained)
    unload(model)
    assert type(model[1]) is cls
    assert torch.equal(model(x), before)


def test_subclass_hooks_are_left_alone() -> None:
    names = list(Registered.names)
    inject_adapter(nn.Sequential(OfRegistered(4, 4)), LoraConfig(r=2))
    assert Registered.names == names


def test_metaclass_that_takes_no_subclass_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), WithMetaclass(8, 8))
    with pytest.raises(TargetError, match=r"'1' \(WithMetaclass\).*missing 1 required keyword"):
        inject_adapter(model, LoraConfig(r=2))
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
