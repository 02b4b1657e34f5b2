"""Which parts of which parameters an optimizer's tensor holds, under every sharding.

A sharded optimizer sees flat tensors, not parameters: ZeRO 1 and 2 give it a rank's stretch of a
whole group, ZeRO 3 a slice of every parameter, FSDP2 a DTensor. MARS needs to know the matrix and
the parameter behind each element, because it clips by the norm of a parameter and orthogonalises
matrices. A tensor that cannot be resolved is an error: taking one-dimensional for "a vector" is how
optimizers turn into AdamW under ZeRO without a word.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["matrix", "vector", "embedding", "stack"]
"""A stack is matrices of one shape in one tensor: those of a mixture's experts."""
KINDS: tuple[Kind, ...] = ("matrix", "vector", "embedding", "stack")

# The module that owns a table of input embeddings or an output head, as models name it. A linear
# layer inside a module of such a name is none (time_embedding.linear_1).
_EMBEDDING = re.compile(
    r"\w*embed\w*|\w+_emb|emb|wte|wpe|lm_head|shared|output|head", re.IGNORECASE
)
# What PEFT and weight tying put between that module and its weight.
_WRAPPED = re.compile(r"(\.(base_layer|original_module|modules_to_save\.\w+))?(\.weight)?$")


@dataclass(frozen=True)
class Original:
    """A parameter as the user handed it over, before anything sharded it.

    It is not kept alive: with FSDP2 DTensors take its place, and it would be a whole model's memory
    on every accelerator.
    """

    reference: weakref.ref[Any]
    shape: tuple[int, ...]
    kind: Kind
    trained: bool
    """Whether it required a gradient when it was handed over."""

    @property
    def parameter(self) -> Any:
        """The parameter itself; None if nothing else holds it any more."""
        return self.reference()

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained, or was until it went."""
        parameter = self.parameter
        return self.trained if parameter is None else bool(parameter.requires_grad)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def is_table(name: str) -> bool:
    """Whether a matrix of this name is an embedding or an output head, a row an item.

    Both stand outside the numbered layers, where a "head" or an "output" is a projection.
    """
    path = _WRAPPED.sub("", name).split(".")
    numbered = any(part.isdigit() for part in path)
    return not numbered and _EMBEDDING.fullmatch(path[-1]) is not None


FSDP1 = (
    "FSDP1 flattens parameters and forgets their borders, so that no matrix could be told from a "
    "vector: use FSDP2 (fully_shard; fsdp_version=2 in accelerate, fsdp_config={'version': 2} in "
    "TrainingArguments)"
)
"""Why it is refused."""


def refuse_split(parameter: Tensor) -> None:
    """Refuse a parameter that is a part whose whole cannot be found from here.

    Raises:
        ValueError: it bears the mark of FSDP1, or of tensor parallelism without DTensors.
    """
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(FSDP1)
    if getattr(parameter, "tensor_model_parallel", False):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is split by tensor parallelism without "
            "DTensors (Megatron, DeepSpeed's AutoTP): MARS would clip and orthogonalise this "
            "rank's part alone; use DTensors (parallelize_module), ZeRO or FSDP2, or where the "
            "parallel size is 1 set parameter.tensor_model_parallel = False"
        )


def describe(parameter: Tensor, name: str = "", kind: Kind | None = None) -> Original:
    """Shape and kind of a parameter; `ds_shape` is what `zero.Init` keeps of its shape.

    Raises:
        ValueError: see `refuse_split`; a complex parameter, whose second moment would be complex.
    """
    refuse_split(parameter)
    if parameter.is_complex():
        raise ValueError(
            f"parameter {name or tuple(parameter.shape)} is complex; MARS is not defined for it: "
            "give its real and imaginary parts (torch.view_as_real)"
        )
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if kind is None:
        kind = _kind(shape, name)
    return Original(weakref.ref(parameter), shape, kind, parameter.requires_grad)


def _kind(shape: tuple[int, ...], name: str) -> Kind:
    if "experts" in name.split("."):  # as transformers stores them, the expert first
        return "stack" if len(shape) == 3 else "vector" if name.endswith("bias") else "matrix"
    # The authors' code takes exactly two dimensions for a matrix: convolutions are vectors.
    if len(shape) != 2:
        return "vector"
    return "embedding" if is_table(name) else "matrix"


@dataclass(frozen=True)
class Segment:
    """A contiguous stretch of a flattened parameter inside an optimizer's tensor."""

    index: int
    """Position of the parameter among the originals."""
    start: int
    """First element, in the flattened parameter."""
    offset: int
    """First element, in the tensor."""
    numel: int


