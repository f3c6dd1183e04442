"""The model store: every model, at a fraction of its size."""

from dynkit.models.guard import Guard, guard
from dynkit.models.sizes import Stats
from dynkit.models.store import ModelStore, OpenModel
from dynkit.models.tensors import manifest_id, tensor_id
from dynkit.models.upkeep import Damage, Freed

__all__ = ["Damage", "Freed", "Guard", "ModelStore", "OpenModel", "Stats", "guard", "manifest_id", "tensor_id"]
