"""The `weight` of packed layers, for all code that reads it, of models and of transformers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from bittern.errors import ModelError


class PackedWeight(nn.Parameter):
    """The `weight` of a packed layer: it has the shape, type and device of the float weight, takes the memory of one
    number, computes its values whenever something reads them, and cannot be changed.

    Models read the weights of their layers, and transformers does to count, tie and initialize them. A placeholder of
    one zero, tried before, cut the bias of a tied head to its size, and whoever multiplied by it got zeros.
    """

    layer: weakref.ref[Any]  # the `packed.PackedLayer` that has the codes

    @classmethod
    def of(cls, layer: nn.Module, like: Tensor) -> PackedWeight:
        """The weight of a layer, with the shape, type and device of a tensor."""
        weight: PackedWeight = torch.Tensor._make_subclass(cls, like.new_zeros(1).expand(like.shape), False)
        weight.layer = weakref.ref(layer)
        return weight

    def values(self) -> Tensor:
        """The float weight in the shape that the layer's class has it."""
        if (layer := self.layer()) is None:
            raise ModelError("the layer of this packed weight is gone; keep the model as long as its weights are read")
        matrix: Tensor = layer.unpacked()
        if not isinstance(layer, Conv1D) and not getattr(layer, "transposed", False):
            return matrix.view(self.shape)
        turned: Tensor = matrix.unflatten(0, (*self.shape[:-2], -1)).mT
        return turned.contiguous()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.values(), False)  # alone; a layer makes its own, see `PackedLayer.__setstate__`

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.values(), False).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if func in _WITHOUT_VALUES or (name == "__get__" and func not in _READ):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(next(iter((*args, *kwargs.values()))), cls):
            if name in ("__set__", "__setitem__", "set_data") or (name[-1] == "_" and name[-2] != "_"):
                advice = "change the float model and pack it again"
                raise ModelError(f"the weight of a packed layer cannot be changed; {advice}")
            if func in _SAME:
                return args[0]
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


_CALLED = (
    "size dim numel nelement element_size stride storage_offset is_floating_point is_complex is_conj is_neg _is_view "
    "is_inference requires_grad_ get_device data_ptr"
)
_tensor: Any = Tensor
# of a tensor's attributes all others tell nothing of its values
_READ = {getattr(_tensor, name).__get__ for name in ("data", "T", "H", "mT", "mH", "real", "imag")}
_SAME = {_tensor.data.__get__, _tensor.detach}
_WITHOUT_VALUES = {
    *(getattr(_tensor, name) for name in _CALLED.split()),
    *(_tensor.__len__, _tensor.__hash__, _tensor.untyped_storage, _tensor.requires_grad.__set__, _tensor.grad.__set__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