@dataclass(frozen=True)
class Layout:
    """What one tensor of the optimizer holds.

    `members` are the originals that this tensor and its siblings on the other ranks of `groups`
    hold together; it is the same on all of them, and `segments` is this rank's part. Without
    `groups` the tensor is one whole parameter.
    """

    segments: tuple[Segment, ...]
    members: tuple[int, ...]
    groups: tuple[Any, ...] = ()
    cloned: bool = False
    """A float32 copy of a parameter, made by DeepSpeed's optimizer without ZeRO."""

    @property
    def whole(self) -> bool:
        return not self.groups


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def whole(index: int, tensor: Tensor) -> Layout:
    """Layout of a tensor that is original number `index`."""
    return Layout((Segment(index, 0, 0, tensor.numel()),), (index,))


def collective_device(group: Any) -> torch.device:
    """Where a process group's collectives take tensors, the same on all its ranks.

    The accelerator, if it has a backend of its own there; else the CPU, also for gloo and MPI,
    which serve both. It does not follow the tensors: under offload they lie on the CPU, and a rank
    may hold none.
    """
    # Not get_backend(): with several devices it says "undefined" or "cpu:gloo,cuda:nccl".
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    own = backends.get(accelerator.type) if accelerator else None
    if accelerator is None or own is None or own == backends.get("cpu"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


Candidates = Sequence[tuple[int, Original]]
"""Originals of one parameter group with their positions."""


def _same(tensor: Tensor, position: int, candidates: Candidates) -> Layout | None:
    """Plain torch, DDP, ZeRO 0 in float32: the tensor is the parameter."""
    if is_dtensor(tensor):
        return None
    for index, original in candidates:
        # FSDP1 keeps the objects, and puts flat shards into them.
        if original.parameter is tensor and original.shape == tuple(tensor.shape):
            return whole(index, tensor)
    return None


def _zero3(tensor: Tensor, position: int, candidates: Candidates) -> Layout | None:
    """ZeRO 3: a sub-group's flat tensor, the concatenated local shards of its parameters."""
    for _, original in candidates:
        zero = getattr(original.parameter, "_z3_optimizer", None)
        if zero is not None:
            break
    else:
        return None
    flats = zero.fp32_partitioned_groups_flat
    where = next((i for i, flat in enumerate(flats) if flat is tensor), None)
    if where is None:
        return None
    if getattr(zero, "partial_offload", 1.0) != 1.0:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio = {zero.partial_offload}: DeepSpeed then "
            "updates the other part by its own AdamW, not by MARS; set ratio to 1.0"
        )
    members = {id(parameter) for parameter in zero.fp16_groups[where]}
    segments, held, group = [], [], None
    for index, original in candidates:
        parameter = original.parameter
        if id(parameter) not in members:
            continue
        held.append(index)
        group = parameter.ds_process_group
        _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank(group) * size
        numel = min(size, original.numel - start)  # the last shard is padded
        if numel > 0:
            segments.append(Segment(index, start, offset, numel))
    return Layout(tuple(segments), tuple(held), (group,))


_MISPLACED = (
    "DeepSpeed's float32 copy of a parameter of shape {shape} is not where DeepSpeed says: set "
    "zero_optimization.round_robin_gradients to false, with which it stores parameters in another "
    "order, and load weights before deepspeed.initialize, or by the engine's load_checkpoint"
)


def _holds(mapping: Any, parameter: Tensor) -> bool:
    """Whether a rank's float32 copy of a stretch of a parameter is one."""
    copy = mapping.hp_fragment
    if copy is None:  # moved away; there is nothing to compare
        return True
    here = mapping.lp_fragment_address
    given = parameter.detach().flatten()[here.start : here.start + here.numel]
    copy = copy.detach().to(given)
    return bool(((copy == given) | copy.isnan()).all())


def _zero12(tensor: Tensor, position: int, candidates: Candidates) -> Layout | None:
    """ZeRO 1 and 2, BF16_Optimizer: a rank's stretch of the concatenated, padded group."""
    mapped = [(i, o) for i, o in candidates if hasattr(o.parameter, "_hp_mapping")]
    if not mapped or tensor.dim() != 1:
        return None
    segments = []
    for index, original in mapped:
        parameter = original.parameter
        mapping = parameter._hp_mapping
        if mapping is None:  # no part of it on this rank
            continue
        storage = None if mapping.hp_fragment is None else mapping.hp_fragment.untyped_storage()
        if storage is not None and storage.data_ptr() != tensor.untyped_storage().data_ptr():
            return None
        held = mapping.hp_fragment_address
        segments.append(Segment(index, mapping.lp_fragment_address.start, held.start, held.numel))
        if not _holds(mapping, parameter):
            raise ValueError(_MISPLACED.format(shape=original.shape))
    group = mapped[0][1].parameter._dp_group
    return Layout(tuple(segments), tuple(i for i, _ in mapped), (group,))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP2, tensor parallelism)."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reduced_gradient(tensor: Tensor) -> Tensor | None:
    """A tensor's gradient, split as the tensor is.

    What sequence parallelism makes of a replicated weight's gradient is each rank's share of a sum.
    """
    gradient: Any = tensor.grad
    if gradient is None or not is_dtensor(gradient) or not is_dtensor(tensor):
        return gradient  # type: ignore[no-any-return]
    placements = tensor.placements  # type: ignore[attr-defined]
    if gradient.placements == placements:
        return gradient  # type: ignore[no-any-return]
    return gradient.redistribute(placements=placements)  # type: ignore[no-any-return]


def _dtensor(tensor: Tensor, position: int, candidates: Candidates) -> Layout | None:
    """FSDP2: a DTensor, split over some of its mesh's dimensions."""
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: Any = tensor
    found = [index for index, original in candidates if original.parameter is tensor]
    # accelerate exchanges a group's parameters for DTensors, in their order.
    index = found[0] if found else candidates[position][0]
    shape = tuple(dtensor.shape)
    if candidates[index - candidates[0][0]][1].shape != shape:
        return None
    groups = []
    for dimension, placement in enumerate(dtensor.placements):
        if isinstance(placement, Partial):
            raise ValueError(f"a parameter of shape {shape} has a partial placement")
        if not isinstance(placement, Replicate):
            groups.append(dtensor.device_mesh.get_group(dimension))
    here, offsets = compute_local_shape_and_global_offset(
        dtensor.shape, dtensor.device_mesh, dtensor.placements
    )
    numel = math.prod(here)
    if not groups:
        return whole(index, local(tensor))
    # A stretch of rows is contiguous in the flattened parameter; another split is not (start -1).
    # Neither need be one of strides: FSDP2 over tensor parallelism, or weights packed together.
    plain = all(isinstance(placement, Shard | Replicate) for placement in dtensor.placements)
    by_rows = plain and (tuple(here[1:]) == shape[1:] or numel == 0)
    start = offsets[0] * math.prod(shape[1:]) if by_rows and shape else -1
    segments = (Segment(index, start, 0, numel),) if numel else ()
    return Layout(segments, (index,), tuple(groups))


def _clone(tensor: Tensor, position: int, candidates: Candidates) -> Layout | None:
    """ZeRO 0 in half precision: float32 clones, in the order and the shapes of the parameters."""
    trained = [(i, o) for i, o in candidates if o.requires_grad]
    if position < len(trained) and trained[position][1].shape == tuple(tensor.shape):
        return replace(whole(trained[position][0], tensor), cloned=True)
    return None


# In this order: DeepSpeed's marks on the parameters say more than a tensor's shape.
_RESOLVERS: tuple[Callable[[Tensor, int, Candidates], Layout | None], ...] = (
    _same,
    _dtensor,
    _zero3,
    _zero12,
    _clone,
)


def resolve(tensor: Tensor, position: int, candidates: Candidates) -> Layout:
    """Layout of an optimizer's tensor.

    Args:
        tensor: number `position` of a parameter group.
        candidates: the parameters that the user had put into that group.

    Raises:
        ValueError: the sharding is not one that is known here.
    """
    for _, original in candidates:  # what split them may have come after the optimizer
        if original.parameter is not None:
            refuse_split(original.parameter)
    for resolver in _RESOLVERS:
        layout = resolver(tensor, position, candidates)
        if layout is None or not layout.members:
            continue
        masters = layout.groups and not is_dtensor(tensor)
        if masters and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"DeepSpeed's master weights are {tensor.dtype}: MARS needs float32 ones; switch "
                "bf16_master_weights_and_grads and fp16_master_weights_and_grads off"
            )
        return layout
    raise ValueError(
        f"MARS cannot tell which parameters the tensor of shape {tuple(tensor.shape)} holds. "
        "Known shardings are ZeRO 0 to 3, BF16_Optimizer and FSDP2 (fully_shard), not FSDP1. "
        "ZenFlow and SuperOffload call DeepSpeed's CPUAdam: switch them off."
    )
